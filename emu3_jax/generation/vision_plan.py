"""The vision tokenizer's programs, beside the decoder's. `sharding.plan` compiles them for a TPU slice."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from emu3_jax.config import DecoderConfig, IbqConfig, VisionConfig, VisionTokenizerConfig
from emu3_jax.generation.codec import batches_on, part_grids
from emu3_jax.models.vision import Stream, make_decoder, make_encoder, vision_module
from emu3_jax.sharding.plan import Program
from emu3_jax.sharding.rules import use_mesh, vision_shardings

WEIGHTS = "vision tokenizer"  # name of the weights in a plan


def published_vision(decoder: DecoderConfig) -> VisionTokenizerConfig | None:
    """The published vision tokenizer with as many codes as the decoder has visual ids, or None if there is none."""
    published = (VisionConfig(), IbqConfig())
    return next((config for config in published if config.codebook_size == decoder.tokens.visual_count), None)


def none_published(decoder: DecoderConfig) -> str:
    """Why a plan leaves the vision tokenizer out where `published_vision` finds none, to follow what is left out."""
    count = decoder.tokens.visual_count
    return f"because no published vision tokenizer has {count} codes, as the decoder has visual ids"


@dataclasses.dataclass(frozen=True, eq=False)
class PlannedVision:
    """A vision tokenizer whose programs are compiled but not run. Each device has all weights.

    Attributes:
        config: its config.
        mesh: the mesh.
        params: its weights, as abstract arrays with shardings.
    """

    config: VisionTokenizerConfig
    mesh: Mesh
    params: Any

    @classmethod
    def of(cls, config: VisionTokenizerConfig, mesh: Mesh) -> "PlannedVision":
        pixels = jnp.zeros((1, config.spatial_factor, config.spatial_factor, config.in_channels))
        shapes = nn.unbox(jax.eval_shape(vision_module(config).init, jax.random.key(0), pixels))["params"]
        params = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            shapes, vision_shardings(config, mesh),
        )  # fmt: skip
        return cls(config, mesh, params)

    @property
    def weights(self) -> dict[str, Any]:
        """The weights by their name in a plan."""
        return {WEIGHTS: self.params}

    def decoding(
        self,
        grid: tuple[int, ...],
        *,
        fast: bool,
        runs: int,
        beside: Mapping[str, Any],
        at_once: int = 1,
        place: NamedSharding | None = None,
    ) -> Program:
        """The program that decodes the pixels of a picture [h, w], or of a part of a clip [t, h, w].

        Args:
            grid: size in codes.
            fast: see `make_decoder`.
            runs: number of pictures or clips, or of batches of them.
            beside: other arrays in memory, as in `Program`.
            at_once: number of pictures or clips of a batch.
            place: sharding of a batch, see `make_decoder`; None: each device decodes all.
        """
        config, (size, parts) = self.config, self._parts(grid)
        whole = NamedSharding(self.mesh, PartitionSpec())
        codes = jax.ShapeDtypeStruct((at_once, *size), jnp.int32, sharding=place or whole)

        def lower() -> jax.stages.Lowered:
            with use_mesh(self.mesh):
                if parts > 1 and isinstance(config, VisionConfig):
                    return Stream(config, self.params, "decode", fast, place).lower(codes)
                return make_decoder(config, fast, place).lower(self.params, codes)

        several = f"{at_once} {'pictures' if len(grid) == 2 else 'clips'} of " if at_once > 1 else ""
        name = f"{'fast' if fast else 'exact'} pixels of {several}{'x'.join(map(str, size))} codes"
        return Program(name, lower, {**self.weights, "inputs": codes}, beside=dict(beside), runs=runs * parts)

    def _parts(self, grid: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        """The size in codes of the largest part that is decoded at once, and the number of parts."""
        if not isinstance(self.config, VisionConfig) or len(grid) == 2:
            return grid, 1
        most = part_grids(self.config.temporal_factor)
        return (min(most, grid[0]), *grid[1:]), -(-grid[0] // most)

    def decoding_for_rewards(self, grid: tuple[int, ...], count: int, beside: Mapping[str, Any]) -> Program:
        """The program that decodes the `count` pictures or clips of a step of GRPO, as `preference.rollouts` does.

        While a batch or a part of clips is decoded, the pixels of the one before are on the devices, until the host
        has fetched them. `grid`, `beside`: as in `decoding`.
        """
        config = self.config
        at_once, place = batches_on(self.mesh, config, grid, count)
        batches = -(-count // at_once)
        size, parts = self._parts(grid)
        height, width = (side * config.spatial_factor for side in grid[-2:])
        frames = (size[0] * config.temporal_factor,) if isinstance(config, VisionConfig) and len(grid) == 3 else ()
        shape = (at_once, *frames, height, width, config.out_channels)
        earlier = {"earlier pixels": self._replicated(shape, jnp.float32)} if batches * parts > 1 else {}
        together = {**beside, **earlier}
        return self.decoding(grid, fast=False, runs=batches, beside=together, at_once=at_once, place=place)

    def encoding(self, grid: tuple[int, ...], *, runs: int, beside: Mapping[str, Any]) -> Program:
        """The program that encodes a picture to codes [h, w]. `runs`, `beside`: as in `decoding`."""
        height, width = (side * self.config.spatial_factor for side in grid)
        pixels = self._replicated((1, height, width, self.config.in_channels), jnp.float32)

        def lower() -> jax.stages.Lowered:
            with use_mesh(self.mesh):
                return make_encoder(self.config).lower(self.params, pixels)

        name = f"codes of a picture of {height}x{width} pixels"
        return Program(name, lower, {**self.weights, "inputs": pixels}, beside=dict(beside), runs=runs)

    def _replicated(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, PartitionSpec()))

"""The programs that generate pictures, clips and answers. `sharding.plan` compiles them for a TPU slice."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from emu3_jax.config import DecoderConfig
from emu3_jax.generation.config import GenerateConfig
from emu3_jax.generation.grammar import Grammar, GrammarState
from emu3_jax.generation.grammar import one_pass as grammar_pass
from emu3_jax.generation.interleaved_plan import interleaved_programs
from emu3_jax.generation.rows import Sampling
from emu3_jax.generation.schedule import text_schedule
from emu3_jax.generation.session import DecodeSession
from emu3_jax.generation.session_rows import Row
from emu3_jax.generation.shapes import Shapes, passes_by_size, sizes_read
from emu3_jax.generation.vision_plan import PlannedVision, none_published, published_vision
from emu3_jax.models.decoder import Decoder
from emu3_jax.models.quantization import (
    codes_and_scales_shapes,
    codes_and_scales_shardings,
    is_quantised,
    narrows_cache,
)
from emu3_jax.printable import counted
from emu3_jax.sharding.bounds import Decoding
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.plan import Program, Slice
from emu3_jax.sharding.rules import decoder_shardings


def programs(config: GenerateConfig, slice_: Slice) -> tuple[Mesh, list[Program]]:
    """The programs of a session: prefill, a decoding step with the largest cache, the last growth of the cache, pixels.

    A session of answers begins with the picture's codes, and has no pixels. For pictures of Emu3.5 there is also the
    automaton of `interleaving`, whose cost comes on top of a decoding step. With `interleave` the programs of the
    decoder are those of `interleaved_plan`.

    Raises:
        Emu3Error: the mesh does not fit the chips or the decoder.
    """
    mesh = make_mesh(config.mesh, slice_.devices)
    params = _params(config.decoder, mesh, config.quantize)
    known = published_vision(config.decoder) if config.vision is None else config.vision
    vision = None if known is None else PlannedVision.of(known, mesh)
    beside = {} if vision is None else vision.weights
    weights = {"weights": params}
    if config.interleave is not None:
        result = interleaved_programs(config, mesh, params, beside)
        if vision is not None:
            # Rows go on while a finished picture is decoded. How many pictures the model writes is unknown.
            cache = {**weights, "cache": result[1].arguments["cache"]}
            result.append(vision.decoding(config.grid, fast=config.fast_pixels, runs=0, beside=cache))
        return mesh, result
    if config.max_new_tokens is not None:
        session = PlannedSession.of_answers(
            config.decoder, mesh, params, Sampling(guidance=1.0), count=config.pictures,
            prompt_tokens=config.prompt_tokens + config.steps, max_new_tokens=config.max_new_tokens,
            parallel=config.parallel, narrow_cache=narrows_cache(config.quantize), kernels=config.kernels,
        )  # fmt: skip
        result = session.programs(beside)
        if vision is not None:
            result.insert(0, vision.encoding(config.grid, runs=config.pictures, beside=weights))
        return mesh, result
    session = PlannedSession.of_grids(config, mesh, params, Sampling(guidance=config.guidance))
    result, shapes = session.programs(beside), session.shapes
    # The models of Emu3.5 decide themselves where pictures begin.
    if config.frames is None and config.decoder.family == "emu3.5":
        result.append(_grammar(config, mesh, shapes.rows, shapes.variant.window))
    if vision is not None:
        # The session has freed its cache.
        result.append(vision.decoding(config.grid, fast=config.fast_pixels, runs=config.pictures, beside=weights))
    return mesh, result


def left_out(config: GenerateConfig) -> list[str]:
    """What `programs` leaves out, and why: a line each, empty if nothing is left out."""
    if config.vision is not None or published_vision(config.decoder) is not None:
        return []
    what = "pixels" if config.max_new_tokens is None else "codes"
    return [f"the vision tokenizer and the {what} of pictures, {none_published(config.decoder)}; set `vision`"]


@dataclasses.dataclass(frozen=True, eq=False)
class PlannedSession:
    """A session whose programs are compiled but not run.

    Attributes:
        decoder: config of the decoder.
        params: its weights, as abstract arrays with shardings.
        session: the session. All its rows are alike.
        last: number of the last decoding step.
        noun: what a row makes, as a word.
        size: what a row makes has so many tokens, as words.
    """

    decoder: DecoderConfig
    params: Any
    session: DecodeSession
    last: int
    noun: str
    size: str

    @classmethod
    def of_grids(cls, config: GenerateConfig, mesh: Mesh, params: Any, sampling: Sampling) -> "PlannedSession":
        """The session that generates pictures or clips.

        Args:
            config: what is generated. Its `mesh` is not read.
            mesh: the mesh.
            params: the decoder's weights, as abstract arrays with shardings.
            sampling: sampling settings of all rows.

        Raises:
            Emu3Error: the mesh does not fit the decoder.
        """
        prompt = [config.decoder.tokens.pad] * config.prompt_tokens
        row = Row(prompt, config.schedule, prompt if config.guidance != 1 else None)
        session = DecodeSession(
            params, config.decoder, [row] * config.pictures, sampling.settings(config.pictures), mesh=mesh,
            kernels=config.kernels, narrow_cache=narrows_cache(config.quantize), parallel=config.parallel,
        )  # fmt: skip
        # The last step of pictures is before EOF, EOI and EOS. For clips it is the last token: each frame ends with
        # EOF.
        last, noun = (config.steps - 3, "picture") if config.frames is None else (config.steps, "clip")
        return cls(config.decoder, params, session, last, noun, f"{'x'.join(map(str, config.grid))} tokens")

    @classmethod
    def of_answers(
        cls,
        decoder: DecoderConfig,
        mesh: Mesh,
        params: Any,
        sampling: Sampling,
        *,
        count: int,
        prompt_tokens: int,
        max_new_tokens: int,
        parallel: int | str,
        narrow_cache: bool = False,
        kernels: str = "auto",
    ) -> "PlannedSession":
        """The session that generates `count` answers. Further arguments and errors: `of_grids`.

        Args:
            count: number of answers that are generated at once.
            prompt_tokens: length of the longest prompt.
            max_new_tokens: largest number of tokens of an answer.
            parallel: see `generation.language.Batching`.
            narrow_cache: store keys and values as int8.
            kernels: implementation of attention over the cache, from `attention.KERNELS`.
        """
        row = Row([decoder.tokens.pad] * prompt_tokens, text_schedule(max_new_tokens))
        settings = sampling.settings(count)
        session = DecodeSession(
            params, decoder, [row] * count, settings, mesh=mesh, kernels=kernels, narrow_cache=narrow_cache,
            parallel=parallel,
        )  # fmt: skip
        return cls(decoder, params, session, max_new_tokens, "answer", f"{max_new_tokens} tokens")

    @property
    def shapes(self) -> Shapes:
        """The shapes that the programs are compiled for."""
        return self.session.shapes

    def programs(self, beside: Mapping[str, Any] | None = None) -> list[Program]:
        """Prefill, a decoding step with the largest cache, and the last growth of the cache, if it grows.

        Args:
            beside: other arrays in memory during the session, as in `Program`.
        """
        session, shapes, beside = self.session, self.shapes, dict(beside or {})
        rows, width, window = shapes.computed_rows, shapes.width, shapes.variant.window
        sizes = shapes.cache_sizes()
        read = sizes_read(sizes, width, shapes.variant.kernels)
        full = session.abstract_state(sizes[-1])
        prompts, start, plan = session.abstract_inputs()
        inputs = (plan, full.tokens, full.step, full.passes, full.ended)
        at_once = f", {window} tokens at once," if window > 1 else ""
        result = [
            Program(
                f"prefill of {rows} rows of {width} tokens",
                session.lower_prefill,
                {"weights": self.params, "inputs": (prompts, start, plan)},
                beside=beside,
                flops=self._flops(rows * width, rows * width * (width + 1) / 2, rows),
            ),
            Program(
                f"decoding step {self.last}{at_once} of {counted(shapes.rows, self.noun)} of {self.size}",
                lambda: session.lower_decode(sizes[-1]),
                {"weights": self.params, "cache": full.cache, "inputs": inputs},
                beside=beside,
                flops=self._flops(rows * window, rows * window * sizes[-1], rows * window),
                rates=Decoding(self.noun, shapes.rows, passes_by_size(read, width, self.last, window), window),
            ),
        ]
        if len(sizes) > 1:
            old, new = sizes[-2:]
            result.append(
                Program(
                    f"growth of the cache to {new} slots",
                    lambda: session.lower_growth(old, new),
                    {"cache": session.abstract_state(old).cache},
                    beside={**beside, "weights": self.params, "inputs": inputs},
                )
            )
        return result

    def _flops(self, tokens: int, attended: float, heads: int) -> float:
        """Operations of layers and head. `tokens` see `attended` keys in total, `heads` tokens get logits."""
        config = self.decoder
        d, f, h = config.hidden_size, config.intermediate_size, config.head_dim
        layer = d * (2 * config.num_heads + 2 * config.num_kv_heads) * h + 3 * d * f
        pairs = 4 * config.num_layers * config.num_heads * h * attended
        ids = config.tokens.visual_count if self.shapes.variant.visual_only else config.vocab_size
        return 2 * config.num_layers * layer * tokens + pairs + 2 * ids * d * heads


def _grammar(config: GenerateConfig, mesh: Mesh, rows: int, window: int) -> Program:
    """The automaton, which `interleaving.decode` asks in each pass beside what a decoding step computes."""
    # Which ids the digits have makes no difference to the cost.
    grammar = Grammar.of(config.decoder, range(1, 11), 11)
    whole = NamedSharding(mesh, PartitionSpec())
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
        GrammarState.of([(config.grid[0], config.grid[1])] * rows),
    )
    one_pass = jax.jit(functools.partial(grammar_pass, grammar=grammar, window=window))
    return Program(
        f"grammar of a step of interleave, {rows} rows", lambda: one_pass.lower(state), {"inputs": state}, runs=0
    )


def _params(config: DecoderConfig, mesh: Mesh, quantize: str | None) -> Any:
    """The decoder's weights as a bundle loads them: in the decoder's dtype, or with matrices as codes and scales."""
    declared = nn.unbox(jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    places = traverse_util.flatten_dict(decoder_shardings(config, mesh))
    params = {}
    for path, leaf in traverse_util.flatten_dict(declared).items():
        shapes = {path: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(config.dtype))}
        if quantize is not None and is_quantised(path):
            shapes = codes_and_scales_shapes(path, leaf.shape, quantize)
            places |= codes_and_scales_shardings(path, places[path])
        for name, array in shapes.items():
            params[name] = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=places[name])
    return traverse_util.unflatten_dict(params)

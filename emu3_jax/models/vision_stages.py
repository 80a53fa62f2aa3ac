"""What both vision tokenizers share above single layers: the blocks of one resolution, and long batches in groups.

Axes: B batch, H W rows and columns, C channels, N frames of all clips.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from emu3_jax.config import VisionTokenizerConfig
from emu3_jax.models.vision_layers import AttentionBlock, Downsample, Numerics, ResnetBlock, Upsample

# The spatial network processes frames in groups of up to this many pixels. Small frames together fill the device, and a
# long clip or a large batch needs no more memory than one 512x512 picture.
PIXELS_PER_STEP = 512 * 512


class Stage(nn.Module):
    """The blocks at one resolution, then resampling. `resample` is "downsample", "upsample" or None."""

    numerics: Numerics
    features: int
    num_blocks: int
    attention: bool
    resample: str | None

    @nn.compact
    def __call__(self, x: jax.Array, zq: jax.Array | None = None) -> jax.Array:
        numerics = self.numerics
        for i in range(self.num_blocks):
            x = numerics.block(ResnetBlock)(numerics, self.features, name=f"block_{i}")(x, zq)
            if self.attention:
                x = numerics.block(AttentionBlock)(numerics, name=f"attn_{i}")(x, zq)
        if self.resample == "downsample":
            x = Downsample(numerics, name="downsample")(x)
        elif self.resample == "upsample":
            x = Upsample(numerics, name="upsample")(x)
        return x


def down_stages(config: VisionTokenizerConfig, numerics: Numerics) -> list[Stage]:
    """The stages of an encoder, from the highest resolution on."""
    last = len(config.channel_multipliers) - 1
    return [
        Stage(
            numerics,
            config.base_channels * multiplier,
            config.num_res_blocks,
            attention=i in config.attention_stages,
            resample="downsample" if i < last else None,
        )
        for i, multiplier in enumerate(config.channel_multipliers)
    ]


def up_stages(config: VisionTokenizerConfig, numerics: Numerics) -> list[Stage]:
    """The stages of a decoder, from the highest resolution on, which is the last one to run."""
    return [
        Stage(
            numerics,
            config.base_channels * multiplier,
            config.num_res_blocks + 1,
            attention=i in config.attention_stages,
            resample="upsample" if i > 0 else None,
        )
        for i, multiplier in enumerate(config.channel_multipliers)
    ]


class Middle(nn.Module):
    """Residual block, attention block, residual block at the lowest resolution. Keeps the shape [B, h, w, C]."""

    numerics: Numerics

    @nn.compact
    def __call__(self, x: jax.Array, zq: jax.Array | None = None) -> jax.Array:
        numerics, channels = self.numerics, x.shape[-1]
        x = numerics.block(ResnetBlock)(numerics, channels, name="block_1")(x, zq)
        x = numerics.block(AttentionBlock)(numerics, name="attn_1")(x, zq)
        return numerics.block(ResnetBlock)(numerics, channels, name="block_2")(x, zq)


def over_frames(network: Callable[..., jax.Array], module: nn.Module, pixels: int, *frames: jax.Array) -> jax.Array:
    """Applies `network(module, *frames)` to frames [N, ...] of `pixels` pixels each, in equal groups."""
    count = len(frames[0])
    limit = max(1, PIXELS_PER_STEP // pixels)
    group = max(d for d in range(1, min(limit, count) + 1) if count % d == 0)
    if group == count:
        return network(module, *frames)

    def step(
        module: nn.Module, carry: tuple[()], start: jax.Array, frames: tuple[jax.Array, ...]
    ) -> tuple[tuple[()], jax.Array]:
        # Dynamic slices, because XLA would copy the whole array for a reshape into groups.
        return carry, network(module, *(jax.lax.dynamic_slice_in_dim(f, start, group) for f in frames))

    loop = nn.scan(step, variable_broadcast="params", split_rngs={"params": False}, in_axes=(0, nn.broadcast))
    _, out = loop(module, (), jnp.arange(0, count, group), frames)
    return out.reshape(count, *out.shape[2:])

"""Building blocks of the vision tokenizer: convolutions, norms, residual and attention blocks.

Axes: B batch (in spatial blocks, all frames of all clips), T frames, H W rows and columns, C channels, S positions
(H times W), Q queries of one block. Layout is channels-last. By default everything is float32 at the highest matmul
precision, because single TF32 and bfloat16 passes change codes. `Numerics` changes this for training and for fast
decoding.

Parameter names follow upstream's PyTorch modules segment by segment. Logical axes of the weights: "conv_time",
"conv_rows", "conv_columns", "conv_in", "conv_out", and "channels" for vectors with one number per channel.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from emu3_jax.models.capability import takes_tf32
from emu3_jax.models.vision_bands import in_bands, over_bands

HIGHEST = jax.lax.Precision.HIGHEST
GROUPS = 32
GROUP_NORM_EPS = 1e-6
# Most attention scores in memory at once: 64 MiB in float32. A picture of up to 512x512 pixels is one block.
MAX_SCORES = 2**24

# [phase, pixel, tap]: which taps of a kernel of 3 fall on which of two neighbour pixels, for even and odd output rows.
_PHASES = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)

CONV_AXES = ("conv_time", "conv_rows", "conv_columns", "conv_in", "conv_out")
_conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # upstream's Kaiming initialisation
channels_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("channels",))
ones_init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("channels",))


@dataclasses.dataclass(frozen=True)
class Numerics:
    """Dtypes and precision of a module and its submodules. The defaults are for exact inference.

    Attributes:
        dtype: dtype of products and activations, or None for the dtype of the inputs. Norms and softmax are float32.
        precision: precision of float32 products.
        tf32_pairs: compute float32 convolutions at the highest precision by `convolve`, which is faster on GPUs with
            TF32.
        differentiated: use forms of convolutions whose gradients are fast, for training.
        remat: recompute the insides of residual and attention blocks in the backward pass.
    """

    dtype: jnp.dtype | None = None
    precision: jax.lax.Precision = HIGHEST
    tf32_pairs: bool = True
    differentiated: bool = False
    remat: bool = False

    @property
    def convolve(self) -> Callable[..., jax.Array]:
        """The convolution function: `convolve` with `tf32_pairs`, else `jax.lax.conv_general_dilated`."""
        return convolve if self.tf32_pairs else jax.lax.conv_general_dilated

    def block(self, kind: type[nn.Module]) -> type[nn.Module]:
        """The block class `kind`, wrapped in `nn.remat` if `remat` is set."""
        return nn.remat(kind) if self.remat else kind


def convolve(x: jax.Array, kernel: jax.Array, *args: Any, precision: jax.lax.Precision, **kwargs: Any) -> jax.Array:
    """`jax.lax.conv_general_dilated`, three times as fast for float32 at the highest precision on NVIDIA GPUs.

    On GPUs with TF32, each operand is split into a sum of two TF32 numbers. The matrix units compute three of the four
    products, with float32 sums. The omitted product of the two small parts is as small as a rounding to 23 bits. XLA
    can split matrix products this way, but not convolutions.
    """

    def product(x: jax.Array, kernel: jax.Array, precision: jax.lax.Precision = jax.lax.Precision.DEFAULT) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, *args, precision=precision, **kwargs)

    exact = precision == HIGHEST and x.dtype == kernel.dtype == jnp.float32
    if not exact or not takes_tf32():
        return product(x, kernel, precision)
    (high, low), (kernel_high, kernel_low) = _tf32_parts(x), _tf32_parts(kernel)
    # Barriers make the products run one after the other, smallest first, so that few large arrays exist at once.
    high, total = jax.lax.optimization_barrier((high, product(low, kernel_high)))
    high, total = jax.lax.optimization_barrier((high, total + product(high, kernel_low)))
    return total + product(high, kernel_high)


def _tf32_parts(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits x into two TF32 numbers (10 bits of mantissa each). Their sum equals x except in its last two bits."""
    high = jax.lax.reduce_precision(x, 8, 10)
    return high, jax.lax.reduce_precision(x - high, 8, 10)


def kernel_init(*axes: str) -> Callable[..., Any]:
    """Upstream's random initialisation, for a kernel with these logical axes."""
    return nn.with_logical_partitioning(_conv_init, axes)


def conv(
    numerics: Numerics,
    features: int,
    kernel: Sequence[int],
    padding: Sequence[tuple[int, int]],
    *,
    stride: Sequence[int] | None = None,
    name: str | None = None,
) -> nn.Conv:
    """A 2D or 3D convolution with bias. `kernel`, `padding` and `stride` have one entry per axis ([T,] H, W)."""
    return nn.Conv(
        features,
        tuple(kernel),
        strides=stride if stride is None else tuple(stride),
        padding=tuple(padding),
        kernel_init=kernel_init(*CONV_AXES[3 - len(kernel) :]),
        bias_init=channels_init,
        conv_general_dilated=numerics.convolve,
        dtype=numerics.dtype,
        precision=numerics.precision,
        name=name,
    )


def conv3x3(numerics: Numerics, features: int, name: str | None = None) -> nn.Conv:
    return conv(numerics, features, (3, 3), ((1, 1), (1, 1)), name=name)


def conv1x1(numerics: Numerics, features: int, name: str | None = None) -> nn.Conv:
    return conv(numerics, features, (1, 1), ((0, 0), (0, 0)), name=name)


def dense(numerics: Numerics, features: int, name: str | None = None) -> nn.Dense:
    return nn.Dense(
        features,
        kernel_init=kernel_init("conv_in", "conv_out"),
        bias_init=channels_init,
        dtype=numerics.dtype,
        precision=numerics.precision,
        name=name,
    )


def per_channel(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Reshapes [C] to [1, ..., 1, C], so that it broadcasts to x."""
    return jnp.expand_dims(vector, range(x.ndim - 1))


class GroupNorm(nn.Module):
    """Group normalisation of [B, H, W, C] over rows, columns and the channels of each of 32 groups."""

    @nn.compact
    def __call__(self, x: jax.Array, by_rows: bool = False) -> Any:
        """Normalises x. With `by_rows`, returns the function that normalises some rows of x as part of the whole."""
        channels = x.shape[-1]
        scale = self.param("scale", ones_init, (channels,), jnp.float32)
        bias = self.param("bias", channels_init, (channels,), jnp.float32)

        def group_mean(values: jax.Array) -> jax.Array:
            """Group means [B, 1, 1, C] of [B, H, W, C]. Reducing per channel first is fast on every backend."""
            per_channel = values.mean((1, 2))
            per_group = per_channel.reshape(len(values), GROUPS, -1).mean(-1)
            return jnp.repeat(per_group, channels // GROUPS, axis=-1)[:, None, None]

        dtype, whole = x.dtype, x.astype(jnp.float32)
        mean = group_mean(whole)
        variance = group_mean((whole - mean) ** 2)  # E[x^2] - E[x]^2 would lose digits by cancellation

        def normalise(rows: jax.Array, first: jax.Array | int) -> jax.Array:
            normed = (rows.astype(jnp.float32) - mean) * jax.lax.rsqrt(variance + GROUP_NORM_EPS)
            return (normed * per_channel(scale, x) + per_channel(bias, x)).astype(dtype)

        return normalise if by_rows else normalise(x, 0)


class SpatialNorm(nn.Module):
    """Group normalisation, then a gain and a shift per position, computed from codebook vectors (arXiv 2209.09002)."""

    numerics: Numerics

    @nn.compact
    def __call__(self, x: jax.Array, zq: jax.Array, by_rows: bool = False) -> Any:
        """Normalises x [B, H, W, C] with vectors zq [B, h, w, embed]; H and W are the same multiple of h and w.

        With `by_rows`, returns the function that normalises some rows of x, which all belong to one row of zq, or are
        all rows of some rows of zq.
        """
        b, height, width, channels = x.shape
        cells, columns = zq.shape[1:3]
        # Nearest up-sampling commutes with a 1x1 convolution. So the convolutions run on the small grid; their results
        # are broadcast.
        gain = conv1x1(self.numerics, channels, name="conv_y")(zq)[:, :, None, :, None]
        shift = conv1x1(self.numerics, channels, name="conv_b")(zq)[:, :, None, :, None]
        normalise_group = GroupNorm(name="norm_layer")(x, by_rows=True)

        def normalise(rows: jax.Array, first: jax.Array | int) -> jax.Array:
            of_cell = height // cells
            taken = -(-rows.shape[1] // of_cell)
            gains, shifts = (
                vectors if taken == cells else jax.lax.dynamic_slice_in_dim(vectors, first // of_cell, taken, axis=1)
                for vectors in (gain, shift)
            )
            x = normalise_group(rows, first).reshape(b, taken, -1, columns, width // columns, channels)
            return (x * gains + shifts).reshape(rows.shape)

        return normalise if by_rows else normalise(x, 0)


def norm(numerics: Numerics, name: str, x: jax.Array, zq: jax.Array | None, by_rows: bool = False) -> Any:
    """The norm of a block: `GroupNorm` in the encoder, `SpatialNorm` with codebook vectors `zq` in the decoder."""
    if zq is None:
        return GroupNorm(name=name)(x, by_rows)
    return SpatialNorm(numerics, name=name)(x, zq, by_rows)


def activated_conv3x3(
    numerics: Numerics, features: int, x: jax.Array, zq: jax.Array | None, names: tuple[str, str]
) -> jax.Array:
    """Norm, SiLU and 3x3 convolution of x [B, H, W, C], with the names of norm and convolution."""
    before, after = names
    if numerics.differentiated or not in_bands(x.shape, features):
        return conv3x3(numerics, features, name=after)(nn.silu(norm(numerics, before, x, zq)))
    normalise = norm(numerics, before, x, zq, by_rows=True)
    module = conv(numerics, features, (3, 3), ((0, 0), (1, 1)), name=after)
    cells = x.shape[1] if zq is None else zq.shape[1]
    return over_bands(
        nn.Conv.__call__, module, x, cells, features, activate=lambda rows, first: nn.silu(normalise(rows, first))
    )


class ResnetBlock(nn.Module):
    """A residual block of two 3x3 convolutions: [B, H, W, C] to [B, H, W, features]."""

    numerics: Numerics
    features: int

    @nn.compact
    def __call__(self, x: jax.Array, zq: jax.Array | None = None) -> jax.Array:
        numerics = self.numerics
        h = activated_conv3x3(numerics, self.features, x, zq, ("norm1", "conv1"))
        h = activated_conv3x3(numerics, self.features, h, zq, ("norm2", "conv2"))
        if x.shape[-1] != self.features:
            if numerics.tf32_pairs and takes_tf32():
                # The barrier delays the shortcut until h exists. Otherwise the TF32 parts of both convolutions would
                # exist at once, which would set the peak memory of large pictures.
                x, h = jax.lax.optimization_barrier((x, h))
            x = conv1x1(numerics, self.features, name="nin_shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """A residual block of one attention head over all positions of a picture. Keeps the shape [B, H, W, C]."""

    numerics: Numerics

    @nn.compact
    def __call__(self, x: jax.Array, zq: jax.Array | None = None) -> jax.Array:
        b, height, width, channels = x.shape
        x_bsc = norm(self.numerics, "norm", x, zq).reshape(b, height * width, channels)
        q, k, v = (dense(self.numerics, channels, name=name)(x_bsc) for name in ("q", "k", "v"))
        mixed = spatial_attention(q, k, v, self.numerics.precision)
        return x + dense(self.numerics, channels, name="proj_out")(mixed).reshape(x.shape)


def spatial_attention(q: jax.Array, k: jax.Array, v: jax.Array, precision: jax.lax.Precision = HIGHEST) -> jax.Array:
    """Exact softmax attention, computed in blocks of queries, so that the [S, S] scores never exist as a whole.

    Args:
        q, k, v: queries, keys and values [B, S, C].
        precision: precision of float32 products.

    Returns:
        [B, S, C].
    """
    b, positions, channels = q.shape

    def attend_block(q_bqc: jax.Array) -> jax.Array:
        scores_bqs = jnp.einsum("bqc,bsc->bqs", q_bqc, k, precision=precision, preferred_element_type=jnp.float32)
        weights = nn.softmax(scores_bqs * channels**-0.5).astype(v.dtype)
        return jnp.einsum("bqs,bsc->bqc", weights, v, precision=precision)

    blocks = -(-b * positions**2 // MAX_SCORES)
    if blocks == 1:
        return attend_block(q)
    size = -(-positions // blocks)
    q = jnp.pad(q, ((0, 0), (0, blocks * size - positions), (0, 0)))
    q_nbqc = q.reshape(b, blocks, size, channels).swapaxes(0, 1)
    out = jax.lax.map(attend_block, q_nbqc).swapaxes(0, 1)
    return out.reshape(b, blocks * size, channels)[:, :positions]


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2, padded only right and bottom: [B, H, W, C] to [B, H/2, W/2, C]."""

    numerics: Numerics

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return conv(self.numerics, x.shape[-1], (3, 3), ((0, 1), (0, 1)), stride=(2, 2), name="conv")(x)


class Upsample(nn.Module):
    """Nearest up-sampling, then a 3x3 convolution: [B, H, W, C] to [B, 2H, 2W, C]."""

    numerics: Numerics

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return UpsampleConv(self.numerics, name="conv")(x)


class UpsampleConv(nn.Module):
    """The 3x3 convolution of a picture up-sampled 2x2, computed without the up-sampled picture.

    Along each axis, the three taps fall on only two different pixels of the small picture. So each of the four output
    phases is a 2x2 convolution of the small picture with sums of taps: 16 multiplications instead of 36.
    """

    numerics: Numerics

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        _, height, width, channels = x.shape
        kernel = self.param("kernel", kernel_init(*CONV_AXES[1:]), (3, 3, channels, channels), jnp.float32)
        bias = self.param("bias", channels_init, (channels,), jnp.float32)
        taps = jnp.einsum("prk,qsl,klio->rsipqo", _PHASES, _PHASES, kernel, precision=HIGHEST)
        taps, precision = taps.reshape(2, 2, channels, 4 * channels).astype(x.dtype), self.numerics.precision
        if self.numerics.differentiated:
            # Four products, because XLA's CPU backend takes 40 times as long for the gradient of the convolution below.
            padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            out = sum(
                jnp.dot(padded[:, r : r + height + 1, s : s + width + 1], taps[r, s], precision=precision)
                for r in (0, 1)
                for s in (0, 1)
            )
            out = _interleaved(out)
        else:

            def upsample(rows: jax.Array, outside: int) -> jax.Array:
                """From rows, and so many rows of zeros above and below them."""
                out = self.numerics.convolve(
                    rows,
                    taps,
                    window_strides=(1, 1),
                    padding=((outside, outside), (1, 1)),
                    dimension_numbers=("NHWC", "HWIO", "NHWC"),
                    precision=precision,
                )
                return _interleaved(out)

            if in_bands(x.shape, 4 * channels):
                out = over_bands(
                    lambda _, rows: upsample(rows, 0), self, x, height, 4 * channels, activate=lambda rows, _: rows
                )
            else:
                out = upsample(x, 1)
        return out + per_channel(bias.astype(x.dtype), x)


def _interleaved(out: jax.Array) -> jax.Array:
    """Pixels [B, 2H, 2W, C] of the four phases [B, H + 1, W + 1, 4C] that `UpsampleConv` computes."""
    b, height, width = out.shape[0], out.shape[1] - 1, out.shape[2] - 1
    out = out.reshape(b, height + 1, width + 1, 2, 2, -1)
    # Row i of `out` saw pixels i - 1 and i. For pixel i, phase 0 needs row i of `out`, phase 1 needs row i + 1.
    rows = [jnp.stack([out[:, p : p + height, q : q + width, p, q] for q in (0, 1)], axis=3) for p in (0, 1)]
    return jnp.stack(rows, axis=2).reshape(b, 2 * height, 2 * width, -1)

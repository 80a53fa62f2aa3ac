"""Building blocks of the causal 3D VQ: convolutions, norms, residual and attention blocks.

Axes: B batch (the spatial blocks see the frames of clips here), T frames, H W rows and columns, C channels, S positions
(H times W), Q the queries of one block. Layout is channels-last. By default everything is float32 at the highest matmul
precision: single TF32 and bfloat16 passes change codes. `Numerics` says otherwise, for training and for fast decoding.

Parameter names follow upstream's PyTorch modules segment by segment. Logical axes of the weights: "conv_time",
"conv_rows", "conv_columns", "conv_in", "conv_out", and "channels" for what is per channel.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from emu3_jax.models.capability import takes_tf32

HIGHEST = jax.lax.Precision.HIGHEST
GROUPS = 32
GROUP_NORM_EPS = 1e-6
BATCH_NORM_EPS = 1e-5
# Attention scores held at once: 64 MiB of float32. Up to 512x512 pixels one picture is one block.
MAX_SCORES = 2**24

# [phase, pixel, tap]: which taps of a 3-kernel fall on which of two neighbours, for an even and an odd output row.
_PHASES = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)

_FRAMES_BEFORE = 2  # of zeros, before the first one of a causal convolution
PAST = "past"  # the collection of what causal convolutions see of the parts of a clip that came before

_CONV_AXES = ("conv_time", "conv_rows", "conv_columns", "conv_in", "conv_out")
_conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # upstream's Kaiming initialisation
_channels_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("channels",))
_ones_init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("channels",))


@dataclasses.dataclass(frozen=True)
class Numerics:
    """How a module computes; each hands it to the modules inside. The defaults are those of exact inference.

    Attributes:
        dtype: of the products and of what lies between them; norms and softmax stay float32. None: the inputs' own.
        precision: of float32 products.
        tf32_pairs: float32 convolutions at the highest precision go the fast way of `convolve`, on GPUs that have it.
        differentiated: convolutions take the form whose gradients are fast, for a backward pass.
        remat: the backward pass computes the insides of residual and attention blocks again.
    """

    dtype: jnp.dtype | None = None
    precision: jax.lax.Precision = HIGHEST
    tf32_pairs: bool = True
    differentiated: bool = False
    remat: bool = False

    @property
    def convolve(self) -> Callable[..., jax.Array]:
        """`jax.lax.conv_general_dilated`, or what stands in for it."""
        return convolve if self.tf32_pairs else jax.lax.conv_general_dilated

    def block(self, kind: type[nn.Module]) -> type[nn.Module]:
        """A kind of block, its insides computed again in the backward pass where that is asked for."""
        return nn.remat(kind) if self.remat else kind


def convolve(x: jax.Array, kernel: jax.Array, *args: Any, precision: jax.lax.Precision, **kwargs: Any) -> jax.Array:
    """`jax.lax.conv_general_dilated`, but three times as fast in float32 at the highest precision on NVIDIA GPUs.

    There each operand is the sum of two TF32 numbers, and the matrix units take all products but the smallest, whose
    share is that of a rounding to 23 bits; sums are float32. XLA splits products so on request, convolutions not.
    """

    def product(x: jax.Array, kernel: jax.Array, precision: jax.lax.Precision = jax.lax.Precision.DEFAULT) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, *args, precision=precision, **kwargs)

    exact = precision == HIGHEST and x.dtype == kernel.dtype == jnp.float32
    if not exact or not takes_tf32():
        return product(x, kernel, precision)
    (high, low), (kernel_high, kernel_low) = _tf32_parts(x), _tf32_parts(kernel)
    # One after the other, the smallest first: no more of these large arrays exist at once than must.
    high, total = jax.lax.optimization_barrier((high, product(low, kernel_high)))
    high, total = jax.lax.optimization_barrier((high, total + product(high, kernel_low)))
    return total + product(high, kernel_high)


def _tf32_parts(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two TF32 numbers (10 bits of mantissa) whose sum is x but for the last two of its 24 bits."""
    high = jax.lax.reduce_precision(x, 8, 10)
    return high, jax.lax.reduce_precision(x - high, 8, 10)


def kernel_init(*axes: str) -> Callable[..., Any]:
    """Upstream's initialisation of a kernel with these logical axes."""
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
    """A 2D or 3D convolution with bias: `kernel`, `padding` and `stride` per axis ([T,] H, W)."""
    return nn.Conv(
        features,
        tuple(kernel),
        strides=stride if stride is None else tuple(stride),
        padding=tuple(padding),
        kernel_init=kernel_init(*_CONV_AXES[3 - len(kernel) :]),
        bias_init=_channels_init,
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
        bias_init=_channels_init,
        dtype=numerics.dtype,
        precision=numerics.precision,
        name=name,
    )


def per_channel(vector: jax.Array, x: jax.Array) -> jax.Array:
    """[C] as [1, ..., 1, C], to be broadcast to x."""
    return jnp.expand_dims(vector, range(x.ndim - 1))


class GroupNorm(nn.Module):
    """Group normalisation over rows, columns and the channels of each of 32 groups. [B, H, W, C] to the same."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        scale = self.param("scale", _ones_init, (channels,), jnp.float32)
        bias = self.param("bias", _channels_init, (channels,), jnp.float32)

        def group_mean(values: jax.Array) -> jax.Array:
            """[B, H, W, C] to [B, 1, 1, C]; per channel first, a fast reduction on every backend."""
            per_channel = values.mean((1, 2))
            per_group = per_channel.reshape(len(values), GROUPS, -1).mean(-1)
            return jnp.repeat(per_group, channels // GROUPS, axis=-1)[:, None, None]

        dtype, x = x.dtype, x.astype(jnp.float32)
        centred = x - group_mean(x)
        variance = group_mean(centred**2)  # of the centred values: E[x^2] - E[x]^2 cancels
        normed = centred * jax.lax.rsqrt(variance + GROUP_NORM_EPS)
        return (normed * per_channel(scale, x) + per_channel(bias, x)).astype(dtype)


class SpatialNorm(nn.Module):
    """Group normalisation, then a gain and a shift per position from the codebook vectors (MoVQ, arXiv 2209.09002)."""

    numerics: Numerics

    @nn.compact
    def __call__(self, x: jax.Array, zq: jax.Array) -> jax.Array:
        """x [B, H, W, C], zq [B, h, w, embed] with H a multiple of h and W the same multiple of w."""
        b, height, width, channels = x.shape
        rows, columns = zq.shape[1:3]
        # Nearest up-sampling commutes with a 1x1 convolution, so both run on the small grid and are broadcast.
        gain = conv1x1(self.numerics, channels, name="conv_y")(zq)[:, :, None, :, None]
        shift = conv1x1(self.numerics, channels, name="conv_b")(zq)[:, :, None, :, None]
        x = GroupNorm(name="norm_layer")(x)
        cells = x.reshape(b, rows, height // rows, columns, width // columns, channels)
        return (cells * gain + shift).reshape(x.shape)


class BatchNorm(nn.Module):
    """Batch normalisation. The stored statistics are parameters like any other."""

    @nn.compact
    def __call__(self, x: jax.Array, batch_statistics: jax.Array | None = None) -> jax.Array:
        """[..., C] to the same.

        Args:
            x: over all but the last axis it is normalised.
            batch_statistics: float32 scalar from 0 to 1: how far the batch's statistics replace the stored ones. The
                batch's are sown into the collection "statistics". None, as at inference: the stored ones alone.
        """
        shape = (x.shape[-1],)
        scale = self.param("scale", _ones_init, shape, jnp.float32)
        bias = self.param("bias", _channels_init, shape, jnp.float32)
        mean = self.param("mean", _channels_init, shape, jnp.float32)
        var = self.param("var", _ones_init, shape, jnp.float32)
        dtype, x = x.dtype, x.astype(jnp.float32)
        if batch_statistics is not None:
            axes = tuple(range(x.ndim - 1))
            batch_mean, batch_var = x.mean(axes), x.var(axes)
            self.sow("statistics", "mean", batch_mean)
            self.sow("statistics", "var", batch_var)
            self.sow("statistics", "count", x.size // x.shape[-1])
            mean = batch_statistics * batch_mean + (1 - batch_statistics) * jax.lax.stop_gradient(mean)
            var = batch_statistics * batch_var + (1 - batch_statistics) * jax.lax.stop_gradient(var)
        normed = (x - per_channel(mean, x)) * per_channel(jax.lax.rsqrt(var + BATCH_NORM_EPS), x)
        return (normed * per_channel(scale, x) + per_channel(bias, x)).astype(dtype)


def norm(numerics: Numerics, name: str, x: jax.Array, zq: jax.Array | None) -> jax.Array:
    """The encoder normalises by groups; the decoder, which has codebook vectors `zq`, by groups and position."""
    return GroupNorm(name=name)(x) if zq is None else SpatialNorm(numerics, name=name)(x, zq)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut. [B, H, W, C] to [B, H, W, features]."""

    numerics: Numerics
    features: int

    @nn.compact
    def __call__(self, x: jax.Array, zq: jax.Array | None = None) -> jax.Array:
        numerics = self.numerics
        h = conv3x3(numerics, self.features, name="conv1")(nn.silu(norm(numerics, "norm1", x, zq)))
        h = conv3x3(numerics, self.features, name="conv2")(nn.silu(norm(numerics, "norm2", h, zq)))
        if x.shape[-1] != self.features:
            if numerics.tf32_pairs and takes_tf32():
                # Not before h is there: the TF32 parts of both, of a large picture, would be the most that ever exists.
                x, h = jax.lax.optimization_barrier((x, h))
            x = conv1x1(numerics, self.features, name="nin_shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """One head of attention over all positions of a picture, around a shortcut. [B, H, W, C] to the same."""

    numerics: Numerics

    @nn.compact
    def __call__(self, x: jax.Array, zq: jax.Array | None = None) -> jax.Array:
        b, height, width, channels = x.shape
        x_bsc = norm(self.numerics, "norm", x, zq).reshape(b, height * width, channels)
        q, k, v = (dense(self.numerics, channels, name=name)(x_bsc) for name in ("q", "k", "v"))
        mixed = spatial_attention(q, k, v, self.numerics.precision)
        return x + dense(self.numerics, channels, name="proj_out")(mixed).reshape(x.shape)


def spatial_attention(q: jax.Array, k: jax.Array, v: jax.Array, precision: jax.lax.Precision = HIGHEST) -> jax.Array:
    """Softmax attention, exact, over blocks of queries: the [S, S] scores of a large picture never exist whole.

    Args:
        q, k, v: [B, S, C].
        precision: of float32 products.

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
    """A strided 3x3 convolution, padded right and bottom only. [B, H, W, C] to [B, H/2, W/2, C]."""

    numerics: Numerics

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return conv(self.numerics, x.shape[-1], (3, 3), ((0, 1), (0, 1)), stride=(2, 2), name="conv")(x)


class Upsample(nn.Module):
    """Nearest up-sampling and a 3x3 convolution. [B, H, W, C] to [B, 2H, 2W, C]."""

    numerics: Numerics

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return UpsampleConv(self.numerics, name="conv")(x)


class UpsampleConv(nn.Module):
    """The 3x3 convolution of a picture whose every pixel is repeated 2x2, without making that picture.

    Along each axis the three taps fall on two different pixels, so the four output phases are 2x2 convolutions of the
    small picture by sums of taps: 16 multiplications in place of 36.
    """

    numerics: Numerics

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, height, width, channels = x.shape
        kernel = self.param("kernel", kernel_init(*_CONV_AXES[1:]), (3, 3, channels, channels), jnp.float32)
        bias = self.param("bias", _channels_init, (channels,), jnp.float32)
        taps = jnp.einsum("prk,qsl,klio->rsipqo", _PHASES, _PHASES, kernel, precision=HIGHEST)
        taps, precision = taps.reshape(2, 2, channels, 4 * channels).astype(x.dtype), self.numerics.precision
        if self.numerics.differentiated:
            # Four products: XLA's CPU backend takes 40 times as long for the gradient of the convolution below.
            padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            out = sum(
                jnp.dot(padded[:, r : r + height + 1, s : s + width + 1], taps[r, s], precision=precision)
                for r in (0, 1)
                for s in (0, 1)
            )
        else:
            out = self.numerics.convolve(
                x,
                taps,
                window_strides=(1, 1),
                padding=((1, 1), (1, 1)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                precision=precision,
            )
        out = out.reshape(b, height + 1, width + 1, 2, 2, channels)
        # Output (i, j) saw pixels i - 1 and i: where phase 0 of i looks, and phase 1 of i - 1.
        rows = [jnp.stack([out[:, p : p + height, q : q + width, p, q] for q in (0, 1)], axis=3) for p in (0, 1)]
        out = jnp.stack(rows, axis=2).reshape(b, 2 * height, 2 * width, channels)
        return out + per_channel(bias.astype(x.dtype), x)


class CausalConv3d(nn.Module):
    """A 3D convolution that sees no later frame. [B, T, H, W, C] to [B, T', H, W, features].

    Two frames of zeros go before the first, also where the kernel is four long, as in upstream. Where the collection
    "past" is mutable, the last two frames of the call before take their place: a clip may come in parts.
    """

    numerics: Numerics
    features: int
    kernel: tuple[int, int, int] = (3, 1, 1)
    stride: int = 1  # in time

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        padding = ((_FRAMES_BEFORE, 0), *((k // 2, k // 2) for k in self.kernel[1:]))
        if self.is_mutable_collection(PAST):
            b, _, *rest = x.shape
            past = self.variable(PAST, "frames", jnp.zeros, (b, _FRAMES_BEFORE, *rest), x.dtype)
            x = jnp.concatenate([past.value, x], axis=1)
            past.value = x[:, -_FRAMES_BEFORE:]
            padding = ((0, 0), *padding[1:])
        elif self.numerics.differentiated:
            return FoldedConv3d(self.numerics, self.features, self.kernel, self.stride, name="conv")(x)
        stride = (self.stride, 1, 1)
        return conv(self.numerics, self.features, self.kernel, padding, stride=stride, name="conv")(x)


class FoldedConv3d(nn.Module):
    """`CausalConv3d`'s convolution as one in two dimensions that has all frames' channels side by side.

    It multiplies with zeros where a frame does not see another, for one 2D convolution of more channels: few kernels
    are made for 3D ones of so few. What that gains in a training step was not measured by itself.
    """

    numerics: Numerics
    features: int
    kernel: tuple[int, int, int]
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        numerics = self.numerics
        x = x if numerics.dtype is None else x.astype(numerics.dtype)
        b, frames, height, width, channels = x.shape
        taps, *window = self.kernel
        shape = (*self.kernel, channels, self.features)
        kernel = self.param("kernel", kernel_init(*_CONV_AXES), shape, jnp.float32)
        bias = self.param("bias", _channels_init, (self.features,), jnp.float32)
        outputs = (frames + _FRAMES_BEFORE - taps) // self.stride + 1
        # [frame, tap, output frame]: which frame a tap of an output frame falls on
        sees = np.arange(taps)[:, None] + self.stride * np.arange(outputs) - _FRAMES_BEFORE
        falls = (np.arange(frames)[:, None, None] == sees).astype(np.float32)
        folded = jnp.einsum("fto,trsck->rsfcok", falls, kernel, precision=HIGHEST).astype(x.dtype)
        out = numerics.convolve(
            x.transpose(0, 2, 3, 1, 4).reshape(b, height, width, frames * channels),
            folded.reshape(*window, frames * channels, outputs * self.features),
            window_strides=(1, 1),
            padding=tuple((k // 2, k // 2) for k in window),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=numerics.precision,
        ).reshape(b, height, width, outputs, self.features)
        return out.transpose(0, 3, 1, 2, 4) + per_channel(bias.astype(x.dtype), x)


class TemporalDownsample(nn.Module):
    """Halves the frames. [B, T, H, W, C] to [B, T/2, H, W, C]."""

    numerics: Numerics

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return CausalConv3d(self.numerics, x.shape[-1], (4, 3, 3), stride=2, name="conv")(x)


class TemporalUpsample(nn.Module):
    """Repeats each frame, then a causal convolution. [B, T, H, W, C] to [B, 2T, H, W, C]."""

    numerics: Numerics

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return CausalConv3d(self.numerics, x.shape[-1], (3, 3, 3), name="conv")(x.repeat(2, axis=1))


class TemporalResnetBlock(nn.Module):
    """Two causal 3x3x3 convolutions around a shortcut. [B, T, H, W, C] to the same."""

    numerics: Numerics

    @nn.compact
    def __call__(self, x: jax.Array, batch_statistics: jax.Array | None = None) -> jax.Array:
        """`batch_statistics`: see `BatchNorm`."""
        h = x
        for number in (1, 2):
            h = nn.silu(BatchNorm(name=f"norm{number}")(h, batch_statistics))
            h = CausalConv3d(self.numerics, x.shape[-1], (3, 3, 3), name=f"conv{number}")(h)
        return x + h

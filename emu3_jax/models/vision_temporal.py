"""Layers of the vision tokenizer that look along time: causal convolutions, and the blocks made of them.

Axes: B batch, T frames, H W rows and columns, C channels. `vision_layers` explains dtypes, names and logical axes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from emu3_jax.models.vision_layers import (
    CONV_AXES,
    HIGHEST,
    Numerics,
    channels_init,
    conv,
    kernel_init,
    ones_init,
    per_channel,
)

BATCH_NORM_EPS = 1e-5

_FRAMES_BEFORE = 2  # frames of zeros before the first frame of a causal convolution
PAST = "past"  # Flax collection: the last frames of the previous part of a clip, one array per causal convolution


class BatchNorm(nn.Module):
    """Batch normalisation. The stored statistics are ordinary parameters."""

    @nn.compact
    def __call__(self, x: jax.Array, batch_statistics: jax.Array | None = None) -> jax.Array:
        """Normalises x over all axes but the last.

        Args:
            x: [..., C].
            batch_statistics: float32 scalar from 0 to 1, the weight of the batch's statistics against the stored ones.
                The batch's statistics are also sown into the collection "statistics". None (inference): use only the
                stored statistics.

        Returns:
            [..., C] in the dtype of x.
        """
        shape = (x.shape[-1],)
        scale = self.param("scale", ones_init, shape, jnp.float32)
        bias = self.param("bias", channels_init, shape, jnp.float32)
        mean = self.param("mean", channels_init, shape, jnp.float32)
        var = self.param("var", ones_init, shape, jnp.float32)
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


class CausalConv3d(nn.Module):
    """A 3D convolution that never uses later frames: [B, T, H, W, C] to [B, T', H, W, features].

    As in upstream, two frames of zeros precede the first frame, even if the kernel is four frames long. If the
    collection "past" is mutable, the last two frames of the previous call replace the zeros, so a clip may come in
    parts.
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
    """The convolution of `CausalConv3d` as one 2D convolution, with the channels of all frames side by side.

    It multiplies with zeros where an output frame does not depend on an input frame. In return it is one 2D convolution
    with many channels; libraries have few fast kernels for 3D convolutions with few channels. The gain in a training
    step was not measured separately.
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
        kernel = self.param("kernel", kernel_init(*CONV_AXES), shape, jnp.float32)
        bias = self.param("bias", channels_init, (self.features,), jnp.float32)
        outputs = (frames + _FRAMES_BEFORE - taps) // self.stride + 1
        # `falls` [frame, tap, output frame] is 1 if the tap of an output frame falls on the frame.
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
    """Halves the number of frames: [B, T, H, W, C] to [B, T/2, H, W, C]."""

    numerics: Numerics

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return CausalConv3d(self.numerics, x.shape[-1], (4, 3, 3), stride=2, name="conv")(x)


class TemporalUpsample(nn.Module):
    """Repeats each frame, then applies a causal convolution: [B, T, H, W, C] to [B, 2T, H, W, C]."""

    numerics: Numerics

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return CausalConv3d(self.numerics, x.shape[-1], (3, 3, 3), name="conv")(x.repeat(2, axis=1))


class TemporalResnetBlock(nn.Module):
    """A residual block of two causal 3x3x3 convolutions. Keeps the shape [B, T, H, W, C]."""

    numerics: Numerics

    @nn.compact
    def __call__(self, x: jax.Array, batch_statistics: jax.Array | None = None) -> jax.Array:
        """For `batch_statistics` see `BatchNorm`."""
        h = x
        for number in (1, 2):
            h = nn.silu(BatchNorm(name=f"norm{number}")(h, batch_statistics))
            h = CausalConv3d(self.numerics, x.shape[-1], (3, 3, 3), name=f"conv{number}")(h)
        return x + h

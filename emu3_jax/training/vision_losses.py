"""Losses of the vision tokenizer: SSIM, PSNR, and the discriminator with its hinge loss.

B batch (pictures and frames of clips), H W rows and columns, C channels.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from emu3_jax.models.vision_layers import Numerics, conv

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


def structural_similarity(a: jax.Array, b: jax.Array) -> jax.Array:
    """Mean SSIM of pictures [B, H, W, C] in -1..1 (Wang et al. 2004), a scalar over all pictures and channels.

    The Gaussian windows are 11 pixels wide with sigma 1.5. They lie inside the picture, so H and W must be at least 11.
    """
    a, b = (a + 1) / 2, (b + 1) / 2
    maps = jnp.concatenate([a, b, a * a, b * b, a * b], axis=-1)
    # Products with banded matrices, because gradients of depthwise convolutions are slow. Highest precision, because
    # variances are differences of nearly equal numbers.
    maps = jnp.einsum("bhwc,hi->biwc", maps, _windows(a.shape[1]), precision=jax.lax.Precision.HIGHEST)
    maps = jnp.einsum("bhwc,wj->bhjc", maps, _windows(a.shape[2]), precision=jax.lax.Precision.HIGHEST)
    mean_a, mean_b, square_a, square_b, product = jnp.split(maps, 5, axis=-1)
    var_a, var_b, both = square_a - mean_a**2, square_b - mean_b**2, product - mean_a * mean_b
    similar = (2 * mean_a * mean_b + _C1) * (2 * both + _C2)
    return jnp.mean(similar / ((mean_a**2 + mean_b**2 + _C1) * (var_a + var_b + _C2)))


def _windows(side: int) -> np.ndarray:
    """float32 [side, side - 10]: column i holds the Gaussian weights of window i."""
    taps = np.exp(-((np.arange(_WINDOW) - _WINDOW // 2) ** 2) / (2 * _SIGMA**2))
    windows = np.zeros((side, side - _WINDOW + 1), np.float32)
    for index in range(windows.shape[1]):
        windows[index : index + _WINDOW, index] = taps / taps.sum()
    return windows


def peak_signal_to_noise(a: jax.Array, b: jax.Array) -> jax.Array:
    """PSNR in dB of each picture: [B] from [B, H, W, C] in -1..1. Pixels are first rounded to 8 bits, as in files."""
    a, b = (jnp.round(jnp.clip((x + 1) / 2, 0, 1) * 255) for x in (a, b))
    error = jnp.mean((a - b) ** 2, axis=(1, 2, 3))
    return 10 * jnp.log10(255.0**2 / jnp.maximum(error, 1e-10))


class Discriminator(nn.Module):
    """PatchGAN discriminator (arXiv 1611.07004): [B, H, W, 3] to float32 [B, h, w, 1], one logit per patch."""

    numerics: Numerics
    width: int = 64
    layers: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for number in range(self.layers):
            features, padding = self.width << number, ((1, 1), (1, 1))
            x = conv(self.numerics, features, (4, 4), padding, stride=(2, 2), name=f"conv_{number}")(x)
            if number:
                x = nn.GroupNorm(32, dtype=jnp.float32, name=f"norm_{number}")(x)
            x = nn.leaky_relu(x, 0.2)
        return conv(self.numerics, 1, (4, 4), ((1, 1), (1, 1)), name="conv_out")(x).astype(jnp.float32)


def hinge(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Hinge loss of the discriminator, a scalar, from its logits for real and for reconstructed pictures."""
    return 0.5 * (nn.relu(1 - real).mean() + nn.relu(1 + fake).mean())

"""Convolutions of large pictures in bands of rows, so that a TPU holds few arrays of the picture's size.

XLA for TPUs computes exact float32 products from bfloat16 parts, and keeps these parts, the normalised picture and its
activation in HBM. In bands, only the picture and the result are whole. The results are those of the whole picture.

Axes: B batch, H W rows and columns of pixels, C channels, R rows of a band.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from emu3_jax.models.capability import target_platform

WHOLE_BYTES = 2**27  # of float32 activations: larger pictures are computed in bands on TPUs
BAND_BYTES = 2**26  # most bytes of a band's float32 activations

OfRows = Callable[[jax.Array, jax.Array | int], jax.Array]


def in_bands(shape: tuple[int, ...], features: int) -> bool:
    """Whether a convolution from x [B, H, W, C] to `features` channels is computed in bands."""
    b, height, width, channels = shape
    return target_platform() == "tpu" and 4 * b * height * width * max(channels, features) > WHOLE_BYTES


def over_bands(
    network: Callable[..., jax.Array], module: nn.Module, x: jax.Array, cells: int, features: int, *, activate: OfRows
) -> jax.Array:
    """Applies a convolution that looks one row up and down to activated rows of x, band by band.

    Args:
        network: called with `module` and the activated rows [B, R + 2, W, C] of a band, with the row above it and the
            row below it. Returns the band's result [B, R', W', C'].
        module: holds the parameters of `network`.
        x: [B, H, W, C].
        cells: H is a multiple of it, and each band has rows of whole cells of H / cells rows.
        features: channels of the result.
        activate: from rows of x and the number of the first one to activated rows of the same shape; rows of one cell,
            or of whole cells. Above and below the picture lie zeros.

    Returns:
        [B, H R' / R, W', C'].
    """
    b, height, width, channels = x.shape
    rows = _band_rows(height, cells, 4 * b * width * max(channels, features))

    def taken(first: jax.Array, count: int) -> jax.Array:
        return activate(lax.dynamic_slice_in_dim(x, first, count, axis=1), first)

    def band(module: nn.Module, carry: tuple[()], first: jax.Array) -> tuple[tuple[()], jax.Array]:
        above = jnp.where(first > 0, taken(jnp.maximum(first - 1, 0), 1), 0)
        below = jnp.where(first + rows < height, taken(jnp.minimum(first + rows, height - 1), 1), 0)
        return carry, network(module, jnp.concatenate([above, taken(first, rows), below], axis=1))

    loop = nn.scan(band, variable_broadcast="params", split_rngs={"params": False})
    _, found = loop(module, (), jnp.arange(0, height, rows))
    found = jnp.moveaxis(found, 0, 1)  # [B, bands, R', W', C']
    return found.reshape(b, -1, *found.shape[3:])


def _band_rows(height: int, cells: int, bytes_of_row: int) -> int:
    """The largest number of rows of a band that has whole cells and divides the picture."""
    cell = height // cells
    fitting = [n for n in range(1, cells + 1) if cells % n == 0 and n * cell * bytes_of_row <= BAND_BYTES]
    return max(fitting, default=1) * cell

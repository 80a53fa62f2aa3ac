"""Narrow weights and a narrow KV cache for decoding, which is as fast as memory is read.

Symmetric, one scale for each output channel of a matrix, one for each key and each value of a head; scales multiply
products, so that no wide copy of a weight or of the cache exists. A matrix M of the parameters becomes `M_codes`, its
output axes first, so that what a product adds up lies together, and `M_scales`; the decoder multiplies with whichever
it is given. The token table and the norms stay as they are.

A module of our own rather than `qwix`, whose quantised weights cannot be reshaped on the way to a product, as `out` is.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from emu3_jax.errors import Emu3Error
from emu3_jax.models.adapters import MATRICES

# What `--quantize` names: the weights' dtype, and whether the cache is int8.
KINDS: dict[str, tuple[jnp.dtype, bool]] = {
    "int8": (jnp.dtype(jnp.int8), True),
    "int8-weights": (jnp.dtype(jnp.int8), False),
    "fp8": (jnp.dtype(jnp.float8_e4m3fn), True),
}
CODES, SCALES = "_codes", "_scales"
_HEAD = "kernel"  # [V, D]: its output channels come first


def check_kind(kind: str | None) -> None:
    """Raises `Emu3Error` unless `kind` is None or one of `KINDS`."""
    if kind is not None and kind not in KINDS:
        raise Emu3Error(f"quantize is {kind!r}: it must be one of {', '.join(KINDS)}, or left out")


def is_quantised(path: tuple[str, ...]) -> bool:
    """Whether the parameter at this path is a matrix that becomes codes and scales."""
    return path[-1] in MATRICES or path[-2:] == ("head", _HEAD)


@functools.partial(jax.jit, static_argnames=("name", "kind"))
def quantise(name: str, matrix: jax.Array, kind: str) -> dict[str, jax.Array]:
    """The matrix as codes and scales, in float32 arithmetic.

    Args:
        name: of its leaf.
        matrix: [in..., out...], or [V, D] of the head.
        kind: of `KINDS`.

    Returns:
        `{name}_codes` [out..., in...], and `{name}_scales`, float32 [out...].
    """
    inputs = 0 if name == _HEAD else MATRICES[name].inputs
    matrix = jnp.moveaxis(matrix.astype(jnp.float32), range(inputs), range(-inputs, 0))
    axes = tuple(range(1 if name == _HEAD else MATRICES[name].outputs, matrix.ndim))
    codes, scales = _narrow(matrix, axes, KINDS[kind][0])
    return {name + CODES: codes, name + SCALES: scales}


def quantise_params(params: Any, kind: str) -> Any:
    """All parameters of a decoder (one subtree per layer), its matrices quantised."""

    def walk(tree: Any, path: tuple[str, ...]) -> dict[str, Any]:
        new: dict[str, Any] = {}
        for name, value in tree.items():
            here = (*path, name)
            if isinstance(value, dict):
                new[name] = walk(value, here)
            elif is_quantised(here):
                new |= quantise(name, value, kind)
            else:
                new[name] = value
        return new

    return walk(params, ())


def narrow_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys or values [..., H] for the cache: int8 codes of the same shape, and float32 scales [...]."""
    return _narrow(x.astype(jnp.float32), (x.ndim - 1,), jnp.dtype(jnp.int8))


def _narrow(x: jax.Array, axes: tuple[int, ...], dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    whole = jnp.issubdtype(dtype, jnp.integer)
    largest = float(jnp.iinfo(dtype).max if whole else jnp.finfo(dtype).max)
    scales = jnp.max(jnp.abs(x), axis=axes, keepdims=True) / largest
    unit = x / jnp.where(scales == 0, 1.0, scales)
    # Divisions round: without the clip the largest could come out as infinity in a float format.
    unit = jnp.clip(jnp.round(unit) if whole else unit, -largest, largest)
    return unit.astype(dtype), scales.squeeze(axes)

"""8-bit weights and an 8-bit KV cache for decoding. Decoding is limited by reading memory, so 8 bits make it faster.

Quantisation is symmetric. Each output channel of a matrix has a scale, and each key and each value of a head has one.
Scales multiply the products, so no full copy of a weight or of the cache exists. A matrix M of the parameters becomes
`M_codes` and `M_scales`. The codes have the output axes first, so that the numbers of one sum are contiguous. The
decoder uses whichever form it is given. The token table and the norms are not quantised.

We do not use `qwix`, because its quantised weights cannot be reshaped before a product, as `out` is.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from emu3_jax.errors import Emu3Error
from emu3_jax.models.adapters import MATRICES
from emu3_jax.models.stacking import Path

# The kinds of quantisation: the dtype of the weights, and whether the KV cache is int8.
KINDS: dict[str, tuple[jnp.dtype, bool]] = {
    "int8": (jnp.dtype(jnp.int8), True),
    "int8-weights": (jnp.dtype(jnp.int8), False),
    "fp8": (jnp.dtype(jnp.float8_e4m3fn), True),
}
CODES, SCALES = "_codes", "_scales"
_HEAD = "kernel"  # leaf of the head, [V, D]; its output axis comes first


def check_kind(kind: str | None) -> None:
    """Raises `Emu3Error` unless `kind` is None or one of `KINDS`."""
    if kind is not None and kind not in KINDS:
        raise Emu3Error(f"quantize is {kind!r}: it must be one of {', '.join(KINDS)}, or left out")


def narrows_cache(kind: str | None) -> bool:
    """Whether this kind of quantisation stores keys and values as int8."""
    return kind is not None and KINDS[kind][1]


def is_quantised(path: Path) -> bool:
    """Whether the parameter at this path is a matrix that quantisation turns into codes and scales."""
    return path[-1] in MATRICES or path[-2:] == ("head", _HEAD)


def is_codes_or_scales(path: Path) -> bool:
    """Whether this path, in quantised parameters, holds codes or scales."""
    return path[-1].endswith((CODES, SCALES))


@functools.partial(jax.jit, static_argnames=("name", "kind"))
def quantise(name: str, matrix: jax.Array, kind: str) -> dict[str, jax.Array]:
    """Quantises a matrix, in float32 arithmetic.

    Args:
        name: name of the matrix's leaf.
        matrix: [in..., out...], or [V, D] for the head.
        kind: kind of quantisation, from `KINDS`.

    Returns:
        `{name}_codes` [out..., in...], and `{name}_scales`, float32 [out...].
    """
    outputs, inputs = _axes(name)
    matrix = jnp.transpose(matrix.astype(jnp.float32), outputs + inputs)
    codes, scales = _narrow(matrix, tuple(range(len(outputs), matrix.ndim)), KINDS[kind][0])
    return {name + CODES: codes, name + SCALES: scales}


def dequantise(name: str, codes: Any, scales: Any) -> Any:
    """The matrix that codes and scales stand for, in float32: the inverse of `quantise`, but for its rounding.

    Args:
        name: name of the matrix's leaf.
        codes: [out..., in...], of NumPy or JAX.
        scales: float32 [out...], likewise.

    Returns:
        float32 [in..., out...], or [V, D] for the head.
    """
    outputs, inputs = _axes(name)
    wide = codes.astype(np.float32) * scales.reshape(*scales.shape, *(1,) * len(inputs))
    return wide.transpose(tuple((outputs + inputs).index(axis) for axis in range(wide.ndim)))


def _axes(name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The output axes and the input axes of the matrix `name`."""
    if name == _HEAD:
        return (0,), (1,)
    inputs, outputs = MATRICES[name].inputs, MATRICES[name].outputs
    return tuple(range(inputs, inputs + outputs)), tuple(range(inputs))


def first_output_axis(path: Path) -> int:
    """The axis of the matrix at `path` that comes first in its codes. Slices along it can be quantised separately."""
    return _axes(path[-1])[0][0]


def codes_and_scales(path: Path, array: jax.Array, kind: str | None) -> dict[Path, jax.Array]:
    """Quantises a parameter if it is a matrix. Other parameters, and all with kind None, are returned unchanged.

    Codes and scales are sharded like the matrix. They are ready when this returns, so that the matrix can be freed.
    """
    if kind is None or not is_quantised(path):
        return {path: array}
    leaves = {(*path[:-1], name): leaf for name, leaf in quantise(path[-1], array, kind).items()}
    places = codes_and_scales_shardings(path, array.sharding)
    return {leaf: jax.block_until_ready(jax.device_put(value, places[leaf])) for leaf, value in leaves.items()}


def codes_and_scales_shapes(path: Path, shape: tuple[int, ...], kind: str) -> dict[Path, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the codes and scales of the matrix at `path`, by path."""
    outputs, inputs = _axes(path[-1])
    codes, scales = (tuple(shape[axis] for axis in axes) for axes in (outputs + inputs, outputs))
    shapes = jax.ShapeDtypeStruct(codes, KINDS[kind][0]), jax.ShapeDtypeStruct(scales, jnp.float32)
    return dict(zip(codes_and_scales_paths(path), shapes, strict=True))


def codes_and_scales_shardings(path: Path, sharding: Sharding) -> dict[Path, Sharding]:
    """The shardings of the codes and scales of the matrix at `path`, from the matrix's sharding."""
    codes = scales = sharding
    if isinstance(sharding, NamedSharding):
        outputs, inputs = _axes(path[-1])
        split = (*sharding.spec, *(None,) * (len(outputs + inputs) - len(sharding.spec)))
        codes, scales = (
            NamedSharding(sharding.mesh, PartitionSpec(*(split[axis] for axis in axes)))
            for axes in (outputs + inputs, outputs)
        )
    return dict(zip(codes_and_scales_paths(path), (codes, scales), strict=True))


def codes_and_scales_paths(path: Path) -> tuple[Path, Path]:
    """The paths of the codes and of the scales of the matrix at `path`."""
    *parent, name = path
    return (*parent, name + CODES), (*parent, name + SCALES)


def quantise_params(params: Any, kind: str) -> Any:
    """Quantises all matrices of a decoder's parameters (with one subtree per layer)."""

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
    """Quantises keys or values [..., H] for the cache: int8 codes [..., H], and float32 scales [...]."""
    return _narrow(x.astype(jnp.float32), (x.ndim - 1,), jnp.dtype(jnp.int8))


def _narrow(x: jax.Array, axes: tuple[int, ...], dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    whole = jnp.issubdtype(dtype, jnp.integer)
    largest = float(jnp.iinfo(dtype).max if whole else jnp.finfo(dtype).max)
    scales = jnp.max(jnp.abs(x), axis=axes, keepdims=True) / largest
    unit = x / jnp.where(scales == 0, 1.0, scales)
    # Clipped, because division rounds: in a float format the largest number could become infinity.
    unit = jnp.clip(jnp.round(unit) if whole else unit, -largest, largest)
    return unit.astype(dtype), scales.squeeze(axes)

"""Frozen weights beside adapters: how they are stored, and how adapters are merged into them.

Functions on trees accept nested dicts with stacked layers, with separate layers, or any subtree: they recognise leaves
by name.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from emu3_jax.errors import Emu3Error
from emu3_jax.models.adapters import (
    MATRICES,
    QUANTISED,
    Adapter,
    base_dtype,
    dequantise_matrix,
    quantise_matrix,
)
from emu3_jax.models.stacking import Path

Params = dict[str, Any]


class LowRank(NamedTuple):
    """The adapter of one matrix W. Merging gives W + scale * A B.

    Attributes:
        a: A, float32 [in..., R].
        b: B, float32 [R, out...].
        scale: factor on the product.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float


def freeze_leaf(path: Path, leaf: jax.Array, base: str) -> dict[Path, jax.Array]:
    """Converts one array of a plain decoder to its frozen form: a matrix is quantised or cast, other arrays are cast.

    Args:
        path: path of the array.
        leaf: the array.
        base: storage of frozen weights, from `BASES`.

    Returns:
        The frozen arrays by path: one array, or codes and scales of a quantised matrix.
    """
    *parent, name = path
    if name not in MATRICES or base not in QUANTISED:
        return {path: leaf.astype(base_dtype(base))}
    codes, scale = quantise_matrix(name, leaf, base)
    return {(*parent, f"{name}_q"): codes, (*parent, f"{name}_scale"): scale}


def merge(trainable: Params, frozen: Params, adapter: Adapter, dtype: Any) -> Params:
    """Merges adapters into frozen weights: W + alpha / rank * A B, computed in float32, then cast to `dtype`.

    A quantised W is dequantised first, because the adapters were trained beside the dequantised weights. To merge one
    layer at a time, slice both trees to that layer.

    Args:
        trainable: the adapters; an empty dict to only dequantise and cast the frozen weights.
        frozen: all arrays of a decoder, in the form of `freeze_leaf`.
        adapter: settings of the adapters.
        dtype: dtype of the result.

    Returns:
        The parameters of a plain decoder.
    """
    flat = traverse_util.flatten_dict(frozen)
    adapters = traverse_util.flatten_dict(trainable)
    merged = {}
    for (*parent, stored), leaf in flat.items():
        if stored.endswith("_scale"):
            continue
        name = stored.removesuffix("_q")
        if stored != name:
            leaf = dequantise_matrix(name, leaf, flat[(*parent, f"{name}_scale")], adapter.base)
        if name in MATRICES and (*parent, f"{name}_a") in adapters:
            a, b = adapters[(*parent, f"{name}_a")], adapters[(*parent, f"{name}_b")]
            leaf = leaf.astype(jnp.float32) + adapter.scale * _outer(name, a, b)
        merged[(*parent, name)] = leaf.astype(dtype)
    return traverse_util.unflatten_dict(merged)


def merge_array(path: Path, array: np.ndarray, pair: LowRank | None, base: str, dtype: np.dtype) -> Any:
    """Merges the adapter of one array of a plain decoder. The bits of the result do not depend on the caller's mesh.

    A matrix is merged on this process' first device. Other arrays are only cast, on the host.

    Args:
        path: path of the array.
        array: the array as a bundle stores it.
        pair: its adapter, or None.
        base: storage of the frozen weights while the adapter was trained, from `BASES`.
        dtype: dtype of the result.

    Returns:
        The merged array: a `jax.Array` for a matrix, else a NumPy array.

    Raises:
        Emu3Error: a merged weight is too large for `dtype`.
    """
    name = path[-1]
    if name not in MATRICES:
        return array.astype(base_dtype(base), copy=False).astype(dtype, copy=False)
    device = jax.local_devices()[0]
    parts = None if pair is None else (pair.a, pair.b, np.float32(pair.scale))
    # A mesh of one device: the caller's mesh would spread the work, which changes the order of sums.
    with jax.set_mesh(jax.sharding.Mesh(np.asarray([device]), "one")):
        merged = _merge_matrix(*jax.device_put((array, parts), device), name=name, base=base, dtype=np.dtype(dtype))
        finite = bool(jnp.isfinite(merged).all())
    if not finite:
        raise Emu3Error(
            f"merged weight {'/'.join(path)}: a number is too large for {np.dtype(dtype).name}; give --dtype float32. "
            "If the dtype is float32, the adapter or the bundle is damaged: copy it again"
        )
    return merged


@functools.partial(jax.jit, static_argnames=("name", "base", "dtype"))
def _merge_matrix(matrix: jax.Array, parts: Any, *, name: str, base: str, dtype: np.dtype) -> jax.Array:
    if base in QUANTISED:
        matrix = dequantise_matrix(name, *quantise_matrix(name, matrix, base), base)
    else:
        matrix = matrix.astype(base_dtype(base))
    if parts is not None:
        a, b, scale = parts
        matrix = matrix.astype(jnp.float32) + scale * _outer(name, a, b)
    return matrix.astype(dtype)


def _outer(name: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """The product A B, float32, in the shape of the matrix."""
    kind = MATRICES[name]
    layers = a.ndim - 1 - kind.inputs
    axes = "abcdefg"[: layers + kind.inputs + kind.outputs]
    first, inputs, outputs = axes[:layers], axes[layers : a.ndim - 1], axes[a.ndim - 1 :]
    # Without reshapes: of merged axes, a mesh cannot split the second one, and would compute all of the product on
    # every device.
    return jnp.einsum(
        f"{first}{inputs}r,{first}r{outputs}->{axes}", a, b, precision="highest", preferred_element_type=jnp.float32
    )

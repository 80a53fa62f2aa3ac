"""Frozen weights beside adapters: how each is kept, and how adapters are merged into it.

Functions on trees take nested dicts of stacked layers, of single ones, or any part of them: leaves are known by name.
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
    """An adapter of one matrix, which becomes W + scale * A B.

    Attributes:
        a: float32 [in..., R].
        b: float32 [R, out...].
        scale: of the product.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float


def freeze_leaf(path: Path, leaf: jax.Array, base: str) -> dict[Path, jax.Array]:
    """What is kept of one array of a plain decoder: a matrix quantised or cast, anything else cast.

    Args:
        path: of the array.
        leaf: the array.
        base: of `BASES`.

    Returns:
        The array by its path; of a quantised matrix codes and scales.
    """
    *parent, name = path
    if name not in MATRICES or base not in QUANTISED:
        return {path: leaf.astype(base_dtype(base))}
    codes, scale = quantise_matrix(name, leaf, base)
    return {(*parent, f"{name}_q"): codes, (*parent, f"{name}_scale"): scale}


def merge(trainable: Params, frozen: Params, adapter: Adapter, dtype: Any) -> Params:
    """A plain decoder's parameters W + alpha / rank * A B, computed in float32, then cast to `dtype`.

    A quantised W is what its codes stand for: the weights that the adapters were trained beside. For one layer at a
    time, give both trees sliced to it.

    Args:
        trainable: adapters; empty for the frozen weights alone.
        frozen: all arrays of a decoder, each as `freeze_leaf` keeps it.
        adapter: their config.
        dtype: of the result.
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
    """One array of a plain decoder with its adapter merged: bit for bit the same wherever it is called.

    A matrix is computed whole, on this process' first device; of other arrays nothing but the dtype changes, on the
    host.

    Args:
        path: of the array.
        array: as a bundle holds it.
        pair: its adapter, or None.
        base: of `BASES`, how the frozen weights were kept while the adapter was trained.
        dtype: of the result.

    Returns:
        The array: a NumPy array, or of a matrix a `jax.Array`.

    Raises:
        Emu3Error: a matrix becomes too large for `dtype`.
    """
    name = path[-1]
    if name not in MATRICES:
        return array.astype(base_dtype(base), copy=False).astype(dtype, copy=False)
    device = jax.local_devices()[0]
    parts = None if pair is None else (pair.a, pair.b, np.float32(pair.scale))
    # Arrays that lie on no mesh: a mesh that is in use must not spread the work, and with it the order of sums.
    with jax.set_mesh(jax.sharding.Mesh(np.asarray([device]), "one")):
        merged = _merge_matrix(*jax.device_put((array, parts), device), name=name, base=base, dtype=np.dtype(dtype))
        finite = bool(jnp.isfinite(merged).all())
    if not finite:
        raise Emu3Error(
            f"the merged weights {'/'.join(path)} have numbers too large for {np.dtype(dtype).name}: take float32 "
            "(--dtype); if it is float32, the adapter or the bundle is damaged: copy it again"
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
    """A B in the shape of the matrix, float32."""
    inputs, outputs = a.shape[:-1], b.shape[b.ndim - MATRICES[name].outputs :]
    layers = inputs[: len(inputs) - MATRICES[name].inputs]
    a, b = a.reshape(*layers, -1, a.shape[-1]), b.reshape(*layers, a.shape[-1], -1)
    product = jnp.einsum("...ir,...ro->...io", a, b, precision="highest", preferred_element_type=jnp.float32)
    return product.reshape(*inputs, *outputs)

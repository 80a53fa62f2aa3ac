"""Merges a saved adapter into a bundle's decoder: in memory, or to a new bundle."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from emu3_jax.checkpoints.adapter import SavedAdapter
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.checkpoints.dequantized import full_bundle
from emu3_jax.checkpoints.layouts import Param
from emu3_jax.checkpoints.parts import LazyArray
from emu3_jax.files import require_outside
from emu3_jax.models.quantization import codes_and_scales
from emu3_jax.models.stacking import Path as TreePath
from emu3_jax.progress import Progress


def load_merged(
    bundle: Bundle, adapter: SavedAdapter, shardings: Any, dtype: Any = None, quantize: str | None = None
) -> dict[str, Any]:
    """Loads the decoder's parameters with the adapter merged, like `Bundle.load_decoder`.

    Arrays are merged one by one. Beside the loaded parameters, the host holds a few hundred MB, and the first device of
    each process holds one matrix in float32, its adapter's product and the result. Each process reads all arrays.

    Args:
        bundle: bundle with the frozen weights.
        adapter: the adapter, opened for this bundle.
        shardings: shardings in the tree structure of the parameters, or None for the first device.
        dtype: dtype of the result, or None for the dtype of `adapter.decoder`.
        quantize: quantisation of the merged matrices, from `models.quantization.KINDS`, or None.

    Returns:
        The parameters, as nested dicts.

    Raises:
        Emu3Error: a file is damaged.
    """
    dtype = np.dtype(adapter.decoder.dtype if dtype is None else dtype)
    places = None if shardings is None else traverse_util.flatten_dict(shardings)
    params: dict[TreePath, jax.Array] = {}
    for param, array in bundle.arrays("decoder"):
        path = param.path
        wide = _on_devices(adapter.merged(path, array, dtype), None if places is None else places[path])
        params |= codes_and_scales(path, jax.block_until_ready(wide), quantize)
    return traverse_util.unflatten_dict(params)


def _on_devices(array: Any, place: jax.sharding.Sharding | None) -> jax.Array:
    if place is None:
        return jax.device_put(array, jax.local_devices()[0])
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, place, host.__getitem__)


def merge_bundle(
    bundle: Bundle,
    adapter: str | os.PathLike,
    target: Path,
    dtype: str | None = None,
    *,
    verify: bool = False,
    progress: bool | None = None,
) -> None:
    """Writes a new bundle with an adapter merged into the decoder. Memory holds one array at a time.

    Args:
        bundle: bundle with the frozen weights.
        adapter: directory of the adapter.
        target: path of the new bundle. It must not exist.
        dtype: dtype of the new decoder, or None for the dtype of the adapter's training (if unknown, the bundle's).
        verify: see `SavedAdapter.open`.
        progress: as in `progress.Progress`.

    Raises:
        Emu3Error: the adapter does not fit the bundle, or a file cannot be read or written. No files are left behind.
    """
    bundle = full_bundle(bundle, "the merged model")
    require_outside(target, bundle.path, adapter)
    saved = SavedAdapter.open(adapter, bundle, verify=verify)
    bundle.stored("decoder")  # raises on damage before anything is written
    decoder = saved.decoder if dtype is None else dataclasses.replace(saved.decoder, dtype=dtype)
    new = np.dtype(decoder.dtype)

    def load(param: Param) -> Callable[[], np.ndarray]:
        return lambda: np.asarray(saved.merged(param.path, bundle.decoder_array(param.path), new))

    arrays = [LazyArray(param.path, param.shape, new, load(param)) for param in bundle.params("decoder")]
    total = sum(array.nbytes for array in arrays)
    with Progress(progress, total, "bytes", name="merge") as bar:
        bundle.write_with_decoder(target, decoder, arrays, bar.update)

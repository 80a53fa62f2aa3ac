"""A bundle's decoder with a saved adapter merged: in memory, or as a bundle of its own."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from emu3_jax.checkpoints.adapter import SavedAdapter
from emu3_jax.checkpoints.bundle import Bundle, LazyArray, read_array
from emu3_jax.checkpoints.layouts import Param
from emu3_jax.models.quantization import codes_and_scales
from emu3_jax.models.stacking import Path as TreePath
from emu3_jax.progress import Progress


def load_merged(
    bundle: Bundle, adapter: SavedAdapter, shardings: Any, dtype: Any = None, quantize: str | None = None
) -> dict[str, Any]:
    """The decoder's parameters with the adapter merged, like `Bundle.load_decoder`.

    Arrays pass one by one: beside what is loaded, the host holds a few hundred MB and the first device of each process
    one matrix in float32, its adapter's product and the result. Each process reads all arrays whole.

    Args:
        bundle: of the frozen weights.
        adapter: opened for this bundle.
        shardings: a tree of shardings like the parameters, or None for the first device.
        dtype: of the result; by default that of `adapter.decoder`.
        quantize: see `models.quantization.KINDS`; what is quantised is the merged matrices.

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
    """Writes the bundle with an adapter merged as a new bundle, holding one array at a time.

    Args:
        bundle: of the frozen weights.
        adapter: its directory.
        target: the new bundle; it must not exist.
        dtype: of the new decoder; by default that of the adapter's training, or where nobody says the bundle's.
        verify: see `SavedAdapter.open`.
        progress: as `progress.Progress` takes it.

    Raises:
        Emu3Error: the adapter does not fit, or a place cannot be read or written. Nothing is left behind.
    """
    bundle.require_full("merging an adapter")
    saved = SavedAdapter.open(adapter, bundle, verify=verify)
    bundle.stored("decoder")  # damage is refused before anything is written
    decoder = saved.decoder if dtype is None else dataclasses.replace(saved.decoder, dtype=dtype)
    weights, new = bundle.weights("decoder"), np.dtype(decoder.dtype)

    def load(param: Param) -> Callable[[], np.ndarray]:
        return lambda: np.asarray(saved.merged(param.path, read_array(weights, param.path), new))

    arrays = [LazyArray(param.path, param.shape, new, load(param)) for param in bundle.params("decoder")]
    total = sum(array.nbytes for array in arrays)
    with Progress(progress, total, "bytes", name="merge") as bar:
        bundle.write_with_decoder(target, decoder, arrays, bar.update)

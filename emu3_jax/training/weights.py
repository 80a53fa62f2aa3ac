"""Weights into a run and out of it: from a bundle to the stacked training form, and from a checkpoint to a bundle."""

import functools
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  NumPy learns bfloat16 from it
import numpy as np
import tensorstore
from flax import traverse_util
from jax.sharding import Mesh

from emu3_jax.checkpoints.bundle import Bundle, LazyArray, write_part
from emu3_jax.checkpoints.checksums import write_checksums
from emu3_jax.checkpoints.layouts import decoder_params
from emu3_jax.config import DecoderConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.fields import from_json, read_from
from emu3_jax.files import new_directory
from emu3_jax.foreign import storage_path
from emu3_jax.models.adapters import MATRICES, Adapter
from emu3_jax.models.stacking import Path, stack_layers, stacked_place, unstack_layers
from emu3_jax.sharding.rules import decoder_shardings
from emu3_jax.training import lora
from emu3_jax.training.run_directory import identity_part, newest_checkpoint, read_identity


def stacked_from_bundle(bundle: Bundle, decoder: DecoderConfig, mesh: Mesh, places: Any) -> Any:
    """The decoder's parameters in float32, stacked, in the shardings `places`; twice the largest of them at a time."""
    flat = traverse_util.flatten_dict(bundle.load_decoder(decoder_shardings(decoder, mesh), np.float32))
    flat_places = traverse_util.flatten_dict(places)

    def stack(path: Path, layers: Sequence[jax.Array]) -> jax.Array:
        return jax.jit(lambda *xs: jnp.stack(xs), out_shardings=flat_places[path])(*layers)

    return traverse_util.unflatten_dict(stack_layers(flat, decoder, stack))


def frozen_from_bundle(bundle: Bundle, decoder: DecoderConfig, adapter: Adapter, places: Any) -> Any:
    """The decoder's parameters as `adapter.base` keeps them, stacked, in the shardings `places`."""
    arrays = ((param.path, array) for param, array in bundle.arrays("decoder"))
    return lora.freeze_stacked(arrays, decoder, adapter, places)


def make_inference_params(decoder: DecoderConfig, adapter: Adapter | None, mesh: Mesh) -> Callable[[Any, Any], Any]:
    """jitted `(params, frozen) -> parameters to generate with`, in `decoder.dtype`, adapters merged."""

    def convert(params: Any, frozen: Any) -> Any:
        if adapter is not None:
            params = lora.merge(params, frozen, adapter, decoder.dtype)
        return unstack_layers(jax.tree.map(lambda leaf: leaf.astype(decoder.dtype), params), decoder)

    return jax.jit(convert, out_shardings=decoder_shardings(decoder, mesh))


def export_run(directory: pathlib.Path, target: pathlib.Path, step: int | None = None) -> int:
    """Writes the weights of a run's checkpoint as a bundle, adapters merged, holding one array at a time.

    Args:
        directory: of the run.
        target: the bundle; it must not exist.
        step: of the checkpoint; by default the newest.

    Returns:
        The step.

    Raises:
        Emu3Error: no such checkpoint, or one of the places cannot be read or written.
    """
    identity = read_identity(directory)
    step, state = newest_checkpoint(directory, step)
    parts = {part: identity_part(directory, identity, part) for part in ("decoder", "adapter", "bundle")}
    with read_from(directory / "run.json"):
        decoder = DecoderConfig.from_dict(parts["decoder"])
        adapter = from_json(Adapter, parts["adapter"]) if parts["adapter"] else None
    bundle = Bundle.open(parts["bundle"])
    read = functools.partial(_read_trained, state)
    frozen = _Frozen(bundle) if adapter else None
    dtype = np.dtype(decoder.dtype)
    arrays = []
    for param in decoder_params(decoder):
        load = functools.partial(_load, param.path, read, frozen, adapter, dtype)
        arrays.append(LazyArray(param.path, param.shape, dtype, load))
    with new_directory(target, sum(array.nbytes for array in arrays)) as temporary:
        write_part(temporary / "decoder", decoder.to_dict(), arrays)
        for part in ("tokenizer", "vision"):
            if bundle.has(part):
                shutil.copytree(bundle.path / part, temporary / part)
        write_checksums(temporary)
    return step


class _Frozen:
    """Arrays of a bundle's decoder by path."""

    def __init__(self, bundle: Bundle):
        self._database = storage_path(bundle.path / "decoder" / "weights").as_posix()

    def __call__(self, path: Path) -> np.ndarray:
        return _read(self._database, path)


def _load(
    path: Path,
    read: Callable[[Path, int | None], np.ndarray],
    frozen: _Frozen | None,
    adapter: Adapter | None,
    dtype: np.dtype,
) -> np.ndarray:
    """One array of the bundle."""
    stacked, index = stacked_place(path)
    if adapter is None or frozen is None:
        return read(stacked, index).astype(dtype)
    name = path[-1]
    kept = lora.freeze({name: jnp.asarray(frozen(path))}, adapter)
    pair = {}
    if name in MATRICES and name in adapter.targets:
        pair = {f"{name}_{side}": jnp.asarray(read((*stacked[:-1], f"{name}_{side}"), index)) for side in "ab"}
    return np.asarray(lora.merge(pair, kept, adapter, dtype)[name])


def _read_trained(state: pathlib.Path, path: Path, index: int | None) -> np.ndarray:
    """One array of a checkpoint's `params`, or one layer of it."""
    return read_checkpoint(state, ("params", *path), index)


def read_checkpoint(state: pathlib.Path, path: Path, index: int | None = None) -> np.ndarray:
    """One array of a checkpoint's `state`, or the slice `index` of its first axis. Raises `Emu3Error` if damaged."""
    return _read(state.as_posix(), path, index)


def _read(database: str, path: Path, index: int | None = None) -> np.ndarray:
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": {"driver": "file", "path": database + "/"}, "path": ".".join(path)},
    }
    try:
        array = tensorstore.open(spec, open=True, read=True).result()
        return np.asarray((array if index is None else array[index]).read().result())
    except (OSError, ValueError) as error:
        reason = str(error).split("\n", 1)[0][:200]
        raise Emu3Error(f"{database}: {'/'.join(path)} cannot be read ({reason}); the files are damaged") from error

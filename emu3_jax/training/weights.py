"""Loads weights from a bundle into the stacked form for training, and exports checkpoints as bundles or adapters."""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  NumPy learns bfloat16 from it
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from emu3_jax.checkpoints.adapter import write_adapter
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.checkpoints.dequantized import full_bundle
from emu3_jax.checkpoints.layouts import decoder_params
from emu3_jax.checkpoints.parts import LazyArray, read_array
from emu3_jax.config import DecoderConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.fields import from_json, read_from
from emu3_jax.models.adapters import MATRICES, Adapter
from emu3_jax.models.merging import LowRank, merge, merge_array
from emu3_jax.models.stacking import Path, stack_layers, stacked_place, unstack_layers
from emu3_jax.sharding.rules import decoder_shardings
from emu3_jax.training import lora
from emu3_jax.training.run_directory import identity_part, newest_checkpoint, read_identity


def stacked_from_bundle(bundle: Bundle, decoder: DecoderConfig, mesh: Mesh, places: Any) -> Any:
    """Loads the decoder's parameters in float32 with stacked layers.

    Args:
        bundle: bundle to read.
        decoder: config of the decoder.
        mesh: the mesh.
        places: shardings in the tree structure of the result.

    Returns:
        The stacked parameters, in the shardings `places`.
    """
    flat = traverse_util.flatten_dict(bundle.load_decoder(decoder_shardings(decoder, mesh), np.float32))
    flat_places = traverse_util.flatten_dict(places)

    def stack(path: Path, layers: Sequence[jax.Array]) -> jax.Array:
        return _stacking(flat_places[path])(*layers)

    return traverse_util.unflatten_dict(stack_layers(flat, decoder, stack))


@functools.lru_cache(maxsize=64)
def _stacking(place: jax.sharding.Sharding) -> jax.stages.Wrapped:
    """Stacks arrays. Weights of one shape and sharding share a program."""
    return jax.jit(lambda *layers: jnp.stack(layers), out_shardings=place)


def frozen_from_bundle(bundle: Bundle, decoder: DecoderConfig, adapter: Adapter, places: Any) -> Any:
    """Loads the decoder's parameters converted to `adapter.base`, with stacked layers, in the shardings `places`."""
    arrays = ((param.path, array) for param, array in bundle.arrays("decoder"))
    return lora.freeze_stacked(arrays, decoder, adapter, places)


def make_inference_params(
    decoder: DecoderConfig, adapter: Adapter | None, mesh: Mesh, *, gathered: bool = False
) -> jax.stages.Wrapped:
    """Makes a jitted `(params, frozen) -> inference parameters`, in `decoder.dtype`, with adapters merged.

    Args:
        decoder: config of the decoder.
        adapter: config of the adapters, or None.
        mesh: the mesh.
        gathered: see `rules.shardings`.
    """
    split = decoder_shardings(decoder, mesh)

    def convert(params: Any, frozen: Any) -> Any:
        if adapter is not None:
            params = merge(params, frozen, adapter, decoder.dtype)
        params = unstack_layers(jax.tree.map(lambda leaf: leaf.astype(decoder.dtype), params), decoder)
        # Gathered as the last step: in the narrow dtype, and adapters are merged on parts.
        return jax.lax.with_sharding_constraint(params, split) if gathered else params

    return jax.jit(convert, out_shardings=decoder_shardings(decoder, mesh, gathered=gathered))


def abstract_inference_params(decoder: DecoderConfig, mesh: Mesh, *, gathered: bool = False) -> dict[str, Any]:
    """What `make_inference_params` returns, as abstract arrays with shardings."""
    places = traverse_util.flatten_dict(decoder_shardings(decoder, mesh, gathered=gathered))
    dtype = jnp.dtype(decoder.dtype)
    return traverse_util.unflatten_dict({
        param.path: jax.ShapeDtypeStruct(param.shape, dtype, sharding=places[param.path])
        for param in decoder_params(decoder)
    })  # fmt: skip


def export_run(directory: pathlib.Path, target: pathlib.Path, step: int | None = None) -> int:
    """Writes the weights of a run's checkpoint as a bundle. Adapters are merged. Memory holds one array at a time.

    Args:
        directory: directory of the run.
        target: path of the new bundle. It must not exist.
        step: step of the checkpoint, or None for the newest.

    Returns:
        The step of the exported checkpoint.

    Raises:
        Emu3Error: there is no such checkpoint, the run's directory cannot be read, or `target` cannot be written.
    """
    run = _Run(directory, step)
    dtype = np.dtype(run.decoder.dtype)
    arrays = []
    for param in decoder_params(run.decoder):
        load = functools.partial(_load, run, param.path, dtype)
        arrays.append(LazyArray(param.path, param.shape, dtype, load))
    run.bundle.write_with_decoder(target, run.decoder, arrays)
    return run.step


def export_adapter(directory: pathlib.Path, target: pathlib.Path, step: int | None = None) -> int:
    """Writes only the adapter of a run's checkpoint, in PEFT's format (see `checkpoints.adapter`).

    Args:
        directory: directory of the run.
        target: path of the new adapter directory. It must not exist.
        step: step of the checkpoint, or None for the newest.

    Returns:
        The step of the exported checkpoint.

    Raises:
        Emu3Error: the run trains no adapter, there is no such checkpoint, the run's directory cannot be read, or
            `target` cannot be written.
    """
    run = _Run(directory, step)
    if run.adapter is None:
        raise Emu3Error(f"{directory} trains all weights and has no adapter: leave --adapter-only out")
    write_adapter(target, run.adapter, run.decoder, run.trained, bundle=run.bundle, step=run.step)
    return run.step


class _Run:
    """A checkpoint of a run, with the contents of `run.json`. Arguments and errors are those of `export_run`."""

    def __init__(self, directory: pathlib.Path, step: int | None):
        identity = read_identity(directory)
        self.step, self._state = newest_checkpoint(directory, step)
        parts = {part: identity_part(directory, identity, part) for part in ("decoder", "adapter", "bundle")}
        with read_from(directory / "run.json"):
            self.decoder = DecoderConfig.from_dict(parts["decoder"])
            self.adapter = from_json(Adapter, parts["adapter"]) if parts["adapter"] else None
        self.bundle = Bundle.open(parts["bundle"])
        if self.adapter is not None:
            self.bundle = full_bundle(self.bundle, "the exported model")

    def trained(self, path: Path) -> np.ndarray:
        """A trained array, by its path with separate layers: an array of the decoder, or one side of an adapter."""
        stacked, index = stacked_place(path)
        return read_array(self._state, ("params", *stacked), index)

    def frozen(self, path: Path) -> np.ndarray:
        """An array of the decoder in the run's bundle."""
        return self.bundle.decoder_array(path)


def _load(run: _Run, path: Path, dtype: np.dtype) -> np.ndarray:
    """One array of the exported bundle, by its path, with adapters merged."""
    if run.adapter is None:
        return run.trained(path).astype(dtype)
    *parent, name = path
    pair = None
    if name in MATRICES and name in run.adapter.targets:
        a, b = (run.trained((*parent, f"{name}_{side}")) for side in "ab")
        pair = LowRank(a, b, run.adapter.scale)
    return np.asarray(merge_array(path, run.frozen(path), pair, run.adapter.base, dtype))

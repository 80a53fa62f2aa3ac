"""Parameters of a decoder with low-rank adapters: freezing a plain decoder, and splitting trained from frozen leaves.

`models.merging` merges adapters back into the weights. Functions on trees accept nested dicts with stacked layers,
with separate layers, or any subtree: they recognise leaves by name.
"""

import functools
from collections import Counter
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from emu3_jax.config import DecoderConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.models.adapters import MATRICES, Adapter
from emu3_jax.models.merging import freeze_leaf
from emu3_jax.models.stacking import Path, is_stacked, stacked_place

Params = dict[str, Any]

_TRAINED = {f"{name}_{side}" for name in MATRICES for side in "ab"}


def split(params: Params) -> tuple[Params, Params]:
    """Splits a tree of parameters, shardings or Flax boxes into (adapters, all other leaves). `join` undoes it."""
    flat = traverse_util.flatten_dict(params)
    parts = [{path: x for path, x in flat.items() if (path[-1] in _TRAINED) is side} for side in (True, False)]
    return traverse_util.unflatten_dict(parts[0]), traverse_util.unflatten_dict(parts[1])


def join(trainable: Params, frozen: Params) -> Params:
    """Joins the two parts of `split` to parameters for `Decoder(config, adapter=adapter)`."""
    flat = {**traverse_util.flatten_dict(frozen), **traverse_util.flatten_dict(trainable)}
    return traverse_util.unflatten_dict(flat)


def switched_off(trainable: Params) -> Params:
    """Adapters that add nothing: their second matrices are zeros. Trees without adapters do not change."""
    flat = traverse_util.flatten_dict(trainable)
    second = {f"{name}_b" for name in MATRICES}
    return traverse_util.unflatten_dict(
        {path: jnp.zeros_like(x) if path[-1] in second else x for path, x in flat.items()}
    )


# ------------------------------------------------------------------------------------------------ the frozen part


def freeze(params: Params, adapter: Adapter) -> Params:
    """Converts a plain decoder's parameters to `adapter.base`: quantises or casts matrices, casts other leaves."""
    flat = traverse_util.flatten_dict(params)
    frozen = (freeze_leaf(path, leaf, adapter.base) for path, leaf in flat.items())
    return traverse_util.unflatten_dict({path: leaf for leaves in frozen for path, leaf in leaves.items()})


def freeze_stacked(
    arrays: Iterable[tuple[Path, np.ndarray]], config: DecoderConfig, adapter: Adapter, places: Params
) -> Params:
    """Freezes a plain decoder's arrays one by one and stacks the layers.

    Beside the result, a device holds only one layer's matrix at a time.

    Args:
        arrays: pairs (path, array) with separate layers, in any order, as `Bundle.arrays` yields them.
        config: config of the decoder.
        adapter: settings of the adapter. Its `base` says how frozen weights are stored.
        places: shardings in the tree structure of the result, all on one mesh. They are the second part of
            `split(decoder_shardings(config, mesh, stacked=True, adapter=adapter))`.

    Returns:
        The frozen parameters, layers stacked.

    Raises:
        Emu3Error: an array is missing or occurs twice.
    """
    flat_places = traverse_util.flatten_dict(places)
    frozen: dict[Path, jax.Array] = {}
    written: Counter[Path] = Counter()
    writers: dict[Path, Any] = {}
    for own_path, array in arrays:
        path, layer = stacked_place(own_path)
        if layer is None:
            # A device gets only its own part of a table: a whole table may not fit.
            cast = array.astype(adapter.dtype, copy=False)
            frozen[path] = jax.make_array_from_callback(cast.shape, flat_places[path], cast.__getitem__)
            written[path] += 1
            continue
        if path not in writers:
            shapes = jax.eval_shape(lambda x, path=path: freeze_leaf(path, x, adapter.base), array)
            outputs = {name: flat_places[name] for name in shapes}
            frozen |= jax.jit(
                lambda shapes=shapes: {n: jnp.zeros((config.num_layers, *x.shape), x.dtype) for n, x in shapes.items()},
                out_shardings=outputs,
            )()
            write = functools.partial(_write_layer, path, adapter)
            writers[path] = jax.jit(write, donate_argnums=0, out_shardings=outputs), tuple(shapes)
        write, names = writers[path]
        frozen |= write({name: frozen[name] for name in names}, array, layer)
        written.update(names)
    for path in flat_places:
        expected = config.num_layers if is_stacked(path) else 1
        if written[path] != expected:
            raise Emu3Error(
                f"frozen weight {'/'.join(path)}: the bundle gave {written[path]} arrays, {expected} are needed; "
                "convert the model again"
            )
    return traverse_util.unflatten_dict(frozen)


def _write_layer(
    path: Path, adapter: Adapter, stacked: dict[Path, jax.Array], array: jax.Array, layer: int
) -> dict[Path, jax.Array]:
    new = freeze_leaf(path, array, adapter.base)
    return {name: jax.lax.dynamic_update_index_in_dim(stacked[name], x, layer, 0) for name, x in new.items()}

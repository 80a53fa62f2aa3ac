"""Parameters of a decoder with adapters: made from a plain decoder's, split into trained and frozen ones.

`models.merging` merges them back. Functions on trees take nested dicts of stacked layers, of single ones, or any part
of them: leaves are known by name.
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
    """(adapters, all else) of parameters, of their shardings or of their boxes; `join` is the way back."""
    flat = traverse_util.flatten_dict(params)
    parts = [{path: x for path, x in flat.items() if (path[-1] in _TRAINED) is side} for side in (True, False)]
    return traverse_util.unflatten_dict(parts[0]), traverse_util.unflatten_dict(parts[1])


def join(trainable: Params, frozen: Params) -> Params:
    """Parameters for `Decoder(config, adapter=adapter)`."""
    flat = {**traverse_util.flatten_dict(frozen), **traverse_util.flatten_dict(trainable)}
    return traverse_util.unflatten_dict(flat)


# ------------------------------------------------------------------------------------------------ the frozen part


def freeze(params: Params, adapter: Adapter) -> Params:
    """A plain decoder's parameters as `adapter.base` keeps them: matrices quantised or cast, the rest cast."""
    flat = traverse_util.flatten_dict(params)
    frozen = (freeze_leaf(path, leaf, adapter.base) for path, leaf in flat.items())
    return traverse_util.unflatten_dict({path: leaf for leaves in frozen for path, leaf in leaves.items()})


def freeze_stacked(
    arrays: Iterable[tuple[Path, np.ndarray]], config: DecoderConfig, adapter: Adapter, places: Params
) -> Params:
    """`freeze` of a plain decoder's arrays, stacked: beside the result, a device holds one layer's matrix at a time.

    Args:
        arrays: the path and array of each, layers apart, in any order: from `Bundle.arrays`.
        config: the decoder's.
        adapter: how they are kept.
        places: shardings like the result, of one mesh: the second part that `split` makes of
            `decoder_shardings(config, mesh, stacked=True, adapter=adapter)`.

    Raises:
        Emu3Error: an array is missing.
    """
    flat_places = traverse_util.flatten_dict(places)
    frozen: dict[Path, jax.Array] = {}
    written: Counter[Path] = Counter()
    writers: dict[Path, Any] = {}
    for own_path, array in arrays:
        path, layer = stacked_place(own_path)
        if layer is None:
            # A table is never whole on a device.
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
                f"{written[path]} of {expected} arrays were given for the frozen weight {'/'.join(path)}: "
                "convert the model again"
            )
    return traverse_util.unflatten_dict(frozen)


def _write_layer(
    path: Path, adapter: Adapter, stacked: dict[Path, jax.Array], array: jax.Array, layer: int
) -> dict[Path, jax.Array]:
    new = freeze_leaf(path, array, adapter.base)
    return {name: jax.lax.dynamic_update_index_in_dim(stacked[name], x, layer, 0) for name, x in new.items()}

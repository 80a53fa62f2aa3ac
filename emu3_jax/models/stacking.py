"""The two forms of a decoder's parameters, and the ways between them. Nothing else knows how layers are named.

Apart     one subtree per layer, `layers_0`, `layers_1`, ...: bundles store it, decoding unrolls it
stacked   one subtree `layers` whose arrays have a leading axis of layers: training scans over it

All other parameters are the same in both. A path is the names from the root of the tree to an array.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from emu3_jax.config import DecoderConfig

Path = tuple[str, ...]

_LAYERS = "layers"  # what `Decoder.setup` calls its layers, one module or a list


def layer_name(index: int) -> str:
    """The subtree of a layer where layers are apart."""
    return f"{_LAYERS}_{index}"


def stacked_place(path: Path) -> tuple[Path, int | None]:
    """Where an array of the form apart lies in the stacked one: its path there, and its layer, None if it has none."""
    name, _, index = path[0].rpartition("_")
    if name != _LAYERS:
        return path, None
    return (_LAYERS, *path[1:]), int(index)


def is_stacked(path: Path) -> bool:
    """Whether the array at this path of the stacked form has an axis of layers."""
    return path[0] == _LAYERS


def stack_layers(
    apart: dict[Path, Any], config: DecoderConfig, stack: Callable[[Path, Sequence[Any]], Any]
) -> dict[Path, Any]:
    """The stacked form, by path.

    Args:
        apart: all arrays by path; they are taken out of it one by one, so that no more than one stack is there twice.
        config: the decoder's.
        stack: makes the array at a path of the stacked form from the layers' arrays.
    """
    stacked = {}
    for path in list(apart):
        place, layer = stacked_place(path)
        if layer is None:
            stacked[path] = apart.pop(path)
        elif layer == 0:
            names = map(layer_name, range(config.num_layers))
            stacked[place] = stack(place, [apart.pop((name, *path[1:])) for name in names])
    return stacked


def unstack_layers(params: dict[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """Parameters whose layers are apart from stacked ones; both nested dicts."""
    rest = {name: subtree for name, subtree in params.items() if name != _LAYERS}
    layers = {
        layer_name(index): jax.tree.map(lambda leaf, index=index: leaf[index], params[_LAYERS])
        for index in range(config.num_layers)
    }
    return {**rest, **layers}

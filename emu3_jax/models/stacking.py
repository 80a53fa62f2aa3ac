"""Converts between the two forms of a decoder's parameters. Only this module knows how layers are named.

separate  one subtree per layer, `layers_0`, `layers_1`, ...: bundles store it, decoding unrolls it
stacked   one subtree `layers` whose arrays have a leading layer axis: training scans over it

All other parameters are the same in both forms. A path is a tuple of the names from the root of the tree to an array.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from emu3_jax.config import DecoderConfig

Path = tuple[str, ...]

_LAYERS = "layers"  # the attribute of `Decoder` that holds the layers: one scanned module, or a list of modules


def layer_name(index: int) -> str:
    """The name of a layer's subtree in the separate form."""
    return f"{_LAYERS}_{index}"


def stacked_place(path: Path) -> tuple[Path, int | None]:
    """The path of an array in the stacked form, from its path in the separate form; and its layer, or None."""
    name, _, index = path[0].rpartition("_")
    if name != _LAYERS:
        return path, None
    return (_LAYERS, *path[1:]), int(index)


def is_stacked(path: Path) -> bool:
    """Whether the array at this path of the stacked form has a layer axis."""
    return path[0] == _LAYERS


def stack_layers(
    apart: dict[Path, Any], config: DecoderConfig, stack: Callable[[Path, Sequence[Any]], Any]
) -> dict[Path, Any]:
    """Converts the separate form to the stacked form.

    Args:
        apart: all arrays of the separate form, by path. This dict is emptied while stacking, so that memory holds only
            one stack twice.
        config: config of the decoder.
        stack: function that makes the stacked array at a path from the arrays of all layers.

    Returns:
        All arrays of the stacked form, by path.
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
    """Converts parameters from the stacked form to the separate form. Both are nested dicts."""
    rest = {name: subtree for name, subtree in params.items() if name != _LAYERS}
    layers = {
        layer_name(index): jax.tree.map(lambda leaf, index=index: leaf[index], params[_LAYERS])
        for index in range(config.num_layers)
    }
    return {**rest, **layers}

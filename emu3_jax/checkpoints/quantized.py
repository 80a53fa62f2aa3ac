"""Bundles whose decoder is stored as codes and scales: made array by array, with one matrix in memory at a time."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from emu3_jax.checkpoints.bundle import Bundle, LazyArray, read_array
from emu3_jax.compilation import check_backend, own_settings
from emu3_jax.models.quantization import (
    check_kind,
    codes_and_scales,
    codes_and_scales_shapes,
    first_output_axis,
    is_quantised,
)
from emu3_jax.models.stacking import Path as TreePath
from emu3_jax.progress import Progress

_SLICE = 1 << 25  # weights that are quantised together


def quantize_bundle(bundle: Bundle, target: Path, kind: str = "int8", *, progress: bool | None = None) -> None:
    """Writes a bundle with its decoder quantised as a new bundle; tokenizer and vision tokenizer are copied.

    Loading the new bundle gives the same arrays, bit for bit, as loading this one with `quantize=kind` on the same
    kind of device.

    Args:
        bundle: a full one, with a decoder.
        target: the new bundle; it must not exist.
        kind: of `models.quantization.KINDS`.
        progress: as `progress.Progress` takes it.

    Raises:
        Emu3Error: the bundle has no decoder, or is quantised already; it is damaged; or `target` cannot be written.
            Nothing is left behind.
    """
    check_kind(kind)
    bundle.require_full("quantize")
    stored = bundle.stored("decoder")  # damage is refused before anything is written
    weights = bundle.weights("decoder")
    wide = [
        LazyArray(path, array.shape, np.dtype(array.dtype), functools.partial(read_array, weights, path))
        for path, array in stored.items()
    ]
    arrays = quantised_arrays(wide, kind)
    with Progress(progress, sum(array.nbytes for array in arrays), "bytes", name="quantize") as bar:
        bundle.write_with_decoder(target, bundle.decoder_config, arrays, bar.update, kind)


def quantised_arrays(arrays: list[LazyArray], kind: str) -> list[LazyArray]:
    """A decoder's arrays as a quantised bundle stores them; the matrices among them are read when they are written."""
    narrow: list[LazyArray] = []
    for array in arrays:
        if not is_quantised(array.path):
            narrow.append(array)
            continue
        leaves = _Leaves(array, kind)
        for path, leaf in codes_and_scales_shapes(array.path, array.shape, kind).items():
            narrow.append(LazyArray(path, leaf.shape, np.dtype(leaf.dtype), leaves.loader(path)))
    return narrow


@dataclasses.dataclass
class _Leaves:
    """Codes and scales of one matrix. The first to be loaded has both computed; the other waits for its turn."""

    matrix: LazyArray
    kind: str
    ready: dict[TreePath, np.ndarray] = dataclasses.field(default_factory=dict)

    def loader(self, path: TreePath) -> Callable[[], np.ndarray]:
        return functools.partial(self._take, path)

    def _take(self, path: TreePath) -> np.ndarray:
        if path not in self.ready:
            check_backend()
            self.ready = self._computed(self.matrix.load())
        return self.ready.pop(path)

    def _computed(self, wide: np.ndarray) -> dict[TreePath, np.ndarray]:
        """Both, in slices: float32 copies of a whole matrix would be the most that memory ever holds."""
        place, axis = self.matrix.path, first_output_axis(self.matrix.path)
        shapes = codes_and_scales_shapes(place, wide.shape, self.kind)
        leaves = {leaf: np.empty(array.shape, array.dtype) for leaf, array in shapes.items()}
        step = max(1, _SLICE * wide.shape[axis] // wide.size)
        with own_settings():
            for first in range(0, wide.shape[axis], step):
                part = slice(first, first + step)
                made = codes_and_scales(place, jnp.asarray(wide[(slice(None),) * axis + (part,)]), self.kind)
                for leaf, value in made.items():
                    leaves[leaf][part] = value
        return leaves

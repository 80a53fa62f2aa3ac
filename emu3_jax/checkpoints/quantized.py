"""Makes quantised bundles, whose decoder is stored as codes and scales. Memory holds one matrix at a time."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.checkpoints.parts import LazyArray
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
    """Quantises a bundle's decoder and writes a new bundle. Text tokenizer and vision tokenizer are copied.

    Loading the new bundle gives the same arrays, bit for bit, as loading this one with `quantize=kind` on the same
    kind of device.

    Args:
        bundle: full bundle with a decoder.
        target: path of the new bundle. It must not exist.
        kind: quantisation, from `models.quantization.KINDS`.
        progress: as in `progress.Progress`.

    Raises:
        Emu3Error: the bundle has no decoder, or is quantised already; it is damaged; or `target` cannot be written.
            No files are left behind.
    """
    check_kind(kind)
    bundle.require_full("quantize")
    stored = bundle.stored("decoder")  # damage is refused before anything is written
    wide = [
        LazyArray(path, array.shape, np.dtype(array.dtype), functools.partial(bundle.decoder_array, path))
        for path, array in stored.items()
    ]
    arrays = quantised_arrays(wide, kind)
    with Progress(progress, sum(array.nbytes for array in arrays), "bytes", name="quantize") as bar:
        bundle.write_with_decoder(target, bundle.decoder_config, arrays, bar.update, kind)


def quantised_arrays(arrays: list[LazyArray], kind: str) -> list[LazyArray]:
    """The arrays of a quantised bundle, from a decoder's arrays. Matrices are read only when they are written."""
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
    """Codes and scales of one matrix. Loading one of them computes both, and keeps the other until it is loaded."""

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

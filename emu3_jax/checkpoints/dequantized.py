"""Full weights of a quantised bundle: what its codes and scales stand for, rounded to the decoder's dtype.

Training, merging and export work with these weights. The embedded model has no others: a package must be small.
"""

import functools
import logging
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from emu3_jax.checkpoints.bundle import READ_BYTES, Bundle
from emu3_jax.checkpoints.embedded import DIRECTORY
from emu3_jax.checkpoints.parts import in_groups
from emu3_jax.models.quantization import codes_and_scales, codes_and_scales_paths, dequantise, is_quantised
from emu3_jax.models.stacking import Path as TreePath

_log = logging.getLogger("emu3_jax")


def full_bundle(bundle: Bundle, use: str) -> Bundle:
    """The bundle itself, or of a quantised bundle a view that reads full weights.

    A warning says that such weights are rounded, except for the embedded model, which exists in no other form.

    Args:
        bundle: bundle with a decoder.
        use: what needs full weights, for the warning.

    Raises:
        Emu3Error: the bundle has no decoder.
    """
    bundle.require("decoder")
    if bundle.quantize is None:
        return bundle
    if bundle.files.resolve() != DIRECTORY.resolve():  # a config may name it by a relative path
        _log.warning(
            "%s is quantised (%s), so %s works with rounded weights; the bundle that it was made from is more exact",
            bundle.path, bundle.quantize, use,
        )  # fmt: skip
    return _FullBundle(bundle)


class _FullBundle(Bundle):
    """A quantised bundle that reads as a full one."""

    def __init__(self, narrow: Bundle):
        super().__init__(narrow.path, narrow.files, narrow.configs)
        self._narrow = narrow

    @property
    def quantize(self) -> None:
        return None

    def stored(self, part: str) -> dict[TreePath, jax.ShapeDtypeStruct]:
        stored = self._narrow.stored(part)
        if part != "decoder":
            return stored
        dtype = np.dtype(self.decoder_config.dtype)
        return {
            param.path: jax.ShapeDtypeStruct(param.shape, dtype) if is_quantised(param.path) else stored[param.path]
            for param in self.params(part)
        }

    def load_decoder(self, shardings: Any = None, dtype: Any = None, quantize: str | None = None) -> dict[str, Any]:
        narrow, own = self._narrow.stored("decoder"), np.dtype(self.decoder_config.dtype)
        flat = {} if shardings is None or isinstance(shardings, jax.sharding.Sharding) else shardings
        places = traverse_util.flatten_dict(flat)
        params: dict[TreePath, jax.Array] = {}
        for group in in_groups(self.params("decoder"), lambda param: 4 * np.prod(param.shape), READ_BYTES):
            some = {path: narrow[path] for param in group for path in _leaves(param.path)}
            read = traverse_util.flatten_dict(self._narrow.restore("decoder", shardings, dtype, some))
            for param in group:
                path, leaves = param.path, [read.pop(leaf) for leaf in _leaves(param.path)]
                if is_quantised(path):
                    wide = _dequantise(path[-1], *leaves, own).astype(dtype or own)
                    place = places.get(path, leaves[0].sharding)
                    params |= codes_and_scales(path, jax.block_until_ready(jax.device_put(wide, place)), quantize)
                else:
                    params[path] = leaves[0]
        return traverse_util.unflatten_dict(params)

    def stored_arrays(self, part: str) -> Iterator[tuple[TreePath, np.ndarray]]:
        arrays = self._narrow.stored_arrays(part)
        if part != "decoder":
            yield from arrays
            return
        for param in self.params(part):
            leaves = [next(arrays)[1] for _ in _leaves(param.path)]
            yield param.path, self._wide(param.path, leaves)

    def decoder_array(self, path: TreePath) -> np.ndarray:
        return self._wide(path, [self._narrow.decoder_array(leaf) for leaf in _leaves(path)])

    def _wide(self, path: TreePath, leaves: list[np.ndarray]) -> np.ndarray:
        if not is_quantised(path):
            return leaves[0]
        return dequantise(path[-1], *leaves).astype(self.decoder_config.dtype)


def _leaves(path: TreePath) -> tuple[TreePath, ...]:
    """The paths of a parameter's arrays in the quantised bundle, in the order of writing."""
    return codes_and_scales_paths(path) if is_quantised(path) else (path,)


@functools.partial(jax.jit, static_argnames=("name", "dtype"))
def _dequantise(name: str, codes: jax.Array, scales: jax.Array, dtype: np.dtype) -> jax.Array:
    return dequantise(name, codes, scales).astype(dtype)

"""Parts of a bundle on disk: `config.json`, and weights as an Orbax checkpoint. Arrays are written and read one by one.

`checkpoints.bundle` says what the parts are.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import traverse_util

from emu3_jax import storage
from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import storage_path

FORMAT = 1  # of `config.json`
_CHUNK_BYTES = 64 << 20  # arrays are stored in chunks, so that a device that restores a slice reads only its chunks
_WRITE_BYTES = 64 << 20  # small arrays are written in groups of this size, because each commit waits for the disk


# ------------------------------------------------------------------------------------------------ writing


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array of a bundle that is loaded only when it is written."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class _LazyArrayHandler(ocp.type_handlers.NumpyHandler):
    """Saves leaves one after the other. A large array, or a group of small ones, is loaded, committed and freed.

    Orbax's own handlers hold all arrays of a tree at once. The files are the same as for NumPy leaves.
    """

    def __init__(self, written: Callable[[int], Any]):
        super().__init__()
        self._deepcopy_host_arrays = False  # Orbax 0.12.5 and later copy arrays by default; older versions do not
        self._written = written

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
        for group in in_groups(zip(values, infos, args, strict=True), lambda leaf: leaf[0].nbytes, _WRITE_BYTES):
            lazy, group_infos, group_args = zip(*group, strict=True)
            # The base class would do this in a thread, and an error there would also print a traceback.
            await self._background_serialize([array.load() for array in lazy], group_infos, group_args)
            self._written(sum(array.nbytes for array in lazy))
        return []


def in_groups(items: Iterable[Any], nbytes: Callable[[Any], int], limit: int) -> Iterator[list[Any]]:
    """Groups consecutive items of together at most `limit` bytes. A larger item is a group of its own."""
    group: list[Any] = []
    size = 0
    for item in items:
        if group and size + nbytes(item) > limit:
            yield group
            group, size = [], 0
        group.append(item)
        size += nbytes(item)
    if group:
        yield group


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Writes a part's `config.json`. The directory is made if it does not exist."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"format": FORMAT, **config}, indent=2) + "\n")


def write_part(
    directory: Path,
    config: Mapping[str, Any],
    arrays: Iterable[LazyArray],
    written: Callable[[int], Any] = int,
    compressed: bool = False,
) -> None:
    """Writes one part with weights. Memory holds one array at a time.

    Args:
        directory: directory of the part. It must not exist.
        config: contents of its `config.json`.
        arrays: its weights.
        written: function that gets the number of bytes after each write.
        compressed: compress the weights. This saves about a fifth of bfloat16 weights, but takes several times as long.
    """
    directory.mkdir()
    tree = traverse_util.unflatten_dict({a.path: a for a in arrays})
    registry = ocp.type_handlers.create_type_handler_registry(
        (LazyArray, _LazyArrayHandler(written)), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    # By default without compression: weights hardly compress, and trying takes longer than writing.
    alone = alone_options()
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry, use_compression=compressed, multiprocessing_options=alone
    )
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        checkpointer.save(storage_path(directory) / "weights", args=ocp.args.PyTreeSave(tree, save_args=save_args))
    write_config(directory, {"weights_bytes": size_on_disk(directory / "weights"), **config})


def alone_options() -> ocp.options.MultiprocessingOptions:
    """Options that make each process read and write on its own, without waiting for other processes."""
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process{index}"
    )


def size_on_disk(directory: Path) -> int:
    """The size of all files in a directory, local or in a bucket, in bytes."""
    if storage.is_remote(directory):
        return sum(item.size for item in storage.listing(directory).values())
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


# ------------------------------------------------------------------------------------------------ reading


def read_array(directory: Path, path: tuple[str, ...], index: int | None = None) -> np.ndarray:
    """Reads one array of an Orbax checkpoint, or the slice `index` along its first axis, and nothing else.

    Args:
        directory: directory of the checkpoint, from `storage.storage_place`.
        path: path of the array in its tree.
        index: index of the slice, or None for the whole array.

    Raises:
        Emu3Error: the array is missing or damaged.
    """
    database = os.fspath(directory)
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": storage.kvstore(directory), "path": ".".join(path)},
    }
    try:
        array = tensorstore.open(spec, open=True, read=True).result()
        return np.asarray((array if index is None else array[index]).read().result())
    except (OSError, ValueError) as error:
        storage.require_access(directory, error)
        reason = str(error).split("\n", 1)[0][:200]
        raise Emu3Error(f"{database}: {'/'.join(path)} cannot be read ({reason}); the files are damaged") from error

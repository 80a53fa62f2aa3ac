"""The tensors of a `torch.save` state dict (`pytorch_model.bin`). Its pickle lists them. They are read singly."""

import dataclasses
import io
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from emu3_jax.checkpoints.tensors import Tensor, strided_span
from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import limit, reading
from emu3_jax.printable import shown
from emu3_jax.unpickling import BadPickle, Function, Vocabulary, open_archive, ordered_dict, unpickle

_RESAVE = "save the checkpoint as safetensors (`model.save_pretrained(DIR)` in transformers) and convert that"
_MAX_RANK = 64  # most axes of a tensor; the limit of NumPy
# The tensors of a file may together be this many times as large as the file, because tied weights are stored once.
_MAX_SHARING = 4


@dataclasses.dataclass(frozen=True)
class _StorageType:
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    key: str
    elements: int


@dataclasses.dataclass(frozen=True)
class _View:
    """A strided view of a storage, in elements. Replaces the tensor that `torch._utils._rebuild_tensor_v2` builds."""

    storage: _Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor_v2(storage: Any, start: Any, shape: Any, strides: Any, *_: Any) -> _View:
    sound = isinstance(storage, _Storage) and type(shape) is tuple and type(strides) is tuple
    if not sound or len(shape) != len(strides) or len(shape) > _MAX_RANK:
        raise BadPickle("a tensor with an impossible storage, shape or stride")
    if not all(type(n) is int and n >= 0 for n in (start, *shape, *strides)):
        raise BadPickle("a tensor with an impossible offset, shape or stride")
    # A view that repeats its data (stride 0) could make a small file cost much work. No checkpoint has such views.
    if math.prod(shape) > storage.elements:
        raise BadPickle("a tensor that is larger than its storage")
    return _View(storage, start, shape, strides)


def _rebuild_parameter(view: Any, *_: Any) -> Any:
    return view


def _persistent(pid: Any) -> _Storage:
    match pid:
        case ("storage", _StorageType(dtype), str(key), _, int(elements)) if elements >= 0:
            return _Storage(dtype, key, elements)
    raise BadPickle(f"an unknown kind of persistent object: {shown(pid)}")


_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_VOCABULARY = Vocabulary(
    {
        ("collections", "OrderedDict"): Function(ordered_dict),
        ("torch._utils", "_rebuild_tensor_v2"): Function(_rebuild_tensor_v2),
        ("torch._utils", "_rebuild_parameter"): Function(_rebuild_parameter),
        **{("torch", name): _StorageType(np.dtype(dtype)) for name, dtype in _STORAGES.items()},
    },
    _persistent,
    "plain tensors",
    f"if you trust its author, {_RESAVE}",
)


def read_torch_file(file: Path) -> list[Tensor]:
    """Lists the tensors of a `torch.save` state dict.

    Raises:
      Emu3Error: the file is damaged, has the format from before torch 1.6, or names objects other than tensors.
    """
    with reading(file, _RESAVE):
        try:
            archive, root = open_archive(file, _RESAVE)
            with archive:
                entries = {info.filename: info for info in archive.infolist()}
                order = archive.read(f"{root}byteorder")[:20] if f"{root}byteorder" in entries else b"little"
                if order != b"little":
                    raise Emu3Error(f"{file}: byte order is {order!r}; only little-endian files are read; {_RESAVE}")
                views = unpickle(archive.read(f"{root}data.pkl"), file, _VOCABULARY)
            with file.open("rb") as stream:
                starts = {name: _data_offset(stream, info) for name, info in entries.items()}
        except zipfile.BadZipFile as error:
            raise Emu3Error(f"{file}: truncated, or not saved by torch 1.6 or newer ({error}); {_RESAVE}") from error
        except (ValueError, TypeError) as error:  # from the pickle, or from a call in it with wrong arguments
            if isinstance(error, Emu3Error):
                raise
            raise Emu3Error(f"{file}: its pickle is damaged ({error!s:.120}); {_RESAVE}") from error
        if isinstance(views, dict) and isinstance(views.get("state_dict"), dict):
            views = views["state_dict"]
        if not isinstance(views, dict) or not all(
            isinstance(k, str) and isinstance(v, _View) for k, v in views.items()
        ):
            raise Emu3Error(f"{file}: not a state dict of names and tensors; {_RESAVE}")
        tensors = [_tensor(file, name, view, root=root, entries=entries, starts=starts) for name, view in views.items()]
        limit(file, "bytes in all tensors", sum(t.nbytes for t in tensors), _MAX_SHARING * file.stat().st_size)
        return tensors


def _data_offset(stream: io.BufferedReader, info: zipfile.ZipInfo) -> int:
    """The offset of an entry's bytes. The local header repeats the name and may have a different extra field."""
    stream.seek(info.header_offset)
    header = stream.read(30)
    if len(header) < 30:
        raise zipfile.BadZipFile(f"no local header for {shown(info.filename)}")
    return info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def _tensor(
    file: Path,
    name: str,
    view: _View,
    *,
    root: str,
    entries: Mapping[str, zipfile.ZipInfo],
    starts: Mapping[str, int],
) -> Tensor:
    storage, entry = view.storage, f"{root}data/{view.storage.key}"
    end = view.start + strided_span(view.shape, view.strides)
    if entry not in entries or end * storage.dtype.itemsize > entries[entry].file_size:
        raise Emu3Error(f"{file}: tensor {shown(name)} lies outside its stored data; download or copy the file again")
    contiguous = tuple(math.prod(view.shape[i + 1 :]) for i in range(len(view.shape)))
    plain = view.strides == contiguous or math.prod(view.shape) <= 1
    offset = starts[entry] + view.start * storage.dtype.itemsize
    return Tensor(name, view.shape, storage.dtype, file, offset, None if plain else view.strides)

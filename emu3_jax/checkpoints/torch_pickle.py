"""`torch.save` files without torch and without running code: the pickle may name tensors and nothing else.

A `.bin` checkpoint is a zip of one pickle (`data.pkl`) and one uncompressed entry per storage. Unpickling normally
calls whatever the file names; here the few names that tensors need map to inert stand-ins and all others are refused.
"""

import collections
import dataclasses
import io
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from emu3_jax.checkpoints.tensors import Tensor, strided_span
from emu3_jax.errors import Emu3Error

_RESAVE = "save the checkpoint as safetensors (`model.save_pretrained(DIR)` in transformers) and convert that"


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
    """What `torch._utils._rebuild_tensor_v2` would have built: a strided view of a storage, in elements."""

    storage: _Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor_v2(storage: Any, start: Any, shape: Any, strides: Any, *_: Any) -> _View:
    numbers = (start, *shape, *strides)
    sound = isinstance(storage, _Storage) and all(type(n) is int and n >= 0 for n in numbers)
    if not sound or len(shape) != len(strides):
        raise pickle.UnpicklingError("a tensor with an impossible storage, offset, shape or stride")
    return _View(storage, start, tuple(shape), tuple(strides))


def _rebuild_parameter(view: Any, *_: Any) -> Any:
    return view


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
_ALLOWED: Mapping[tuple[str, str], Callable | _StorageType] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): _StorageType(np.dtype(dtype)) for name, dtype in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, file: Path):
        super().__init__(stream)
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        allowed = _ALLOWED.get((module, name))
        if allowed is None:
            raise Emu3Error(
                f"{self._file}: refused: its pickle asks for {module}.{name}, which plain tensors never need "
                f"and which could run code; if you trust its author, {_RESAVE}"
            )
        return allowed

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", _StorageType(dtype), str(key), _, int(elements)) if elements >= 0:
                return _Storage(dtype, key, elements)
        raise pickle.UnpicklingError(f"an unknown kind of persistent object: {pid!r:.80}")


def read_torch_file(file: Path) -> list[Tensor]:
    """Lists the tensors of a `torch.save` state dict.

    Raises:
      Emu3Error: the file is damaged, of the old format before torch 1.6, or names anything but tensors.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in entries if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise Emu3Error(f"{file}: not a torch.save file (it holds {len(pickles)} data.pkl); {_RESAVE}")
            root = pickles[0].removesuffix("data.pkl")
            order = archive.read(f"{root}byteorder") if f"{root}byteorder" in entries else b"little"
            if order != b"little":
                raise Emu3Error(f"{file}: byte order is {order!r}; only little-endian files are read; {_RESAVE}")
            views = _Unpickler(io.BytesIO(archive.read(pickles[0])), file).load()
        with file.open("rb") as stream:
            starts = {name: _data_offset(stream, file, info) for name, info in entries.items()}
    except zipfile.BadZipFile as error:
        raise Emu3Error(f"{file}: truncated, or not saved by torch 1.6 or newer ({error}); {_RESAVE}") from error
    except Emu3Error:
        raise
    except Exception as error:  # a hostile pickle can make the unpickler fail in any way
        raise Emu3Error(f"{file}: its pickle is damaged ({type(error).__name__}: {error}); {_RESAVE}") from error
    if isinstance(views, dict) and isinstance(views.get("state_dict"), dict):
        views = views["state_dict"]
    if not isinstance(views, dict) or not all(isinstance(k, str) and isinstance(v, _View) for k, v in views.items()):
        raise Emu3Error(f"{file}: not a state dict of names and tensors; {_RESAVE}")
    return [_tensor(file, name, view, root=root, entries=entries, starts=starts) for name, view in views.items()]


def _data_offset(stream: io.BufferedReader, file: Path, info: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: the local header repeats the name and may carry another extra field."""
    if info.compress_type != zipfile.ZIP_STORED and not info.filename.endswith("data.pkl"):
        raise Emu3Error(f"{file}: entry {info.filename!r} is compressed, which torch.save never does; {_RESAVE}")
    stream.seek(info.header_offset)
    header = stream.read(30)
    if len(header) < 30:
        raise zipfile.BadZipFile(f"no local header for {info.filename!r}")
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
        raise Emu3Error(f"{file}: tensor {name!r} lies outside its stored data; download or copy the file again")
    contiguous = tuple(math.prod(view.shape[i + 1 :]) for i in range(len(view.shape)))
    plain = view.strides == contiguous or math.prod(view.shape) <= 1
    offset = starts[entry] + view.start * storage.dtype.itemsize
    return Tensor(name, view.shape, storage.dtype, file, offset, None if plain else view.strides)

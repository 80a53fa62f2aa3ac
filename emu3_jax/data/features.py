"""Reads the reference's prepared data, a JSON list of `.pth` files, without running code in the files.

Each file was saved by `torch.save`: {"name": str, "images": integer [h, w] array or tensor, "texts": str}.
"""

import hashlib
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from emu3_jax.data.records import Record, check_text
from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import MAX_JSON_BYTES, limit, parse_json, plain_file, read_bytes, reading
from emu3_jax.printable import shown
from emu3_jax.unpickling import BadPickle, Filled, Function, Vocabulary, open_archive, ordered_dict, unpickle

_MAX_BYTES = 64 << 20  # of a file; the codes of a picture take about 100 kB
_LIST = "give the train.json of prepare_data.py"
_REMEDY = "write it again with the reference's prepare_data.py, or prepare the pictures themselves"


class FeatureRecords:
    """The records of a feature list: a JSON object with `prefix`, a directory, and `path_list`, the files in it."""

    def __init__(self, path: Path, codebook_size: int):
        """Reads the list.

        Args:
            path: the JSON file.
            codebook_size: number of codes of the model; every code must be smaller.

        Raises:
            Emu3Error: the list cannot be read, or is empty.
        """
        text = read_bytes(path, MAX_JSON_BYTES, _LIST)
        data = parse_json(text, path, _LIST)
        names = data.get("path_list") if isinstance(data, dict) else None
        prefix = data.get("prefix") if isinstance(data, dict) else None
        if not isinstance(prefix, str) or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise Emu3Error(
                f'{path} must be an object with "prefix" (a directory) and "path_list" (a list of .pth files)'
            )
        if not names:
            raise Emu3Error(f"{path}: path_list is empty: list at least one .pth file")
        self._path, self._prefix, self._names, self._codebook_size = path, Path(prefix), names, codebook_size
        self.digest = hashlib.sha256(text).hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    def _file(self, index: int) -> Path:
        """Path of the file of entry `index`. Raises an `Emu3Error` if it does not exist or is not a regular file."""
        with reading(f"{self._path} path_list[{index}]", "correct prefix or path_list"):
            file = self._prefix / self._names[index]
            if not file.exists():
                raise Emu3Error(f"{self._path} path_list[{index}]: {file} does not exist: correct prefix or path_list")
            plain_file(file)
            return file

    def check(self, index: int) -> None:
        """Raises an `Emu3Error` if the file of entry `index` does not exist."""
        self._file(index)

    def identity(self, index: int) -> bytes:
        """A hash of the file of entry `index`, which decides between training and validation."""
        return hashlib.sha256(read_bytes(self._file(index), _MAX_BYTES, _REMEDY)).digest()

    def __getitem__(self, index: int) -> Record:
        """Reads record `index`. Raises an `Emu3Error` that names the file if it is not a legal feature file."""
        file = self._file(index)
        data = _load_feature(file)
        try:
            codes = data["images"]
            if not isinstance(codes, np.ndarray) or codes.ndim != 2 or codes.size == 0 or codes.dtype.kind not in "iu":
                raise Emu3Error(f"images is {_kind(codes)}: it must be an integer array [h, w]")
            if codes.min() < 0 or codes.max() >= self._codebook_size:
                wrong = codes.min() if codes.min() < 0 else codes.max()
                raise Emu3Error(f"images contains code {wrong}: this model's codes are 0 to {self._codebook_size - 1}")
            text = check_text("texts", data["texts"])
            return Record(check_text("name", data["name"]), text, codes.astype(np.int32))
        except KeyError as error:
            raise Emu3Error(f"{file}: has no {error}: {_REMEDY}") from error
        except Emu3Error as error:
            raise Emu3Error(f"{file}: {error}; {_REMEDY}") from error


def _load_feature(file: Path) -> dict[str, Any]:
    """Reads the dict in a `.pth` file. Arrays and tensors become NumPy arrays.

    Raises:
        Emu3Error: the file is damaged, too large, or older than torch 1.6, or its pickle asks for a function or class
            that is not in `_NAMES`.
    """
    with reading(file, _REMEDY):
        limit(file, "bytes", file.stat().st_size, _MAX_BYTES)
        try:
            archive, root = open_archive(file, _REMEDY)
            with archive:
                persistent = _Storages(archive, root).read
                vocabulary = Vocabulary(_NAMES, persistent, "codes and texts", _REMEDY)
                data = unpickle(archive.read(f"{root}data.pkl"), file, vocabulary)
        except zipfile.BadZipFile as error:
            raise Emu3Error(f"{file}: truncated, or not saved by torch 1.6 or newer ({error}): {_REMEDY}") from error
        except (ValueError, TypeError, KeyError) as error:  # a damaged pickle, or wrong arguments of a call in it
            if isinstance(error, Emu3Error):
                raise
            raise Emu3Error(f"{file}: its pickle is damaged ({error!s:.120}): {_REMEDY}") from error
    if not isinstance(data, dict):
        raise Emu3Error(f"{file}: holds {_kind(data)}, not a dict of name, images and texts: {_REMEDY}")
    return {key: value.contents if isinstance(value, _Array) else value for key, value in data.items()}


class _Storages:
    """The tensor storages of a file. Each is read once."""

    def __init__(self, archive: zipfile.ZipFile, root: str):
        self._archive, self._root = archive, root
        self._read: dict[str, bytes] = {}

    def read(self, pid: Any) -> np.ndarray:
        match pid:
            case ("storage", np.dtype() as dtype, str(key), _, int()):
                if key not in self._read:
                    self._read[key] = self._archive.read(f"{self._root}data/{key}")
                return np.frombuffer(self._read[key], dtype)
        raise BadPickle(f"an unknown kind of persistent object: {shown(pid)}")


class _DType(Filled):
    """Replaces `numpy.dtype` in the pickle. Allows little-endian integers only."""

    def __init__(self, code: Any):
        kinds = {"i8": "<i8", "i4": "<i4", "i2": "<i2", "u2": "<u2", "u1": "u1"}
        if type(code) is not str or code not in kinds:
            raise BadPickle(f"an array of {shown(code)}")
        self.dtype = np.dtype(kinds[code])

    def fill(self, state: Any) -> None:
        if type(state) is not tuple or len(state) < 2 or state[1] not in ("<", "|"):
            raise BadPickle(f"byte order {shown(state)}")


class _Array(Filled):
    """Replaces `numpy.ndarray` in the pickle.

    Attributes:
        contents: the array; None until the pickle has filled it.
    """

    def __init__(self) -> None:
        self.contents: np.ndarray | None = None

    def fill(self, state: Any) -> None:
        match state:
            case (_, tuple() as shape, _DType() as kind, bool() as fortran, bytes() as data):
                if all(type(n) is int and n >= 0 for n in shape):
                    self.contents = np.frombuffer(data, kind.dtype).reshape(shape, order="F" if fortran else "C")
                    return
        raise BadPickle("an array with an impossible shape or dtype")


def _array(*_: Any) -> _Array:
    return _Array()


def _dtype(code: Any, *_: Any) -> _DType:
    return _DType(code)


def _encode(text: Any, encoding: Any) -> bytes:
    """Replaces `_codecs.encode` in the pickle. Protocols before 3 encode bytes with it."""
    if type(text) is not str or encoding != "latin1":
        raise BadPickle(f"bytes in {shown(encoding)}")
    return text.encode("latin1")


def _rebuild_tensor(storage: Any, start: Any, shape: Any, strides: Any, *_: Any) -> np.ndarray:
    """Replaces `torch._utils._rebuild_tensor_v2` in the pickle. Allows contiguous tensors only, as encoders produce."""
    sound = isinstance(storage, np.ndarray) and type(shape) is tuple and type(strides) is tuple and len(shape) <= 4
    if not sound or not all(type(n) is int and n >= 0 for n in (start, *shape, *strides)):
        raise BadPickle("a tensor with an impossible storage, offset, shape or stride")
    contiguous = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    if strides != contiguous:
        raise BadPickle(f"a tensor with strides {shown(strides)}")
    return storage[start : start + math.prod(shape)].reshape(shape)


_NAMES: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): Function(_encode),
    ("numpy", "ndarray"): "ndarray",  # never called, only passed to `_reconstruct` as first argument
    ("numpy", "dtype"): Function(_dtype),
    ("numpy.core.multiarray", "_reconstruct"): Function(_array),
    ("numpy._core.multiarray", "_reconstruct"): Function(_array),
    ("collections", "OrderedDict"): Function(ordered_dict),
    ("torch._utils", "_rebuild_tensor_v2"): Function(_rebuild_tensor),
    ("torch", "LongStorage"): np.dtype("<i8"),
    ("torch", "IntStorage"): np.dtype("<i4"),
    ("torch", "ShortStorage"): np.dtype("<i2"),
}


def _kind(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__

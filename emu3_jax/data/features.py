"""The reference's own prepared data: a JSON list of `.pth` files, read without running what is in them.

Each file is `torch.save` of {"name": str, "images": integer [h, w] array or tensor, "texts": str}. Unpickling normally
calls whatever a file names; here the few names that such a dict needs map to inert stand-ins, and all others are
refused.
"""

import hashlib
import io
import json
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from emu3_jax.data.records import Record, check_text
from emu3_jax.errors import Emu3Error

_MAX_BYTES = 1 << 30  # unpacked; the codes of a picture are about 100 kB
_REMEDY = "write it again with the reference's prepare_data.py, or prepare the pictures themselves"


class FeatureRecords:
    """The records of a feature list: a JSON object of `prefix`, a directory, and `path_list`, the files in it."""

    def __init__(self, path: Path, codebook_size: int):
        """Raises `Emu3Error` if the list cannot be read or is empty. Codes must be below `codebook_size`."""
        try:
            text = Path(path).read_bytes()
            data = json.loads(text)
        except OSError as error:
            raise Emu3Error(f"cannot read {path}: {error.strerror}; give the list.json of prepare_data.py") from error
        except ValueError as error:
            raise Emu3Error(f"{path} is not JSON ({error}): give the train.json of prepare_data.py") from error
        names = data.get("path_list") if isinstance(data, dict) else None
        prefix = data.get("prefix") if isinstance(data, dict) else None
        if not isinstance(prefix, str) or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise Emu3Error(f'{path} must be an object of "prefix" (a directory) and "path_list" (names of .pth files)')
        if not names:
            raise Emu3Error(f"{path}: path_list is empty: list at least one .pth file")
        self._path, self._prefix, self._names, self._codebook_size = path, Path(prefix), names, codebook_size
        self.digest = hashlib.sha256(text).hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    def check(self, index: int) -> None:
        """Raises an `Emu3Error` if the file of entry `index` is not there."""
        file = self._prefix / self._names[index]
        if not file.is_file():
            raise Emu3Error(f"{self._path} path_list[{index}]: there is no {file}: correct prefix or path_list")

    def __getitem__(self, index: int) -> Record:
        """Record `index`. Raises `Emu3Error` that names the file if it is anything but a feature file."""
        self.check(index)
        file = self._prefix / self._names[index]
        data = _load_feature(file)
        try:
            codes = data["images"]
            if not isinstance(codes, np.ndarray) or codes.ndim != 2 or codes.size == 0 or codes.dtype.kind not in "iu":
                raise Emu3Error(f"images is {_kind(codes)}: it must be an integer array [h, w]")
            if codes.min() < 0 or codes.max() >= self._codebook_size:
                wrong = codes.min() if codes.min() < 0 else codes.max()
                raise Emu3Error(f"images holds code {wrong}: this model's codes are 0 to {self._codebook_size - 1}")
            text = check_text("texts", data["texts"])
            return Record(check_text("name", data["name"]), text, codes.astype(np.int32))
        except KeyError as error:
            raise Emu3Error(f"{file}: has no {error}: {_REMEDY}") from error
        except Emu3Error as error:
            raise Emu3Error(f"{file}: {error}; {_REMEDY}") from error


def _load_feature(file: Path) -> dict[str, Any]:
    """The dict of one `.pth` file; arrays and tensors as NumPy arrays.

    Raises:
        Emu3Error: the file is damaged, is older than torch 1.6's format, or its pickle names anything else.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            if sum(info.file_size for info in archive.infolist()) > _MAX_BYTES:
                raise Emu3Error(f"{file}: unpacks to more than {_MAX_BYTES >> 30} GiB: {_REMEDY}")
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise Emu3Error(f"{file}: not a torch.save file (it holds {len(pickles)} data.pkl): {_REMEDY}")
            data = _Unpickler(archive, pickles[0], file).load()
    except zipfile.BadZipFile as error:
        raise Emu3Error(f"{file}: truncated, or not saved by torch 1.6 or newer ({error}): {_REMEDY}") from error
    except OSError as error:
        raise Emu3Error(f"cannot read {file}: {error.strerror or error}; {_REMEDY}") from error
    except Emu3Error:
        raise
    except Exception as error:  # a hostile pickle can make the unpickler fail in any way
        raise Emu3Error(f"{file}: its pickle is damaged ({type(error).__name__}: {error}): {_REMEDY}") from error
    if not isinstance(data, dict):
        raise Emu3Error(f"{file}: holds {_kind(data)}, not a dict of name, images and texts: {_REMEDY}")
    return {key: value.array() if isinstance(value, _Array) else value for key, value in data.items()}


class _DType:
    """Stands in for `numpy.dtype`: integers in little-endian order."""

    def __init__(self, code: str, *_: Any):
        self.dtype = np.dtype({"i8": "<i8", "i4": "<i4", "i2": "<i2", "u2": "<u2", "u1": "u1"}[code])

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", "|"):
            raise pickle.UnpicklingError(f"byte order {state[1]!r}")


class _Array:
    """Stands in for `numpy.ndarray`, which unpickling makes empty and then fills."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        self._contents = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if fortran else "C")

    def array(self) -> np.ndarray:
        return self._contents


def _reconstruct(kind: type, *_: Any) -> _Array:
    return kind()


def _encode(text: str, encoding: str) -> bytes:
    """Stands in for `_codecs.encode`, by which pickles before protocol 3 spell bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding!r}")
    return text.encode("latin1")


def _rebuild_tensor(storage: np.ndarray, start: int, shape: tuple, strides: tuple, *_: Any) -> np.ndarray:
    """Stands in for `torch._utils._rebuild_tensor_v2`: contiguous tensors, as encoding gives."""
    contiguous = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    if strides != contiguous or start < 0:
        raise pickle.UnpicklingError(f"a tensor with strides {strides}")
    return storage[start : start + math.prod(shape)].reshape(shape)


_ALLOWED: Mapping[tuple[str, str], Callable | np.dtype] = {
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("collections", "OrderedDict"): dict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch", "LongStorage"): np.dtype("<i8"),
    ("torch", "IntStorage"): np.dtype("<i4"),
    ("torch", "ShortStorage"): np.dtype("<i2"),
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, name: str, file: Path):
        super().__init__(io.BytesIO(archive.read(name)))
        self._archive, self._root, self._file = archive, name.removesuffix("data.pkl"), file

    def find_class(self, module: str, name: str) -> Any:
        allowed = _ALLOWED.get((module, name))
        if allowed is None:
            raise Emu3Error(
                f"{self._file}: refused: its pickle asks for {module}.{name}, which codes and texts never need and "
                f"which could run code; {_REMEDY}"
            )
        return allowed

    def persistent_load(self, pid: Any) -> np.ndarray:
        match pid:
            case ("storage", np.dtype() as dtype, str(key), _, int()):
                return np.frombuffer(self._archive.read(f"{self._root}data/{key}"), dtype)
        raise pickle.UnpicklingError(f"an unknown kind of persistent object: {pid!r:.80}")


def _kind(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__

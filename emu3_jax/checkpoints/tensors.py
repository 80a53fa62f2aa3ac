"""Tensors in published checkpoint files: found from headers alone, read one at a time, written one at a time.

safetensors' own `safe_open` maps whole files, whose pages then count as resident memory, and `save_file` wants a
whole shard at hand; the format is a JSON header and raw bytes, so both directions are plain reads and writes here.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from emu3_jax.errors import Emu3Error

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_AGAIN = "download or copy it again"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file, not read yet. `strides` counts elements; None means contiguous rows."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Reads this tensor's bytes and nothing else of the file."""
        if self.strides is None:
            return self._read_elements(math.prod(self.shape)).reshape(self.shape)
        span = strided_span(self.shape, self.strides)
        bytes_per_step = tuple(s * self.dtype.itemsize for s in self.strides)
        flat = self._read_elements(span)
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, self.shape, bytes_per_step, writeable=False))

    def _read_elements(self, count: int) -> np.ndarray:
        wanted = count * self.dtype.itemsize
        raw = np.fromfile(self.file, np.uint8, count=wanted, offset=self.offset)
        if raw.size != wanted:
            raise Emu3Error(f"{self.file}: ends inside tensor {self.name!r}: the file is truncated; {_AGAIN}")
        return raw.view(self.dtype)


def strided_span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """How many elements lie between the first and the last of a strided tensor, both included."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def read_safetensors_header(file: Path) -> list[Tensor]:
    """Lists the tensors of one safetensors file and checks that the file is as long as its header says."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise Emu3Error(f"{file}: not a whole safetensors file ({size} bytes, header of {length}); {_AGAIN}")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = [(n, e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for n, e in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Emu3Error(f"{file}: damaged safetensors header ({error!r}); {_AGAIN}") from error
    tensors = []
    for name, kind, shape, begin, end in entries:
        if kind not in _DTYPES:
            raise Emu3Error(f"{file}: tensor {name!r} has dtype {kind}; legal are {', '.join(_DTYPES)}")
        tensor = Tensor(name, shape, _DTYPES[kind], file, 8 + length + begin)
        if end - begin != tensor.nbytes or begin < 0:
            raise Emu3Error(
                f"{file}: tensor {name!r} has {end - begin} bytes, its shape needs {tensor.nbytes}; {_AGAIN}"
            )
        if 8 + length + end > size:
            missing = 8 + length + end - size
            raise Emu3Error(f"{file}: truncated: tensor {name!r} ends {missing} bytes past the end; {_AGAIN}")
        tensors.append(tensor)
    return tensors


def write_safetensors(
    file: Path, entries: Sequence[tuple[str, tuple[int, ...], np.dtype]], arrays: Iterable[np.ndarray]
) -> None:
    """Writes a safetensors file from names, shapes and dtypes, then the arrays in the same order, one at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, dtype in entries:
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with file.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for (name, shape, dtype), array in zip(entries, arrays, strict=True):
            if array.dtype != dtype or array.size != math.prod(shape):
                raise ValueError(f"{name}: {array.dtype}{array.shape} given, {dtype}{shape} promised")
            stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())

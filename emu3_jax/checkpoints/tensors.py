"""Tensors in published checkpoint files. Only headers are read to list them. Tensors are read and written singly.

The library safetensors needs more memory: `safe_open` maps whole files, whose pages count as resident memory, and
`save_file` needs a whole shard in memory. The format is a JSON header and raw bytes, so this module reads and writes
it directly.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from emu3_jax.errors import Emu3Error
from emu3_jax.fields import is_whole
from emu3_jax.foreign import AGAIN, parse_json, plain_file, reading
from emu3_jax.printable import shown

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
_MAX_HEADER = 100_000_000  # bytes; the limit of the format
_MAX_RANK = 64  # most axes of a tensor; the limit of NumPy


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file, not read yet. `strides` are in elements, or None for contiguous rows."""

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
        """Reads this tensor, and no other bytes of the file."""
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
            raise Emu3Error(f"{self.file}: ends inside tensor {shown(self.name)}: the file is truncated; {AGAIN}")
        return raw.view(self.dtype)


def strided_span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """The number of elements from the first to the last element of a strided tensor, both included."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def read_safetensors_header(file: Path) -> list[Tensor]:
    """Lists the tensors of one safetensors file, in the order of their data.

    Refuses what the safetensors library refuses: above all, data that overlap, leave gaps or do not fill the file.

    Raises:
      Emu3Error: the file is absent, truncated or damaged, or has a dtype that this package does not read.
    """
    with reading(file):
        plain_file(file)
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise Emu3Error(f"{file}: not a whole safetensors file ({size} bytes, header of {length}); {AGAIN}")
            raw = stream.read(length)
        entries = _entries(raw, file)
        tensors = [_tensor(file, 8 + length, *entry) for entry in entries]
    end = 8 + length
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != end:
            what = "overlaps the one before it" if tensor.offset < end else "begins after a gap"
            raise Emu3Error(f"{file}: damaged safetensors header: tensor {shown(tensor.name)} {what}; {AGAIN}")
        end += tensor.nbytes
    if end > size:
        raise Emu3Error(f"{file}: truncated: its tensors end {end - size} bytes past the end; {AGAIN}")
    if end < size:
        raise Emu3Error(f"{file}: damaged safetensors header: {size - end} bytes belong to no tensor; {AGAIN}")
    return tensors


def _entries(raw: bytes, file: Path) -> list[tuple[str, dict[str, Any]]]:
    """The tensor names in a header, with the entry of each."""

    header = parse_json(raw, file, unique=True)
    if not isinstance(header, dict):
        raise Emu3Error(f"{file}: damaged safetensors header: it is no object; {AGAIN}")
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not _is_metadata(metadata):
        raise Emu3Error(f"{file}: damaged safetensors header: __metadata__ is {shown(metadata)}; {AGAIN}")
    return list(header.items())


def _is_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(is_whole(n, 0) and n < 1 << 63 for n in value)


def _is_metadata(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _tensor(file: Path, start: int, name: str, entry: Any) -> Tensor:
    """One tensor of a safetensors file whose data begin at `start`."""
    where = f"{file}: damaged safetensors header: tensor {shown(name)}"
    if not isinstance(entry, dict) or name != name.encode(errors="replace").decode():
        raise Emu3Error(f"{where} is {shown(entry)}; {AGAIN}")
    kind, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not _is_counts(shape) or not _is_counts(offsets) or len(offsets) != 2 or len(shape) > _MAX_RANK:
        raise Emu3Error(f"{where} has shape {shown(shape)} and data_offsets {shown(offsets)}; {AGAIN}")
    if not isinstance(kind, str):
        raise Emu3Error(f"{where} has dtype {shown(kind)}; {AGAIN}")
    if kind not in _DTYPES:
        raise Emu3Error(f"{file}: tensor {shown(name)} has dtype {kind:.20}; legal are {', '.join(_DTYPES)}")
    begin, end = offsets
    tensor = Tensor(name, tuple(shape), _DTYPES[kind], file, start + begin)
    if end - begin != tensor.nbytes:
        needed = f"has {end - begin} bytes, its shape needs {shown(tensor.nbytes)}"
        raise Emu3Error(f"{file}: tensor {shown(name)} {needed}; {AGAIN}")
    return tensor


def write_safetensors(
    file: Path, entries: Sequence[tuple[str, tuple[int, ...], np.dtype]], arrays: Iterable[np.ndarray]
) -> None:
    """Writes the header from names, shapes and dtypes, then the arrays one at a time. `arrays` has the same order."""
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

"""Reads and writes files of codes, the output of `tokenize`: an `.npz`, a zip with one `.npy` file per array."""

import io
import os
import pathlib
import unicodedata
import zipfile
from collections.abc import Mapping, Sequence
from typing import IO

import numpy as np

from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import file_name, limit, plain_file, reading
from emu3_jax.media.sizes import MAX_PIXELS
from emu3_jax.printable import shown

MAX_ARRAYS = 100_000
# A code stands for 8x8 pixels and, in a clip, for four frames.
MAX_FRAME_CODES = MAX_PIXELS // 64
MAX_CODES = 1 << 22  # codes in an array: 3 GiB of frames, which stay in memory until they are written
MAX_BYTES = 1 << 29  # bytes of all arrays together
_REMEDY = "make one with emu3-jax tokenize"
_ENDING = ".npy"
_MAX_HEADER = 1000  # bytes; headers that NumPy writes for codes have 128
# For each version of the format: bytes of the length field, and the reader of the header. Version 3 differs from
# version 2 only in the encoding of field names, which arrays of codes do not have.
_HEADERS = {
    (1, 0): (2, np.lib.format.read_array_header_1_0),
    (2, 0): (4, np.lib.format.read_array_header_2_0),
    (3, 0): (4, np.lib.format.read_array_header_2_0),
}


def save_codes(path: str | os.PathLike, codes: Mapping[str, np.ndarray]) -> None:
    """Writes arrays to an `.npz` file. `np.savez` cannot write an array named "file", which is one of its arguments.

    Args:
        path: the file. Pass the temporary path of `files.new_file`, so that a failed write leaves nothing.
        codes: arrays by name.
    """
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in codes.items():
            with archive.open(name + _ENDING, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.asarray(array), allow_pickle=False)


def load_codes(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads an `.npz` file of codes.

    The sizes in the headers are checked before memory is allocated. Every name is a legal file name, and no two names
    denote the same file. Pickled objects are refused and never run.

    Returns:
        Integer arrays [h, w] (pictures) or [t, h, w] (clips), by name.

    Raises:
        Emu3Error: the file is missing or not an `.npz`, or an array has another shape or dtype or is too large.
    """
    path = pathlib.Path(path)
    with reading(path, _REMEDY):
        plain_file(path)
        try:
            with zipfile.ZipFile(path) as archive:
                return _arrays(path, archive)
        except Emu3Error:
            raise
        except FileNotFoundError:
            raise
        except Exception as error:  # `zipfile` raises errors of many kinds, for example from zlib
            reason = str(error) or type(error).__name__
            raise Emu3Error(f"{path} is not a readable .npz of codes ({reason:.150}): {_REMEDY}") from error


def code_names(files: Sequence[pathlib.Path]) -> list[str]:
    """Returns the names under which the codes of these files are saved: the files' stems.

    Raises:
        Emu3Error: `load_codes` would refuse a stem, or two stems denote the same file.
    """
    names = [(file.resolve() if file.name in ("", "..") else file).stem for file in files]
    _check_names(names, [str(file) for file in files])
    return names


def _check_names(names: Sequence[str], where: Sequence[str]) -> None:
    """Raises an `Emu3Error` unless all names are legal file names that denote different files.

    Names that differ only in case or Unicode normal form are the same file on some file systems.
    """
    seen: dict[str, str] = {}
    for name, place in zip(names, where, strict=True):
        file_name(name, place)
        same = unicodedata.normalize("NFC", name).casefold()
        if same in seen:
            raise Emu3Error(f"{place}: {shown(seen[same])} and {shown(name)} would become one file: rename one")
        seen[same] = name


def _arrays(path: pathlib.Path, archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    members = archive.infolist()
    limit(path, "arrays", len(members), MAX_ARRAYS)
    if not members:
        raise Emu3Error(f"{path} holds no codes: {_REMEDY}")
    names = [member.filename.removesuffix(_ENDING) for member in members]
    _check_names(names, [str(path)] * len(names))
    arrays, left = {}, MAX_BYTES
    for name, member in zip(names, members, strict=True):
        if member.flag_bits & 1:
            raise Emu3Error(f"{path}: {shown(name)} is encrypted: {_REMEDY}")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise Emu3Error(f"{path}: {shown(name)} is compressed by method {member.compress_type}: {_REMEDY}")
        with archive.open(member) as stream:
            arrays[name] = _array(path, name, stream, left)
        left -= arrays[name].nbytes
    return arrays


def _array(path: pathlib.Path, name: str, stream: IO[bytes], left: int) -> np.ndarray:
    """Reads an array of at most `left` bytes. Do not use `np.load`: it allocates whatever size the header claims."""
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise Emu3Error(f"{path}: {shown(name)} is not a NumPy array: {_REMEDY}")
    width, read_header = _HEADERS[version]
    start = stream.read(width)  # length of the header; NumPy would read that many bytes before checking the number
    length = int.from_bytes(start, "little")
    limit(path, f"bytes in the header of {shown(name)}", length, _MAX_HEADER)
    shape, fortran, dtype = read_header(io.BytesIO(start + stream.read(length)))
    if dtype.kind not in "iu" or len(shape) not in (2, 3) or min(shape) < 1:
        raise Emu3Error(
            f"{path}: {shown(name)} is {dtype} {shown(shape)}: codes must be integers [h, w] or [t, h, w]; {_REMEDY}"
        )
    limit(path, f"codes in a frame of {shown(name)}", shape[-2] * shape[-1], MAX_FRAME_CODES)
    size = shape[0] * shape[1] * (shape[2] if len(shape) == 3 else 1)
    limit(path, f"codes in {shown(name)}", size, MAX_CODES)
    limit(path, f"bytes up to the end of {shown(name)}", size * dtype.itemsize + MAX_BYTES - left, MAX_BYTES)
    data = stream.read(size * dtype.itemsize)
    if len(data) != size * dtype.itemsize or stream.read(1):
        raise Emu3Error(f"{path}: {shown(name)} does not have as many codes as its header says: {_REMEDY}")
    array = np.frombuffer(bytearray(data), dtype)
    if fortran:
        return array.reshape(shape[::-1]).transpose()
    return array.reshape(shape)

"""Files of codes, as `tokenize` writes them: an `.npz`, that is, a zip of `.npy` files, one for each array."""

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
# A code is 8 pixels wide and high and, in a clip, four frames long.
MAX_FRAME_CODES = MAX_PIXELS // 64
MAX_CODES = 1 << 22  # of an array: 3 GiB of frames, which stay in memory until they are written
MAX_BYTES = 1 << 29  # of all arrays
_REMEDY = "make one with emu3-jax tokenize"
_ENDING = ".npy"
_MAX_HEADER = 1000  # bytes; NumPy pads its own to 128
# By version: bytes of a header's length, and what reads it. The third differs in names of fields, which codes have not.
_HEADERS = {
    (1, 0): (2, np.lib.format.read_array_header_1_0),
    (2, 0): (4, np.lib.format.read_array_header_2_0),
    (3, 0): (4, np.lib.format.read_array_header_2_0),
}


def save_codes(path: str | os.PathLike, codes: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as an `.npz`, as `np.savez` does, which takes arrays called "file" for its own arguments.

    Args:
        path: of the file; callers rename it when all is well (`files.new_file`).
        codes: arrays by name.
    """
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in codes.items():
            with archive.open(name + _ENDING, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.asarray(array), allow_pickle=False)


def load_codes(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads an `.npz` of integer arrays, [h, w] or [t, h, w], keyed by name.

    What its headers claim is checked before there is memory for it. Names are those of files in a directory, and no two
    name the same one.

    Raises:
        Emu3Error: the file is none, or an array is of another kind, or too large. Pickled objects are refused, not run.
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
        except Exception as error:  # of many kinds: zlib's, those of encryption, ...
            reason = str(error) or type(error).__name__
            raise Emu3Error(f"{path} is not a readable .npz of codes ({reason:.150}): {_REMEDY}") from error


def code_names(files: Sequence[pathlib.Path]) -> list[str]:
    """What the codes of files are called: by the files' stems.

    Raises:
        Emu3Error: a stem is no name that `load_codes` reads, or two are one name.
    """
    names = [(file.resolve() if file.name in ("", "..") else file).stem for file in files]
    _check_names(names, [str(file) for file in files])
    return names


def _check_names(names: Sequence[str], where: Sequence[str]) -> None:
    """Raises `Emu3Error` unless each is the name of a file in a directory, and no two of the same one.

    On some file systems capitals, and the ways to write an accent, make no difference.
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
    """An array of at most `left` bytes. `np.load` takes memory for what a header claims before it reads the data."""
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise Emu3Error(f"{path}: {shown(name)} is no array of NumPy's: {_REMEDY}")
    width, read_header = _HEADERS[version]
    start = stream.read(width)  # the header's length, which NumPy would read before it looks whether that is absurd
    length = int.from_bytes(start, "little")
    limit(path, f"bytes in the header of {shown(name)}", length, _MAX_HEADER)
    shape, fortran, dtype = read_header(io.BytesIO(start + stream.read(length)))
    if dtype.kind not in "iu" or len(shape) not in (2, 3) or min(shape) < 1:
        raise Emu3Error(f"{path}: {shown(name)} is {dtype} {shown(shape)}, codes are integers [h, w] or [t, h, w]")
    limit(path, f"codes in a frame of {shown(name)}", shape[-2] * shape[-1], MAX_FRAME_CODES)
    size = shape[0] * shape[1] * (shape[2] if len(shape) == 3 else 1)
    limit(path, f"codes in {shown(name)}", size, MAX_CODES)
    limit(path, f"bytes in {shown(name)} and what came before", size * dtype.itemsize + MAX_BYTES - left, MAX_BYTES)
    data = stream.read(size * dtype.itemsize)
    if len(data) != size * dtype.itemsize or stream.read(1):
        raise Emu3Error(f"{path}: {shown(name)} has not as many codes as its header says: {_REMEDY}")
    array = np.frombuffer(bytearray(data), dtype)
    if fortran:
        return array.reshape(shape[::-1]).transpose()
    return array.reshape(shape)

"""What a video file says of its own length: a copy that was cut off has less than that."""

import os
from pathlib import Path
from typing import BinaryIO

from emu3_jax.errors import Emu3Error

_BOXES_READ = 1_000_000  # a recording of a day in fragments of two seconds has 90,000
# Boxes at the top of an MP4 or QuickTime file. Whatever else stands after its end is no part of it.
_BOXES = {b"mdat", b"moov", b"moof", b"mfra", b"free", b"skip", b"wide", b"udta", b"meta", b"uuid", b"sidx", b"styp"}
_EBML, _SEGMENT, _CLUSTER = 0x1A45DFA3, 0x18538067, 0x1F43B675  # Matroska, WebM
_SLACK = 8  # some writers count the header of an AVI file twice


def check_whole(path: str | os.PathLike) -> None:
    """Raises `Emu3Error` where an MP4, QuickTime, Matroska, WebM or AVI file is shorter than it says.

    Players and decoders pass that over: what is missing may be sound only, or they take the last frame that is there
    for the end. Files that do not tell their length pass, and so does what is none of these.
    """
    found = Path(path).stat().st_size
    with open(path, "rb") as stream:
        head = stream.read(12)
        if head[4:8] in _BOXES | {b"ftyp", b"pnot"}:
            claimed = _boxes_end(stream, found)
        elif head[:4] == b"RIFF":
            claimed = _riff_end(stream, found)
        elif int.from_bytes(head[:4], "big") == _EBML:
            claimed = _segment_end(stream, found)
        else:
            return
    if claimed is not None and claimed > found:
        raise Emu3Error(
            f"{path} is cut off: it says that it has {claimed:,} bytes, and has {found:,}; give the whole file"
        )


def _boxes_end(stream: BinaryIO, found: int) -> int | None:
    position = 0
    for _ in range(_BOXES_READ):
        stream.seek(position)
        header = stream.read(16)
        if len(header) < 8:
            return position
        size, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if size == 1 and len(header) == 16:
            size = int.from_bytes(header[8:], "big")
        if size < 8:  # 0: up to the end of the file, wherever that is
            return None
        position += size
        if position > found:
            return position if kind in _BOXES else None
    return None


def _riff_end(stream: BinaryIO, found: int) -> int | None:
    """Long files are several such parts, one after the other."""
    position = 0
    while position < found:
        stream.seek(position)
        header = stream.read(8)
        size = int.from_bytes(header[4:], "little")
        if header[:4] != b"RIFF" or size in (0, 0xFFFFFFFF):  # not known when that was written
            return None
        position += 8 + size + size % 2
    return position - _SLACK


def _segment_end(stream: BinaryIO, found: int) -> int | None:
    """Where the segment ends; of one that was written live, without a length, where its last element does."""
    position, live = 0, False
    for _ in range(_BOXES_READ):
        stream.seek(position)
        kind, size = _ebml_number(stream, keep_marker=True), _ebml_number(stream)
        start = stream.tell()
        if kind == _SEGMENT and size is not None:
            return start + size
        if size is not None:
            position = start + size
        elif live and position < found == start:  # it is cut off within this header
            return found + 1
        elif kind in (_SEGMENT, _CLUSTER):  # goes on as long as there are elements
            position, live = start, True
        else:
            return None
        if live and position > found:
            return position
    return None


def _ebml_number(stream: BinaryIO, keep_marker: bool = False) -> int | None:
    """A number of as many bytes as its first one says; None where the file ends, or where all bits say "unknown"."""
    first = stream.read(1)
    length = 9 - first[0].bit_length() if first else 9
    rest = stream.read(length - 1) if length <= 8 else b""
    if length > 8 or len(rest) < length - 1:
        return None
    value = int.from_bytes(first + rest, "big")
    if keep_marker:
        return value
    value -= 1 << 7 * length
    return None if value == (1 << 7 * length) - 1 else value

"""Detects truncated video files: compares the length that the file's headers state with its actual length."""

import os
from pathlib import Path
from typing import BinaryIO

from emu3_jax.errors import Emu3Error

_BOXES_READ = 1_000_000  # a one-day recording in fragments of two seconds has 90,000
# Top-level boxes of an MP4 or QuickTime file. Bytes that do not begin with one of these are not part of the video.
_BOXES = {b"mdat", b"moov", b"moof", b"mfra", b"free", b"skip", b"wide", b"udta", b"meta", b"uuid", b"sidx", b"styp"}
_EBML, _SEGMENT, _CLUSTER = 0x1A45DFA3, 0x18538067, 0x1F43B675  # Matroska, WebM
_SLACK = 8  # some writers count the header of an AVI file twice


def check_whole(path: str | os.PathLike) -> None:
    """Raises an `Emu3Error` if an MP4, QuickTime, Matroska, WebM or AVI file is shorter than its headers state.

    Decoders do not report this: they treat the last frame that they find as the end. Files of other formats pass, and
    so do files that do not state their length.
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
        raise Emu3Error(f"{path} is cut off: it should have {claimed:,} bytes, but has {found:,}; give the whole file")


def _boxes_end(stream: BinaryIO, found: int) -> int | None:
    position, fragments = 0, False
    for _ in range(_BOXES_READ):
        stream.seek(position)
        header = stream.read(16)
        if len(header) < 8:  # after a fragment (moof, mdat), the first bytes of the next one; else bytes of others
            return position + 8 if header and fragments else position
        size, kind = int.from_bytes(header[:4], "big"), header[4:8]
        fragments |= kind == b"moof"
        if size == 1 and len(header) == 16:
            size = int.from_bytes(header[8:], "big")
        if size < 8:  # 0 means that the box extends to the end of the file, so its length is not stated
            return None
        position += size
        if position > found:
            return position if kind in _BOXES else None
    return None


def _riff_end(stream: BinaryIO, found: int) -> int | None:
    """End of the last RIFF part. A long AVI file consists of several parts."""
    position = 0
    while position < found:
        stream.seek(position)
        header = stream.read(8)
        size = int.from_bytes(header[4:], "little")
        if header[:4] != b"RIFF" or size in (0, 0xFFFFFFFF):  # the writer did not know the size yet
            return None
        position += 8 + size + size % 2
    return position - _SLACK


def _segment_end(stream: BinaryIO, found: int) -> int | None:
    """End of the segment. A segment from a live recording has no length; then the end of its last element."""
    position, live = 0, False
    for _ in range(_BOXES_READ):
        stream.seek(position)
        kind, size = _ebml_number(stream, keep_marker=True), _ebml_number(stream)
        start = stream.tell()
        if kind == _SEGMENT and size is not None:
            return start + size
        if size is not None:
            position = start + size
        elif live and position < found == start:  # the file ends inside this header
            return found + 1
        elif kind in (_SEGMENT, _CLUSTER):  # of unknown length: it ends after its last element
            position, live = start, True
        else:
            return None
        if live and position > found:
            return position
    return None


def _ebml_number(stream: BinaryIO, keep_marker: bool = False) -> int | None:
    """Reads an EBML number, whose first byte gives its length. Returns None at the end of the file or for "unknown"."""
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

"""LLaVA's JSON: a list of objects with an `image` and `conversations`, a list of turns of `human` and `gpt`.

JSON lines with one such object per line are also read. A file can hold millions of objects, so memory holds only their
positions.
"""

import array
import hashlib
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from emu3_jax.data.manifest import MAX_LINE, Manifest
from emu3_jax.data.records import check_conversation, check_text
from emu3_jax.data.sources.examples import Example, MediaFile, where_once
from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import inner_path, limit, parse_json, plain_file, reading
from emu3_jax.printable import printable, shown

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_TOKEN = re.compile(r"\s*<(?:image|video)>\s*")
_LEGAL = "give a JSON list of objects with conversations, in LLaVA's format"
# Matches brackets, and whole strings, so that brackets inside strings are skipped.
_MARKS = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[\]{}]', re.DOTALL)


class Conversations:
    """The conversations in a file of LLaVA's format."""

    def __init__(self, path: Path, images: Path | None = None):
        """Finds the objects.

        Args:
            path: the file. The ending `.jsonl` means one object per line.
            images: folder to which the paths of pictures are relative; by default the file's folder.

        Raises:
            Emu3Error: the file cannot be read, or is not a list of objects.
        """
        if images is not None and not images.is_dir():
            raise Emu3Error(f"--images {images} is not a folder: give the folder that paths in {path.name} start from")
        self._path, self._images = path, path.parent if images is None else images
        self._lines = Manifest(path) if path.suffix.lower() == ".jsonl" else None
        self._spans = np.zeros((0, 2), np.int64)
        if self._lines is not None:
            self.digest = self._lines.digest
            return
        with reading(path, _LEGAL):
            plain_file(path)
            self._spans, self.digest = _objects(path)
        if not len(self._spans):
            raise Emu3Error(f"{path} has no objects: {_LEGAL}")

    def __len__(self) -> int:
        return len(self._spans if self._lines is None else self._lines)

    def __getitem__(self, index: int) -> Example:
        """Reads example `index`. Raises an `Emu3Error` that names the object if it is not a legal conversation."""
        if self._lines is not None:
            where, text = f"{self._path} line {self._lines.line(index)}", self._lines.raw(index)
        else:
            where = f"{self._path} object {index}"
            start, size = map(int, self._spans[index])
            with reading(self._path, _LEGAL), self._path.open("rb") as stream:
                stream.seek(start)
                text = stream.read(size)
        try:
            return self._parse(parse_json(text, where, _LEGAL), where)
        except Emu3Error as error:
            raise Emu3Error(where_once(where, error)) from error

    def _parse(self, data: Any, where: str) -> Example:
        if not isinstance(data, dict):
            raise Emu3Error(f"{shown(data)} is not an object: {_LEGAL}")
        said = data.get("conversations")
        if not isinstance(said, list):
            raise Emu3Error(f"conversations is {shown(said)}: it must be a list of turns")
        media = [
            (kind, name)
            for kind in ("image", "video")
            for name in (data[kind] if isinstance(data.get(kind), list) else [data.get(kind)])
            if name is not None
        ]
        if len(media) > 1:
            raise Emu3Error("has several pictures, but a record can have only one: leave the object out, or split it")
        turns, tokens = [], 0
        for turn in said:
            if not isinstance(turn, dict) or turn.get("from") not in _ROLES:
                raise Emu3Error(f"turn {shown(turn)} is not from human or gpt: correct it, or leave the object out")
            value = check_text("value", turn.get("value"))
            tokens += len(_TOKEN.findall(value))
            turns.append({"role": _ROLES[turn["from"]], "text": _TOKEN.sub("\n", value).strip()})
        if tokens > 1:
            raise Emu3Error(f"its turns contain {tokens} pictures, but a record can have only one: leave it out")
        medium = None
        for kind, name in media:
            medium = MediaFile(self._images / inner_path(name, kind), clip=kind == "video")
        if tokens and medium is None:
            raise Emu3Error("a turn contains <image>, but the object has no image field: add it, or remove <image>")
        name = printable(data["id"])[:200] if isinstance(data.get("id"), str) else where
        return Example(where, name, "", medium, check_conversation(turns))


def _objects(path: Path) -> tuple[np.ndarray, str]:
    """Finds the elements of a JSON list.

    Returns:
        Position and length of each element, int64 [N, 2], and the SHA-256 of the file.
    """
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
        if not stream.tell():
            raise Emu3Error(f"{path} is empty: {_LEGAL}")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            spans = array.array("q")
            for number, (start, end) in enumerate(_elements(data, path)):
                limit(f"{path} object {number}", "bytes", end - start, MAX_LINE)
                spans.extend((start, end - start))
    return np.frombuffer(spans, np.int64).reshape(-1, 2), digest.hexdigest()


def _elements(data: mmap.mmap, path: Path) -> Iterator[tuple[int, int]]:
    """Yields start and end of each object in a JSON list of objects. Raises an `Emu3Error` if it is something else."""
    depth, start, opened = 0, 0, False
    for mark in _MARKS.finditer(data):
        kind = data[mark.start() : mark.start() + 1]
        if kind in (b"[", b"{"):
            if depth == 0 and (opened or kind != b"[" or data[: mark.start()].strip(b"\xef\xbb\xbf \t\r\n")):
                break
            opened = True
            if depth == 1:
                start = mark.start()
            depth += 1
        elif kind in (b"]", b"}"):
            depth -= 1
            if depth == 1:
                yield start, mark.end()
            elif depth == 0:
                if data[mark.end() : mark.end() + 64].strip():
                    break
                return
        elif depth < 2:
            break
    raise Emu3Error(f"{path} is not a JSON list of objects, or is cut off: {_LEGAL}")

"""Reads the JSONL manifest, the native input of `prepare`. Each line is an object with these fields:

    {"image": PATH or "clip": PATH, "text": ..., "conversation": [{"role": ..., "text": ...}, ...], "name": ...}
    {"document": [{"text": ...} or {"image": PATH}, ...], "name": ...}

Paths are relative to the manifest. A line without image and clip is plain text. Every line needs text, conversation or
document. The parts of a document may have roles, see `records.check_roles`. A field with value null counts as absent.
"""

import array
import dataclasses
import hashlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from emu3_jax.data.records import Turn, check_conversation, check_roles, check_text
from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import limit, local_path, parse_json, plain_file, reading
from emu3_jax.media.clips import Clip
from emu3_jax.printable import shown

MAX_LINE = 16 << 20  # bytes of a line; a whole book has a few million
_MAX_AREA = 1 << 26  # pixels; such a picture takes 200 MB in each thread
_FIELDS = ("image", "clip", "text", "conversation", "document", "name")
_PART_FIELDS = ("role", "text", "image")
_MOST_PARTS = 10_000  # of a document; each picture of it takes dozens of positions at least


@dataclasses.dataclass(frozen=True)
class EntryPart:
    """A part of a document: a text, or with `image` a picture. `role` is None in a document without roles."""

    role: str | None
    text: str
    image: Path | None


@dataclasses.dataclass(frozen=True)
class Entry:
    """A checked line of a manifest. At most one of `image`, `clip` and `document` is set."""

    name: str
    text: str
    image: Path | None
    clip: Path | None
    conversation: tuple[Turn, ...]
    document: tuple[EntryPart, ...]


class Manifest:
    """A manifest file. Memory holds only the positions of its lines.

    Attributes:
        path: the file.
        digest: SHA-256 of its contents.
    """

    def __init__(self, path: Path):
        """Finds the lines. Raises an `Emu3Error` if the file cannot be read, has no lines, or a line is too long."""
        self.path = local_path(path)
        digest, place = hashlib.sha256(), 0
        places = array.array("q")  # number and position of each line in turn; a list of pairs needs 8 times the memory
        with reading(path, "give a JSONL manifest"):
            plain_file(path)
            with self.path.open("rb") as stream:
                for number in itertools.count(1):
                    line = stream.readline(MAX_LINE + 1)
                    if not line:
                        break
                    limit(f"{path} line {number}", "bytes or more", len(line), MAX_LINE)
                    if line.strip():
                        places.extend((number, place))
                    digest.update(line)
                    place += len(line)
        if not places:
            raise Emu3Error(f"{path} has no lines: write one JSON object per line, with image or clip, and text")
        self._places = np.frombuffer(places, np.int64).reshape(-1, 2)
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._places)

    def line(self, index: int) -> int:
        """Line number in the file, from 1, of entry `index`. Blank lines are not entries."""
        return int(self._places[index, 0])

    def raw(self, index: int) -> bytes:
        """Reads the line of entry `index` as bytes."""
        with reading(self.path, "give a JSONL manifest"), self.path.open("rb") as stream:
            stream.seek(int(self._places[index, 1]))
            return stream.readline(MAX_LINE)

    def __getitem__(self, index: int) -> Entry:
        """Reads entry `index`. Raises an `Emu3Error` if its line does not have the form in the module's docstring."""
        return self.read(index)[0]

    def read(self, index: int, *further: str) -> tuple[Entry, dict[str, Any]]:
        """Reads entry `index`, whose line may have `further` fields. Returns the entry, and the values of these fields.

        The value of a field that the line lacks is None.

        Raises:
            Emu3Error: the line does not have the form in the module's docstring. The further fields are not checked.
        """
        number = self.line(index)
        where = f"{self.path} line {number}"
        data = parse_json(self.raw(index), where, "write one JSON object per line")
        try:
            return self._parse(data, number, further), {field: data.get(field) for field in further}
        except Emu3Error as error:
            raise Emu3Error(f"{where}: {error}") from error

    def _parse(self, data: Any, number: int, further: tuple[str, ...]) -> Entry:
        if not isinstance(data, dict):
            raise Emu3Error(f"{shown(data)} is not an object: write one JSON object per line")
        fields = (*_FIELDS, *further)
        unknown = sorted(set(data) - set(fields))
        if unknown:
            raise Emu3Error(
                f"unknown field {shown(unknown[0])}: legal fields are {', '.join(fields)}; rename or remove it"
            )
        data = {field: value for field, value in data.items() if value is not None and field not in further}
        if "document" in data:
            return self._document(data, number)
        if "image" in data and "clip" in data:
            raise Emu3Error("has both image and clip: split it into two lines")
        paths = {field: check_text(field, data[field]) for field in ("image", "clip") if field in data}
        files = {field: self._file(field, path) for field, path in paths.items()}
        conversation = check_conversation(data["conversation"]) if "conversation" in data else ()
        text = check_text("text", data.get("text", ""))
        if not text and not conversation and "text" not in data:
            raise Emu3Error("has neither text nor conversation nor document: add one")
        if not text and not paths and not conversation:
            raise Emu3Error("has neither image nor clip, and its text is empty: remove the line")
        name = check_text("name", data.get("name", next(iter(paths.values()), f"line {number}")))
        return Entry(name, text, files.get("image"), files.get("clip"), conversation, ())

    def _document(self, data: dict[str, Any], number: int) -> Entry:
        others = sorted(set(data) - {"document", "name"})
        if others:
            raise Emu3Error(f"has both document and {others[0]}: put all texts and pictures into the document")
        legal = 'a list of {"text": ...} and {"image": ...}, each with a "role" or all without'
        values = data["document"]
        if not isinstance(values, list) or not values:
            raise Emu3Error(f"document is {shown(values)}: it must be {legal}")
        if len(values) > _MOST_PARTS:
            raise Emu3Error(f"the document has {len(values):,} parts, the limit is {_MOST_PARTS:,}: divide it")
        parts = []
        for place, value in enumerate(values):
            if isinstance(value, dict):
                value = {field: entry for field, entry in value.items() if entry is not None}
            if not isinstance(value, dict) or set(value) - set(_PART_FIELDS) or ("text" in value) == ("image" in value):
                raise Emu3Error(f"document part {place} is {shown(value)}: the document must be {legal}")
            text = check_text(f"document part {place}", value.get("text", ""))
            if "text" in value and not text:
                raise Emu3Error(f"document part {place} is an empty text: remove the part")
            image = None
            if "image" in value:
                image = self._file(f"document part {place}", check_text(f"document part {place}", value["image"]))
            parts.append(EntryPart(value.get("role"), text, image))
        check_roles([part.role for part in parts])
        name = check_text("name", data.get("name", f"line {number}"))
        return Entry(name, "", None, None, (), tuple(parts))

    def _file(self, field: str, path: str) -> Path:
        """The file that `field` names."""
        if not path.strip():
            raise Emu3Error(f"{field} is {shown(path)}, an empty path: name a file, or leave {field} out")
        local_path(path)
        return local_path(self.path.parent / path)


def check_area(area: int | None, factor: int, name: str = "area") -> None:
    """Raises an `Emu3Error` unless `area` is None or a legal number of pixels for `resize_to_area`.

    Args:
        area: the area in pixels. A square of less than two codes a side would be enlarged by the image processor.
        factor: pixels per code along each side.
        name: how the error calls the area.
    """
    least = (2 * factor) ** 2
    if area is not None and not least <= area <= _MAX_AREA:
        raise Emu3Error(
            f"{name} is {area}: it must be a number of pixels from {least} to {_MAX_AREA}, for example 518400"
        )


def resize_to_area(media: Image.Image | Clip, area: int) -> Image.Image | Clip:
    """Resizes a picture, or every frame of a clip, to about `area` pixels (bicubic). The aspect ratio stays the same.

    Each side is rounded separately, as in upstream's data preparation.
    """
    if isinstance(media, Clip):
        frames = [np.asarray(resize_to_area(Image.fromarray(frame), area)) for frame in media.frames]
        return Clip(np.stack(frames), media.fps)
    scale = (area / (media.width * media.height)) ** 0.5
    width, height = (max(1, round(side * scale)) for side in media.size)
    return media.resize((width, height), Image.Resampling.BICUBIC)

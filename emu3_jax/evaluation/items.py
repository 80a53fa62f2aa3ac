"""The evaluation data: `items.jsonl`, which scripts/build_emoji.py writes, and the pictures and clips that it names."""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from emu3_jax.data.records import check_text
from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import inner_path, local_path, parse_json, read_bytes
from emu3_jax.media.clips import load_clip
from emu3_jax.media.images import load_image
from emu3_jax.printable import shown
from emu3_jax.progress import Progress, each

ITEMS = "items.jsonl"
_KINDS = {"picture": (), "clip": (), "procedural_picture": ("position",), "procedural_clip": ("motion",)}
_MAX_BYTES = 1 << 28  # largest items.jsonl; that of the embedded model's data has 9 MB
_SCENE = ("colour", "shape")
T = TypeVar("T")
_BUILD = "build the data again (python scripts/build_emoji.py DIR)"


@dataclasses.dataclass(frozen=True)
class Item:
    """One picture or clip.

    Attributes:
        name: unique name.
        file: path relative to the data's directory.
        kind: "picture", "clip", "procedural_picture" or "procedural_clip".
        style: style of the drawing.
        concept: codepoint of the emoji. Pictures of the same emoji in several styles have the same concept.
        label: the concept in words; for procedural items the whole caption.
        group: category of the concept.
        split: "train", or what is held out of training: "style", "concept" or "triple".
        scene: for procedural items, colour, shape and position (of a clip, motion).
        said: the caption, if the data name it.
    """

    name: str
    file: str
    kind: str
    style: str
    concept: str
    label: str
    group: str
    split: str
    scene: dict[str, str] = dataclasses.field(default_factory=dict, hash=False)
    said: str = ""

    @property
    def caption(self) -> str:
        """The prompt for generating the item, which is also the correct description of it."""
        if self.said:
            return self.said
        return self.label if self.kind.startswith("procedural") else f"{self.style} emoji of {self.label}"


class Data:
    """A directory of items. Pictures and clips are read on first use and then kept in memory."""

    def __init__(self, directory: str | Path | None):
        """Reads `items.jsonl`. None has no items. Raises `Emu3Error` if the file is missing or a line is malformed."""
        self.directory = local_path(directory or ".")
        self.items = [] if directory is None else _read(self.directory / ITEMS)
        self._held: dict[str, np.ndarray] = {}

    def where(self, kind: str, split: str | None = None, groups: Sequence[str] | None = None) -> list[Item]:
        """The items of a kind, and of a split and of groups if given, sorted by name."""
        found = [item for item in self.items if item.kind == kind and split in (None, item.split)]
        return [item for item in found if groups is None or item.group in groups]

    def pixels(self, items: Sequence[Item], progress: bool | None = None) -> np.ndarray:
        """The pixels of items: uint8 [N, H, W, 3] for pictures, [N, T, H, W, 3] for clips.

        Raises:
            Emu3Error: a file cannot be read, or the items have different sizes.
        """
        missing = [item for item in items if item.name not in self._held]
        # A bar for few files would only flicker.
        show = False if len(missing) < 500 else progress
        for item in each(missing, show, "files", name="reading"):
            path = self.directory / item.file
            clip = item.kind.endswith("clip")
            self._held[item.name] = load_clip(path).frames if clip else np.asarray(load_image(path))
        arrays = [self._held[item.name] for item in items]
        for item, array in zip(items, arrays, strict=True):
            if array.shape != arrays[0].shape:
                raise Emu3Error(
                    f"{self.directory / item.file} has shape {list(array.shape)}, {items[0].file} "
                    f"{list(arrays[0].shape)}: all must have the same size; {_BUILD}"
                )
        return np.stack(arrays)


def choose(items: Sequence[T], cases: int | None, seed: int, figure: str) -> list[T]:
    """At most `cases` of the items, in their order. The choice depends only on `seed`, `figure` and the items."""
    if cases is None or len(items) <= cases:
        return list(items)
    rng = np.random.default_rng([seed, zlib.crc32(figure.encode())])
    return [items[i] for i in sorted(rng.choice(len(items), cases, replace=False))]


def in_batches(
    call: Callable[[np.ndarray], np.ndarray], array: np.ndarray, size: int, bar: Progress | None = None
) -> np.ndarray:
    """Applies `call` to `array` in batches of `size` rows, and concatenates the results.

    The last batch is padded with its last row, so that `call` compiles for one shape only. `bar` advances by the rows.
    """
    parts = []
    for start in range(0, len(array), size):
        rows = array[start : start + size]
        filled = np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])
        parts.append(np.asarray(call(filled))[: len(rows)])
        if bar is not None:
            bar.update(len(rows))
    return np.concatenate(parts)


def _read(file: Path) -> list[Item]:
    remedy = f"{_BUILD}, or correct the config's field data"
    items: dict[str, Item] = {}
    for number, line in enumerate(read_bytes(file, _MAX_BYTES, remedy).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        data = parse_json(line, where, _BUILD)
        try:
            item = _item(data, where)
            if item.name in items:
                raise Emu3Error(f"the name {shown(item.name)} occurs twice")
        except Emu3Error as error:
            said = str(error).removeprefix(f"{where}: ")
            raise Emu3Error(f"{where}: {said}; {_BUILD}") from error
        items[item.name] = item
    return sorted(items.values(), key=lambda item: item.name)


def _item(data: Any, where: str) -> Item:
    if not isinstance(data, dict):
        raise Emu3Error("not a JSON object")
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise Emu3Error(f"kind is {shown(kind)}: it must be one of {', '.join(_KINDS)}")
    scene = (*_SCENE, *_KINDS[kind]) if _KINDS[kind] else ()
    fields = [field.name for field in dataclasses.fields(Item) if field.name not in ("scene", "said")]
    for field in (*fields, *scene):
        if not isinstance(data.get(field), str):
            raise Emu3Error(f"field {field} is {shown(data.get(field))}: it must be a text")
        check_text(field, data[field])
    said = data.get("caption", "")
    if not isinstance(said, str):
        raise Emu3Error(f"field caption is {shown(said)}: it must be a text")
    check_text("caption", said)
    inner_path(data["file"], where)
    return Item(**{field: data[field] for field in fields}, scene={field: data[field] for field in scene}, said=said)

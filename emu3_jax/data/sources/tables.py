"""Columns of tables and fields of objects that hold a picture's file and its caption."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from emu3_jax.errors import Emu3Error
from emu3_jax.printable import shown

FILE_COLUMNS = ("file_name", "filename", "file", "image", "path")
PICTURE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "picture", "img")
TEXT_COLUMNS = ("text", "caption", "txt", "prompt", "description")


@dataclasses.dataclass(frozen=True)
class Columns:
    """Names of columns that the user gave; None looks for the usual ones."""

    picture: str | None = None
    text: str | None = None

    def file(self, names: Collection[str], where: str) -> str:
        """The column with pictures' files. Raises `Emu3Error` that begins with `where` if there is none."""
        missing = f"{where} has no column with the pictures' file names"
        return _pick(names, self.picture, FILE_COLUMNS, missing, "--image-column")

    def caption(self, names: Collection[str], where: str) -> str:
        """The column with captions, likewise."""
        return _pick(names, self.text, TEXT_COLUMNS, f"{where} has no column with captions", "--text-column")


def _pick(names: Collection[str], wanted: str | None, usual: Sequence[str], missing: str, option: str) -> str:
    if wanted is not None:
        if wanted in names:
            return wanted
        raise Emu3Error(f"{missing}: {option} is {shown(wanted)}, and it has {shown(list(names))}")
    for name in usual:
        if name in names:
            return name
    raise Emu3Error(f"{missing}: it has {shown(list(names))}; call the column {usual[0]}, or name it with {option}")


def caption_of(data: Any, columns: Columns, where: str) -> Any:
    """The caption in a JSON object. Raises `Emu3Error` that begins with `where` if there is none."""
    if not isinstance(data, dict):
        raise Emu3Error(f"{where}: {shown(data)} is no object: write one with a caption")
    return data[columns.caption(data, where)]

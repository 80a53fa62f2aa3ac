"""Finds the columns of tables, or fields of JSON objects, that hold a picture's file and its caption."""

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
    """Column names that the user gave. None stands for the usual names."""

    picture: str | None = None
    text: str | None = None

    def file(self, names: Collection[str], where: str) -> str:
        """Finds the column with file names. Raises an `Emu3Error` that begins with `where` if there is none."""
        missing = f"{where} has no column with the pictures' file names"
        return _pick(names, self.picture, FILE_COLUMNS, missing, "--image-column")

    def caption(self, names: Collection[str], where: str) -> str:
        """Finds the column with captions. Raises an `Emu3Error` that begins with `where` if there is none."""
        return _pick(names, self.text, TEXT_COLUMNS, f"{where} has no column with captions", "--text-column")


def _pick(names: Collection[str], wanted: str | None, usual: Sequence[str], missing: str, option: str) -> str:
    if wanted is not None:
        if wanted in names:
            return wanted
        raise Emu3Error(f"{missing}: {option} is {shown(wanted)}, but the columns are {shown(list(names))}")
    for name in usual:
        if name in names:
            return name
    raise Emu3Error(
        f"{missing}: its columns are {shown(list(names))}; rename the column to {usual[0]}, or name it with {option}"
    )


def caption_of(data: Any, columns: Columns, where: str) -> Any:
    """Finds the caption in a JSON object. Raises an `Emu3Error` that begins with `where` if there is none."""
    if not isinstance(data, dict):
        raise Emu3Error(f"{where}: {shown(data)} is not an object: write an object with a caption")
    return data[columns.caption(data, where)]

"""A folder of pictures with captions, in text files beside the pictures or in files that list pictures and captions.

The caption of `photo.jpg` is in `photo.txt` or `photo.jpg.txt`; or in a row of `metadata.jsonl`, `metadata.csv`,
`captions.csv` or `captions.jsonl`, which give the picture's path relative to their own folder. Hugging Face's image
folders follow the same conventions. Subfolders are included. Hidden files and links to folders are skipped.
"""

import dataclasses
import hashlib
import os
import unicodedata
from pathlib import Path

from emu3_jax.data.sources.captions import NAMES, CaptionFile
from emu3_jax.data.sources.examples import MAX_CAPTION, Example, MediaFile, decode_caption, picture_suffixes
from emu3_jax.data.sources.packed import PackedNames, PackedNumbers
from emu3_jax.data.sources.tables import Columns
from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import read_bytes
from emu3_jax.media.images import HEIC_SUFFIXES, require_heic
from emu3_jax.printable import printable

_ASIDE = -1  # instead of the number of a caption file: the caption is in a text file beside the picture
_NOWHERE = (0, 0, 0)
_REMEDY = f"write a caption to a .txt file with the same name, or to {NAMES[0]} or {NAMES[2]}"
_WANTED = "give a folder of PNG, JPEG, WebP or other pictures, or of tar or Parquet files"
# Place of a caption: number of a caption file, number and position of a line. Or: _ASIDE, number of a text file, 0.
_Place = tuple[int, int, int]


@dataclasses.dataclass
class _Found:
    """The contents of a folder. Keys are paths in Unicode form NFC, because file systems encode accents differently.

    Attributes:
        pictures: paths of pictures.
        texts: paths of text files; keys are paths without the ending.
        rows: places of rows in caption files; keys are paths of their pictures.
        problems: error messages for rows that are not usable.
        blamed: keys of the pictures in these rows.
    """

    pictures: dict[str, str] = dataclasses.field(default_factory=dict)
    texts: dict[str, str] = dataclasses.field(default_factory=dict)
    rows: dict[str, list[_Place]] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)
    blamed: set[str] = dataclasses.field(default_factory=set)


class Folder:
    """The captioned pictures of a folder, or of one file that lists pictures, sorted by name.

    Memory holds the name of each picture and the place of its caption. Unusable entries are also examples, and reading
    them raises an error: a picture without a caption, a caption without a picture, a picture with two captions.
    """

    def __init__(self, path: Path, columns: Columns, *, leave_out: Path | None = None):
        """Looks through the folder and reads all captions.

        Args:
            path: the folder, or a file that lists pictures and captions.
            columns: names of columns in caption files.
            leave_out: a subfolder to skip, because results are written there.

        Raises:
            Emu3Error: the folder cannot be read, or holds no pictures or no captions; or it holds HEIC pictures and
                pillow-heif is not installed.
        """
        self._files: list[CaptionFile] = []
        self._names, self._places, self._asides = PackedNames(), PackedNumbers(3), PackedNames()
        self._problems: dict[int, str] = {}
        self._digest = hashlib.sha256(b"folder")
        found = _Found()
        if path.is_dir():
            self._root = path
            self._look(found, columns, leave_out)
        else:
            self._root = path.parent
            self._files.append(CaptionFile(path, columns))
        self._read_rows(found)
        if not found.pictures and not found.problems:
            what = f"holds no pictures: {_WANTED}" if path.is_dir() else "lists no pictures: write a line for each"
            raise Emu3Error(f"{path} {what}")
        require_heic(path, sum(Path(name).suffix.lower() in HEIC_SUFFIXES for name in found.pictures.values()))
        first = found.problems[0] if found.problems else None
        usable = self._pair(found)
        for problem in found.problems:
            self._add("", _NOWHERE, problem)
        if not usable:
            raise Emu3Error(f"{path}: no picture has a usable caption; the first problem: {first or self._problems[0]}")
        self.digest = self._digest.hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Example:
        """Reads example `index`. Raises an `Emu3Error` if the example is not usable."""
        if index in self._problems:
            raise Emu3Error(self._problems[index])
        name = self._names[index]
        number, line, place = self._places[index]
        path = self._root / name
        return Example(str(path), printable(name), self._caption((number, line, place)), MediaFile(path))

    # -------------------------------------------------------------------------------------------- looking through it

    def _look(self, found: _Found, columns: Columns, leave_out: Path | None) -> None:
        """Finds pictures, text files and caption files."""

        def unreadable(error: OSError) -> None:
            raise Emu3Error(f"cannot read {error.filename}: {error.strerror}; make it readable, or move it away")

        suffixes = picture_suffixes()
        left_out = None if leave_out is None else os.path.realpath(leave_out)
        for directory, folders, names in os.walk(self._root, onerror=unreadable):
            here = os.path.relpath(directory, self._root)
            folders[:] = sorted(
                name
                for name in folders
                if name[0] != "." and os.path.realpath(os.path.join(directory, name)) != left_out
            )
            for name in sorted(names):
                if name[0] == ".":
                    continue
                path = os.path.normpath(os.path.join(here, name))
                suffix = os.path.splitext(name)[1].lower()
                if name.lower() in NAMES:
                    self._files.append(CaptionFile(self._root / path, columns))
                elif suffix in suffixes:
                    found.pictures[_key(path)] = path
                elif suffix == ".txt":
                    found.texts[_key(os.path.splitext(path)[0])] = path

    def _read_rows(self, found: _Found) -> None:
        """Reads the caption files. They may also name pictures with unusual endings."""
        for number, file in enumerate(self._files):
            folder = os.path.relpath(file.path.parent, self._root)
            for row in file.rows():
                path = os.path.normpath(os.path.join(folder, row.file))
                key = _key(path)
                if row.problem is not None:
                    found.problems.append(row.problem)
                    found.blamed.add(key)
                elif key in found.pictures or os.path.isfile(self._root / path):
                    found.pictures.setdefault(key, path)
                    found.rows.setdefault(key, []).append((number, row.line, row.place))
                else:
                    found.problems.append(
                        f"{file.path} line {row.line}: {self._root / path} does not exist: correct the name, which is "
                        "relative to this file's folder, or remove the line"
                    )

    def _pair(self, found: _Found) -> int:
        """Assigns one caption, or an error message, to every picture. Returns the number of pictures with a caption."""
        used: set[str] = set()
        usable = 0
        for key in sorted(found.pictures):
            name = found.pictures[key]
            places = found.rows.get(key, [])
            for text in (os.path.splitext(key)[0], key):
                if text in found.texts:
                    used.add(text)
                    places.append((_ASIDE, len(self._asides), 0))
                    self._asides.append(found.texts[text])
            captions: dict[str, _Place] = {}
            problem = None
            for place in places:
                try:
                    captions.setdefault(self._caption(place), place)
                except Emu3Error as error:
                    problem = str(error)
            if len(captions) > 1:
                first, second = (self._where(place) for place in list(captions.values())[:2])
                problem = (
                    f"{self._root / name} has two captions, {first} and {second}: remove one, or write a manifest, "
                    "which may list a picture several times"
                )
            elif captions:
                usable += 1
                ((caption, place),) = captions.items()
                self._add(name, place, caption=caption)
                continue
            elif problem is None:
                if key in found.blamed:
                    continue  # the problem of its row is already reported
                problem = f"{self._root / name} has no caption: {_REMEDY}"
            self._add(name, _NOWHERE, problem)
        found.problems += [
            f"{self._root / name}: there is no picture with this name: add it, or remove the text file"
            for key, name in found.texts.items()
            if key not in used
        ]
        return usable

    def _add(self, name: str, place: _Place, problem: str | None = None, caption: str = "") -> None:
        """Adds an example, or an error message instead."""
        if problem is not None:
            self._problems[len(self._names)] = problem
        try:
            size = os.stat(self._root / name).st_size if name else 0
        except OSError:  # a broken link, which is reported when the picture is read
            size = -1
        # Hash only names inside the folder, because the folder may move.
        parts = (os.fsencode(name), str(size).encode(), caption.encode(), b"" if problem is None else b"!")
        self._digest.update(b"\0".join(parts) + b"\0\n")
        self._names.append(name)
        self._places.append(*place)

    # ------------------------------------------------------------------------------------------------------ captions

    def _caption(self, place: _Place) -> str:
        number, line, start = place
        if number != _ASIDE:
            return self._files[number].caption(line, start)
        path = self._root / self._asides[line]
        return decode_caption(read_bytes(path, MAX_CAPTION, "write a caption"), str(path))

    def _where(self, place: _Place) -> str:
        number, line, _ = place
        return self._asides[line] if number == _ASIDE else f"{self._files[number].path.name} line {line}"


def _key(path: str) -> str:
    return unicodedata.normalize("NFC", path)

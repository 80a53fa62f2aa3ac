"""A folder of pictures: captions in text files beside them, or in files that list pictures and captions.

`photo.jpg` has its caption in `photo.txt` or `photo.jpg.txt`, or in a row of `metadata.jsonl`, `metadata.csv`,
`captions.csv` or `captions.jsonl`, which name it relative to their own folder: the conventions of Hugging Face's image
folders. Folders inside the folder count. Hidden files and links to folders do not.
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

_ASIDE = -1  # in the place of a caption file's number: a text file beside the picture
_NOWHERE = (0, 0, 0)
_REMEDY = f"write a caption beside it, in a text file of its name, or in {NAMES[0]} or {NAMES[2]}"
_WANTED = "give a folder of PNG, JPEG, WebP or other pictures, or one of tar or Parquet files"
_Place = tuple[int, int, int]  # a caption file's number, a line's number and place; or _ASIDE, the text's number, 0


@dataclasses.dataclass
class _Found:
    """What lies in a folder, by the normal forms of names: file systems spell accents differently."""

    pictures: dict[str, str] = dataclasses.field(default_factory=dict)
    texts: dict[str, str] = dataclasses.field(default_factory=dict)  # by their names without the ending
    rows: dict[str, list[_Place]] = dataclasses.field(default_factory=dict)  # of caption files, by their pictures
    problems: list[str] = dataclasses.field(default_factory=list)  # of such rows
    blamed: set[str] = dataclasses.field(default_factory=set)  # pictures that rows with problems name


class Folder:
    """The captioned pictures of a folder, or of one file that lists them, in the order of their names.

    Of each picture its name and the place of its caption are kept. A picture without a caption, a caption without a
    picture, and one with two different captions are examples that cannot be read.
    """

    def __init__(self, path: Path, columns: Columns, *, leave_out: Path | None = None):
        """Looks through the folder and reads all captions.

        Args:
            path: the folder, or a file that lists pictures and captions.
            columns: of such files.
            leave_out: a folder inside that is not looked at, because results are written there.

        Raises:
            Emu3Error: it cannot be read, holds no pictures or no captions, or HEIC files that nothing installed reads.
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
            raise Emu3Error(
                f"{path}: no picture has a caption that can be used; the first: {first or self._problems[0]}"
            )
        self.digest = self._digest.hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Example:
        """Example `index`. Raises the `Emu3Error` that says what is wrong with it."""
        if index in self._problems:
            raise Emu3Error(self._problems[index])
        name = self._names[index]
        number, line, place = self._places[index]
        path = self._root / name
        return Example(str(path), printable(name), self._caption((number, line, place)), MediaFile(path))

    # -------------------------------------------------------------------------------------------- looking through it

    def _look(self, found: _Found, columns: Columns, leave_out: Path | None) -> None:
        """Finds pictures, texts and caption files."""

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
        """Reads the files that list pictures, which may name pictures of unusual endings."""
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
                        f"{file.path} line {row.line}: there is no {self._root / path}: correct the name, which is "
                        "relative to this file, or remove the line"
                    )

    def _pair(self, found: _Found) -> int:
        """Finds the one caption of every picture, or what is wrong with it. Returns how many pictures have one."""
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
                    "in which a picture may stand on several lines"
                )
            elif captions:
                usable += 1
                ((caption, place),) = captions.items()
                self._add(name, place, caption=caption)
                continue
            elif problem is None:
                if key in found.blamed:
                    continue  # its row is told of
                problem = f"{self._root / name} has no caption: {_REMEDY}"
            self._add(name, _NOWHERE, problem)
        found.problems += [
            f"{self._root / name}: there is no picture of that name: add it, or remove the text"
            for key, name in found.texts.items()
            if key not in used
        ]
        return usable

    def _add(self, name: str, place: _Place, problem: str | None = None, caption: str = "") -> None:
        """Adds an example, or a problem in the place of one."""
        if problem is not None:
            self._problems[len(self._names)] = problem
        try:
            size = os.stat(self._root / name).st_size if name else 0
        except OSError:  # a link to nothing: that is told when the picture is read
            size = -1
        # Names alone, not the folder's: it may move.
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

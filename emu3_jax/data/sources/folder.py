"""A folder of pictures: captions in text files beside them, or in files that list pictures and captions.

`photo.jpg` has its caption in `photo.txt` or `photo.jpg.txt`, or in a row of `metadata.jsonl`, `metadata.csv`,
`captions.csv` or `captions.jsonl`, which name it relative to their own folder: the conventions of Hugging Face's image
folders. Folders inside the folder count. Hidden files do not.
"""

import hashlib
import os
import unicodedata
from pathlib import Path

from emu3_jax.data.sources.captions import NAMES, CaptionFile
from emu3_jax.data.sources.examples import MAX_CAPTION, Example, MediaFile, clean_caption, picture_suffixes
from emu3_jax.data.sources.tables import Columns, Rows, Texts
from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import read_bytes
from emu3_jax.media.images import require_heic
from emu3_jax.printable import printable

_ASIDE = -1  # in the place of a caption file's number: a text file beside the picture
_REMEDY = f"write a caption beside it, in a text file of its name, or in {NAMES[0]} or {NAMES[2]}"
_Place = tuple[int, int, int]  # a caption file's number, a line's number and place; or _ASIDE, the text's number, 0


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
        listed = not path.is_dir()
        self._root = path.parent if listed else path
        # While the folder is looked through: by the names' normal forms, for file systems spell accents differently.
        self._pictures: dict[str, str] = {}
        self._texts: dict[str, str] = {}  # by what they are beside: their names without the ending
        self._captions: dict[str, list[_Place]] = {}
        self._files: list[CaptionFile] = []
        self._names, self._places, self._asides = Texts(), Rows(3), Texts()
        self._problems: dict[int, str] = {}
        if listed:
            self._files.append(CaptionFile(path, columns))
        else:
            self._look(columns, leave_out)
        problems, blamed = self._read_rows()
        told = next(iter(problems), None)
        if not self._pictures and not problems:
            kinds = "files that" if listed else "pictures such as PNG, JPEG or WebP that"
            raise Emu3Error(f"{path} holds no pictures: give a folder of pictures, or one with {kinds} list them")
        require_heic(path, sum(name.lower().endswith((".heic", ".heif")) for name in self._pictures.values()))
        self._digest = hashlib.sha256(b"folder")
        self._settle(blamed)
        problems += [
            f"{self._root / name}: there is no picture of that name: add it, or remove the text"
            for key, name in self._texts.items()
            if key not in self._used
        ]
        for problem in sorted(problems):
            self._add("", (0, 0, 0), problem)
        if not self._usable:
            first = told or self._problems[0]
            raise Emu3Error(f"{path}: no picture has a caption that can be used; the first: {first}")
        self.digest = self._digest.hexdigest()
        del self._pictures, self._texts, self._captions, self._used

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

    def _look(self, columns: Columns, leave_out: Path | None) -> None:
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
                if name in NAMES:
                    self._files.append(CaptionFile(self._root / path, columns))
                elif suffix in suffixes:
                    self._pictures[_key(path)] = path
                elif suffix == ".txt":
                    self._texts[_key(os.path.splitext(path)[0])] = path

    def _read_rows(self) -> tuple[list[str], set[str]]:
        """Reads the files that list pictures. Returns what is wrong with rows, and which pictures these name."""
        problems, blamed = [], set()
        for number, file in enumerate(self._files):
            folder = os.path.relpath(file.path.parent, self._root)
            for row, _ in file.rows():
                path = os.path.normpath(os.path.join(folder, row.file))
                key = _key(path)
                if row.problem is not None:
                    problems.append(row.problem)
                    blamed.add(key)
                elif key in self._pictures or os.path.isfile(self._root / path):
                    self._pictures.setdefault(key, path)
                    self._captions.setdefault(key, []).append((number, row.line, row.place))
                else:
                    problems.append(
                        f"{file.path} line {row.line}: there is no {self._root / path}: correct the name, which is "
                        "relative to this file, or remove the line"
                    )
        return problems, blamed

    def _settle(self, blamed: set[str]) -> None:
        """Finds the one caption of every picture, or what is wrong with it."""
        self._used: set[str] = set()
        self._usable = 0
        for key in sorted(self._pictures):
            name = self._pictures[key]
            places = list(self._captions.get(key, ()))
            for text in (os.path.splitext(key)[0], key):
                if text in self._texts:
                    self._used.add(text)
                    places.append((_ASIDE, len(self._asides), 0))
                    self._asides.append(self._texts[text])
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
                self._usable += 1
                ((caption, place),) = captions.items()
                self._add(name, place, caption=caption)
                continue
            elif problem is None:
                if key in blamed:
                    continue  # its row is told of
                problem = f"{self._root / name} has no caption: {_REMEDY}"
            self._add(name, (0, 0, 0), problem)

    def _add(self, name: str, place: _Place, problem: str | None = None, caption: str = "") -> None:
        """Adds an example, or a problem in the place of one."""
        if problem is not None:
            self._problems[len(self._names)] = problem
        size = os.stat(self._root / name).st_size if name else 0
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
        data = read_bytes(path, MAX_CAPTION, "write a caption")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise Emu3Error(f"{path} is not UTF-8 text: save it in UTF-8") from error
        return clean_caption(text, str(path))

    def _where(self, place: _Place) -> str:
        number, line, _ = place
        return self._asides[line] if number == _ASIDE else f"{self._files[number].path.name} line {line}"


def _key(path: str) -> str:
    return unicodedata.normalize("NFC", path)

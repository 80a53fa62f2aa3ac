"""Files that list pictures: CSV or JSON lines with a column of file names and a column of captions."""

import csv
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from emu3_jax.data.manifest import MAX_LINE
from emu3_jax.data.sources.examples import clean_caption
from emu3_jax.data.sources.tables import Columns
from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import inner_path, limit, parse_json, plain_file, reading
from emu3_jax.printable import shown

NAMES = ("metadata.jsonl", "metadata.csv", "captions.csv", "captions.jsonl")  # names that are recognised in folders
TABLES = (".csv", ".tsv")  # endings of tables; other files are JSON lines
_CSV = "save it as CSV in UTF-8"
_JSON = "write one JSON object per line"


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a file that lists pictures.

    Attributes:
        line: number of its first line, from 1.
        place: position of its first line in the file, in bytes.
        file: the picture's path relative to the folder of the list; "" if unknown.
        problem: error message if the row is not usable, else None.
    """

    line: int
    place: int
    file: str
    problem: str | None = None


class CaptionFile:
    """A CSV or JSON lines file. Rows are read on demand and not kept in memory."""

    def __init__(self, path: Path, columns: Columns):
        """Opens the file. Of a CSV, reads the header.

        Raises:
            Emu3Error: the file cannot be read, or a CSV has no header line with both columns.
        """
        self.path, self._columns = path, columns
        self._csv = path.suffix.lower() in TABLES
        self._header: list[str] = []
        self._dialect: dict[str, Any] = {}
        self._body = (1, 0)  # number and position of the first line after the header
        with reading(path, _CSV if self._csv else _JSON):
            plain_file(path)
        if self._csv:
            self._read_header()

    def _read_header(self) -> None:
        with reading(self.path, _CSV), self.path.open("rb") as stream:
            lines = _Lines(stream, self.path, 1, 0)
            first = next((line for line in lines if line.strip("\ufeff \t\r\n")), "").removeprefix("\ufeff")
            # Spreadsheets separate fields by semicolons in countries that use a decimal comma.
            self._dialect = {"delimiter": max(",;\t", key=first.count), "strict": True}
            rows = csv.reader(itertools.chain([first], lines), **self._dialect)
            self._header = [name.strip() for name in next(rows, [])]
            self._body = (lines.number, lines.place)
        where = f"{self.path} line {max(1, self._body[0] - 1)}"
        names = (self._columns.file(self._header, where), self._columns.caption(self._header, where))
        self._fields = [self._header.index(name) for name in names]

    def rows(self) -> Iterator[Row]:
        """Yields every row. Skips blank lines."""
        with reading(self.path, _CSV if self._csv else _JSON), self.path.open("rb") as stream:
            stream.seek(self._body[1])
            lines = _Lines(stream, self.path, *self._body)
            while True:
                line, place = lines.number, lines.place
                row = self._next(lines)
                if row is None:
                    return
                if row == "":
                    continue
                try:
                    file, _ = self._fields_of(row, f"{self.path} line {line}")
                    yield Row(line, place, file)
                except _BadRow as error:
                    yield Row(line, place, error.file, str(error))

    def caption(self, line: int, place: int) -> str:
        """Reads the caption of the row with first line `line` at position `place`; see `Row`."""
        with reading(self.path, _CSV if self._csv else _JSON), self.path.open("rb") as stream:
            stream.seek(place)
            row = self._next(_Lines(stream, self.path, line, place))
            return self._fields_of(row, f"{self.path} line {line}")[1]

    def _next(self, lines: "_Lines") -> Any:
        """Reads the next row: the fields of a CSV row, or a line of JSON. "" for a blank row, None at the end."""
        if not self._csv:
            line = next(lines, None)
            return line if line is None else line.strip().removeprefix("\ufeff")
        try:
            row = next(csv.reader(lines, **self._dialect), None)
        except csv.Error as error:
            raise Emu3Error(f"{self.path} line {lines.number - 1}: not readable as CSV ({error}); {_CSV}") from error
        return row if row is None or any(field.strip() for field in row) else ""

    def _fields_of(self, row: Any, where: str) -> tuple[str, str]:
        """Extracts the picture's path, relative to this file's folder, and the caption. Raises `_BadRow`."""
        name: Any = ""
        try:
            if self._csv:
                # An extra field is usually the rest of a caption that contains a comma.
                name = row[self._fields[0]] if self._fields[0] < len(row) else ""
                if len(row) != len(self._header):
                    raise Emu3Error(
                        f"{where}: has {len(row)} fields, but the header has {len(self._header)}: "
                        "put captions in double quotes"
                    )
                text: Any = row[self._fields[1]]
            else:
                data = parse_json(row.encode(), where, _JSON)
                if not isinstance(data, dict):
                    raise Emu3Error(f"{where}: {shown(data)} is not an object: {_JSON}")
                name = data[self._columns.file(data, where)]
                text = data[self._columns.caption(data, where)]
            if not isinstance(name, str):
                raise Emu3Error(f"{where}: the name {shown(name)} is not text: write the picture's file name")
            name = name.strip().replace("\\", "/").removeprefix("./")
            return _below(name, where), clean_caption(text, where)
        except Emu3Error as error:
            raise _BadRow(str(error), name if isinstance(name, str) else "") from error


def _below(name: str, where: str) -> str:
    """Checks that a picture's path stays below the folder of the list, and returns it."""
    try:
        return inner_path(name, where)
    except Emu3Error as error:
        raise Emu3Error(
            f"{where}: {shown(name)} is not a path below this file's folder: write it relative to that folder"
        ) from error


class _BadRow(Emu3Error):
    """A row is not usable. `file` is the path of its picture; "" if unknown."""

    def __init__(self, message: str, file: str):
        super().__init__(message)
        self.file = file


class _Lines:
    """Iterates over the lines of a UTF-8 file. `number` and `place` belong to the next line."""

    def __init__(self, stream: BinaryIO, path: Path, number: int, place: int):
        self._stream, self._path = stream, path
        self.number, self.place = number, place

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._stream.readline(MAX_LINE + 1)
        if not line:
            raise StopIteration
        limit(f"{self._path} line {self.number}", "bytes or more", len(line), MAX_LINE)
        where = f"{self._path} line {self.number}"
        self.number += 1
        self.place += len(line)
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Emu3Error(f"{where} is not UTF-8 text: save the file in UTF-8") from error

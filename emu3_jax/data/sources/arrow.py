"""Finds pictures and captions in Arrow tables, and reads Parquet files. `hub` uses it for hub data sets.

A picture is a cell of bytes, or a struct of bytes and path, as Hugging Face's `datasets` writes it. `pyarrow` reads
Parquet files directly; `datasets` would copy them first.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from emu3_jax.data.sources.examples import Example, bytes_ends, clean_caption
from emu3_jax.data.sources.recent import Recent
from emu3_jax.data.sources.tables import PICTURE_COLUMNS, TEXT_COLUMNS, Columns
from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import limit, plain_file, reading
from emu3_jax.media.images import load_image
from emu3_jax.printable import shown

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as missing:
    raise Emu3Error(
        "Parquet files and hub data sets need pyarrow, which is not installed: pip install 'emu3-jax[data]'"
    ) from missing

_MAX_GROUP = 2 << 30  # bytes of a row group, which is read into memory as a whole
_HELD = 2  # row groups in memory; two, because threads read rows on both sides of a boundary
_AGAIN = "download or write the Parquet file again"
_BATCH = 256  # rows per batch when captions are read


def is_picture(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold pictures."""
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and is_picture(kind.field(place).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds text."""
    if pa.types.is_dictionary(kind):  # pandas writes categories as dictionaries
        return is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


@dataclasses.dataclass(frozen=True)
class _Role:
    """The kind of column to look for.

    Attributes:
        what: name of its contents in errors.
        kind: name of its type in errors.
        option: command-line option that names the column.
        usual: usual names of such columns.
        fits: whether a column of a type can hold the contents.
    """

    what: str
    kind: str
    option: str
    usual: Sequence[str]
    fits: Callable[[pa.DataType], bool]


_PICTURES = _Role("pictures", "bytes", "--image-column", PICTURE_COLUMNS, is_picture)
_CAPTIONS = _Role("captions", "text", "--text-column", TEXT_COLUMNS, is_text)


def choose(schema: pa.Schema, columns: Columns, where: str) -> tuple[str, str]:
    """Chooses the columns with pictures and with captions.

    Args:
        schema: of the table.
        columns: names that the user gave.
        where: name of the table in errors.

    Returns:
        Names of the picture column and of the caption column.

    Raises:
        Emu3Error: a column is missing, or several columns fit and none has a usual name.
    """
    return _find(schema, columns.picture, _PICTURES, where), _find(schema, columns.text, _CAPTIONS, where)


def _find(schema: pa.Schema, wanted: str | None, role: _Role, where: str) -> str:
    fitting = [field.name for field in schema if role.fits(field.type)]
    what, names = role.what, shown(schema.names)
    if wanted is not None:
        if wanted in fitting:
            return wanted
        found = f"it is {schema.field(wanted).type!s:.80}" if wanted in schema.names else "it does not exist"
        raise Emu3Error(f"{where}: column {shown(wanted)} cannot hold {what}: {found}; the columns are {names}")
    for name in role.usual:
        if name in fitting:
            return name
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        raise Emu3Error(f"{where}: no column holds {what}: its columns are {names}; add a column of {role.kind}")
    raise Emu3Error(f"{where}: columns {shown(fitting)} can hold {what}: name one with {role.option}")


def cell_bytes(value: Any) -> tuple[bytes | None, str | None]:
    """Returns the bytes and the path in a picture's cell. Either may be None."""
    if isinstance(value, dict):
        return value.get("bytes"), value.get("path")
    return value, None


@dataclasses.dataclass(frozen=True)
class CellPicture:
    """A picture in a table.

    Attributes:
        read: reads the picture's bytes, given the row.
        row: the row.
        name: name of the picture in errors.
    """

    read: Callable[[int], bytes]
    row: int
    name: str

    def check(self) -> None:
        """Does nothing: errors are found only by reading the picture."""

    def load(self) -> Image.Image:
        return load_image(Path(self.name), self.read(self.row))

    def ends(self) -> bytes:
        return bytes_ends(self.read(self.row))


class ParquetFiles:
    """The captioned pictures of Parquet files, in order. Keeps two row groups in memory."""

    def __init__(self, paths: Sequence[Path], columns: Columns):
        """Reads all captions.

        Raises:
            Emu3Error: a file is damaged, has no column with pictures or captions, or has a row group that is too large;
                or there are no rows.
        """
        self._paths = list(paths)
        digest, ends = hashlib.sha256(b"parquet"), [0]
        self._groups: list[tuple[int, int]] = []  # for each row group: number of its file, number of the group in it
        self._firsts: list[int] = []  # for each file: number of rows in all earlier files
        self._columns: list[tuple[str, str]] = []
        for number, path in enumerate(paths):
            with reading(path, _AGAIN):
                plain_file(path)
                with pq.ParquetFile(path) as file:
                    chosen = choose(file.schema_arrow, columns, str(path))
                    self._columns.append(chosen)
                    self._firsts.append(ends[-1])
                    digest.update(repr((chosen, path.stat().st_size)).encode())
                    for group in range(file.num_row_groups):
                        rows = file.metadata.row_group(group)
                        # Check the size of all columns together. PyArrow crashes if a damaged file is asked for the
                        # metadata of one column.
                        limit(f"{path} row group {group}", "bytes", rows.total_byte_size, _MAX_GROUP)
                        self._groups.append((number, group))
                        ends.append(ends[-1] + rows.num_rows)
                    for text in self._texts(file, chosen[1]):
                        digest.update(repr(text).encode("utf-8", "surrogatepass"))
        if not ends[-1]:
            raise Emu3Error(f"{paths[0]} has no rows: give Parquet files of captioned pictures")
        self._ends = np.array(ends)
        self._tables = Recent(self._read, _HELD)
        self.digest = digest.hexdigest()

    @staticmethod
    def _texts(file: pq.ParquetFile, column: str) -> Iterator[str | None]:
        for batch in file.iter_batches(_BATCH, columns=[column]):
            yield from batch.column(0).to_pylist()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Example:
        """Reads example `index`. Raises an `Emu3Error` that names the row if its caption is empty or not text."""
        path, row, caption = self._cell(index, 1)
        where = f"{path} row {row}"
        name = f"{path.name} row {row}"
        return Example(where, name, clean_caption(caption, where), CellPicture(self._bytes, index, where))

    def _cell(self, index: int, which: int) -> tuple[Path, int, Any]:
        """Reads a cell. Returns the file, the number of the row in the file, and the picture (0) or caption (1)."""
        group = int(np.searchsorted(self._ends, index, side="right")) - 1
        number, _ = self._groups[group]
        path, row = self._paths[number], index - self._firsts[number]
        with reading(f"{path} row {row}", _AGAIN):
            cells = self._tables[group][self._columns[number][which]]
            return path, row, cells[index - int(self._ends[group])].as_py()

    def _bytes(self, index: int) -> bytes:
        data, _ = cell_bytes(self._cell(index, 0)[2])
        if not data:
            raise Emu3Error("this row has no picture: write the Parquet file with embedded pictures")
        return data

    def _read(self, group: int) -> pa.Table:
        """Reads a row group."""
        number, own = self._groups[group]
        with reading(self._paths[number], _AGAIN), pq.ParquetFile(self._paths[number]) as file:
            return file.read_row_group(own, columns=list(self._columns[number]), use_threads=False)

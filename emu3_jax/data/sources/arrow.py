"""Columns of pictures and captions in Arrow tables: of Parquet files here, of hub data sets in `hub`.

A picture is bytes, or as Hugging Face's `datasets` writes it a struct of bytes and a path. Parquet is read with
`pyarrow`, on which `datasets` rests too: from the file itself, without the copy that `datasets` would make.
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

_MAX_GROUP = 2 << 30  # bytes of a row group, whose pictures are in memory together
_HELD = 2  # row groups that are kept: threads read on both sides of a border
_AGAIN = "download or write the Parquet file again"
_BATCH = 256  # rows whose captions are read together


def is_picture(kind: pa.DataType) -> bool:
    """Whether a column of this type may hold pictures."""
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and is_picture(kind.field(place).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds texts."""
    if pa.types.is_dictionary(kind):  # as pandas writes categories
        return is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


@dataclasses.dataclass(frozen=True)
class _Role:
    """What a column may hold: what that is called, its type, the option that names one, usual names."""

    what: str
    kind: str
    option: str
    usual: Sequence[str]
    fits: Callable[[pa.DataType], bool]


_PICTURES = _Role("pictures", "bytes", "--image-column", PICTURE_COLUMNS, is_picture)
_CAPTIONS = _Role("captions", "text", "--text-column", TEXT_COLUMNS, is_text)


def choose(schema: pa.Schema, columns: Columns, where: str) -> tuple[str, str]:
    """The columns with pictures and with captions.

    Raises:
        Emu3Error: there is none of a kind, or it does not follow which of several is meant.
    """
    return _find(schema, columns.picture, _PICTURES, where), _find(schema, columns.text, _CAPTIONS, where)


def _find(schema: pa.Schema, wanted: str | None, role: _Role, where: str) -> str:
    fitting = [field.name for field in schema if role.fits(field.type)]
    what, names = role.what, shown(schema.names)
    if wanted is not None:
        if wanted in fitting:
            return wanted
        found = f"it is {schema.field(wanted).type!s:.80}" if wanted in schema.names else "there is none of that name"
        raise Emu3Error(f"{where}: column {shown(wanted)} cannot hold {what}: {found}; it has {names}")
    for name in role.usual:
        if name in fitting:
            return name
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        raise Emu3Error(f"{where}: no column holds {what}: it has {names}; add one of {role.kind}")
    raise Emu3Error(f"{where}: columns {shown(fitting)} may hold {what}: name one with {role.option}")


def cell_bytes(value: Any) -> tuple[bytes | None, str | None]:
    """Bytes and path of a picture's cell."""
    if isinstance(value, dict):
        return value.get("bytes"), value.get("path")
    return value, None


@dataclasses.dataclass(frozen=True)
class CellPicture:
    """A picture in a table: what reads its bytes, and its row there."""

    read: Callable[[int], bytes]
    row: int
    name: str

    def check(self) -> None:
        """Nothing is known before it is read."""

    def load(self) -> Image.Image:
        return load_image(Path(self.name), self.read(self.row))

    def ends(self) -> bytes:
        return bytes_ends(self.read(self.row))


class ParquetFiles:
    """The captioned pictures of Parquet files, in their order. At most two groups of rows are in memory."""

    def __init__(self, paths: Sequence[Path], columns: Columns):
        """Reads all captions.

        Raises:
            Emu3Error: a file is damaged, has no rows or no column with pictures or captions, or groups of rows that are
                too large.
        """
        self._paths = list(paths)
        digest, ends = hashlib.sha256(b"parquet"), [0]
        self._groups: list[tuple[int, int]] = []  # number of the file, number of the group in it
        self._firsts: list[int] = []  # of each file, how many rows come before it
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
                        # Of all columns: PyArrow ends the process where a damaged file is asked for one's metadata.
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
        """Example `index`. Raises an `Emu3Error` that names the row if it has no caption or picture."""
        path, row, caption = self._cell(index, 1)
        where = f"{path} row {row}"
        name = f"{path.name} row {row}"
        return Example(where, name, clean_caption(caption, where), CellPicture(self._bytes, index, where))

    def _cell(self, index: int, which: int) -> tuple[Path, int, Any]:
        """The file of a row, its number there, and its picture (0) or caption (1)."""
        group = int(np.searchsorted(self._ends, index, side="right")) - 1
        number, _ = self._groups[group]
        path, row = self._paths[number], index - self._firsts[number]
        with reading(f"{path} row {row}", _AGAIN):
            cells = self._tables[group][self._columns[number][which]]
            return path, row, cells[index - int(self._ends[group])].as_py()

    def _bytes(self, index: int) -> bytes:
        data, _ = cell_bytes(self._cell(index, 0)[2])
        if not data:
            raise Emu3Error("there are no bytes of a picture: embed the pictures when the Parquet file is written")
        return data

    def _read(self, group: int) -> pa.Table:
        """A group of rows."""
        number, own = self._groups[group]
        with reading(self._paths[number], _AGAIN), pq.ParquetFile(self._paths[number]) as file:
            return file.read_row_group(own, columns=list(self._columns[number]), use_threads=False)

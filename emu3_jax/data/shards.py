"""Prepared data on disk: shards of records, and the index that lists the shards.

Shards are ArrayRecord files. Training shuffles over all records and resumes in the middle, so it needs random access to
records of different length. ArrayRecord reads a record with one seek and checks its hash, and a shard is a single file,
which can be renamed when it is complete. Grain depends on ArrayRecord anyway. TensorStore, which Orbax uses, was not
chosen: it stores dense arrays, so records would need offset tables, and reading one record would read a whole chunk.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

from emu3_jax.data.readers import Readers, open_shard
from emu3_jax.data.records import KINDS, PAIRS, RECORDS, Record
from emu3_jax.errors import Emu3Error
from emu3_jax.fields import is_whole
from emu3_jax.files import new_file
from emu3_jax.foreign import file_name, local_path, read_json, reading, storage_path
from emu3_jax.printable import shown
from emu3_jax.storage import Folder, is_remote

try:
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
except ImportError as missing:
    raise Emu3Error("token data needs ArrayRecord, which is not installed: pip install 'emu3-jax[train]'") from missing

FORMAT = 1
INDEX = "index.json"
_AGAIN = "run the same emu3-jax prepare again"

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Codebook:
    """Identity of the codebook that codes belong to.

    All published models share one vision tokenizer. Training a vision tokenizer changes its codebook, so old codes
    then stand for other vectors.

    Attributes:
        size: number of codes.
        sha256: SHA-256 of the codebook's vectors.
    """

    size: int
    sha256: str

    @classmethod
    def of(cls, embedding: np.ndarray) -> "Codebook":
        """Identifies a codebook by its vectors [K, C]: `params["quantize"]["embedding"]` of the vision tokenizer."""
        return cls(len(embedding), hashlib.sha256(np.ascontiguousarray(embedding, np.float32).tobytes()).hexdigest())


@dataclasses.dataclass(frozen=True)
class Shard:
    """A finished shard.

    Attributes:
        file: name of the file.
        records: number of records.
        bytes: size of the file.
        skipped: for each skipped entry, a line that names it and gives the reason.
    """

    file: str
    records: int
    bytes: int
    skipped: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, data: Any, file: Path) -> "Shard":
        """Checks and converts an object from the JSON file `file`. Raises an `Emu3Error` that names the file."""
        fields = [field.name for field in dataclasses.fields(cls)]
        with reading(file, f"delete it and {_AGAIN}"):
            name, records, size, skipped = (data[field] for field in fields)
            file_name(name, f"{file}: file")
            # A record takes at least one byte. This check bounds the number of records that an index can claim.
            if not is_whole(size, 0) or not is_whole(records, 0) or records > size:
                raise Emu3Error(
                    f"{file} is damaged ({shown(records)} records in {shown(size)} bytes): delete it and {_AGAIN}"
                )
            if not isinstance(skipped, list) or not all(isinstance(reason, str) for reason in skipped):
                raise Emu3Error(f"{file} is damaged (skipped is {shown(skipped)}): delete it and {_AGAIN}")
        return cls(name, records, size, tuple(skipped))


@dataclasses.dataclass(frozen=True)
class Index:
    """The contents of a directory of prepared data.

    Attributes:
        job: SHA-256 of everything that determines the records: entries, sizes, codebook, number of shards.
        codebook: identity of the codebook.
        shards: the shards in order.
        kind: what the shards hold, one of `KINDS`.
    """

    job: str
    codebook: Codebook
    shards: tuple[Shard, ...]
    kind: str = RECORDS

    @property
    def records(self) -> int:
        """Number of records in all shards."""
        return sum(shard.records for shard in self.shards)

    @property
    def skipped(self) -> tuple[str, ...]:
        """A line for each skipped entry of all shards."""
        return tuple(skipped for shard in self.shards for skipped in shard.skipped)

    def to_json(self) -> dict[str, Any]:
        # An index without a kind is of records: that is how versions without pairs wrote them.
        kind = {} if self.kind == RECORDS else {"kind": self.kind}
        return {
            "format": FORMAT,
            **kind,
            "records": self.records,
            "job": self.job,
            "codebook": dataclasses.asdict(self.codebook),
            "shards": [dataclasses.asdict(shard) for shard in self.shards],
        }

    @classmethod
    def read(cls, directory: Path, kind: str = RECORDS) -> "Index":
        """Reads the index of `directory`. Raises an `Emu3Error` if it is absent, damaged or of another version.

        Error lines name the command that writes directories of `kind`.
        """
        again = f"run the same {KINDS[kind]} again"
        file = local_path(directory) / INDEX
        if not os.path.lexists(file):
            raise Emu3Error(
                f"{directory} has no {INDEX}: give a directory that {KINDS[kind]} wrote, or, if that was "
                f"interrupted, {again}"
            )
        remedy = f"delete it and {again}"
        data = read_json(file, remedy)
        with reading(file, remedy):
            if data["format"] != FORMAT:
                raise Emu3Error(f"{file}: format is {shown(data['format'])}, but this version reads {FORMAT}: {remedy}")
            codebook = Codebook(data["codebook"]["size"], data["codebook"]["sha256"])
            texts = isinstance(data["job"], str) and isinstance(codebook.sha256, str)
            if not texts or not is_whole(codebook.size, 1) or not isinstance(data["shards"], list):
                raise Emu3Error(f"{file} is damaged (job, codebook or shards has a wrong type): {remedy}")
            found = data.get("kind", RECORDS)
            if not isinstance(found, str) or found not in KINDS:
                raise Emu3Error(f"{file}: kind is {shown(found)}, but this version reads {', '.join(KINDS)}: {remedy}")
            return cls(data["job"], codebook, tuple(Shard.from_json(shard, file) for shard in data["shards"]), found)


def write_json(file: Path, data: Any) -> None:
    """Writes a JSON file, all or nothing."""
    with new_file(file) as temporary:
        text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # file names may not be UTF-8


class Storable(Protocol):
    """What a shard holds: a `Record`, a `Pair` or a `DrawnSample`."""

    def to_bytes(self) -> bytes: ...


def write_shard(file: Path, records: Iterable[Storable]) -> tuple[int, int]:
    """Writes a shard, all or nothing. Equal records give equal bytes.

    Returns:
        The number of records, and the size of the file in bytes.

    Raises:
        Emu3Error: the file cannot be written, for example because the disk is full. Errors of `records` pass unchanged.
    """
    count = 0
    with new_file(file) as temporary:
        # Groups of one record, so that each record can be read alone.
        writer = _writing(file, ArrayRecordWriter, str(storage_path(temporary)), "group_size:1")
        for record in records:
            _writing(file, writer.write, record.to_bytes())
            count += 1
        _writing(file, writer.close)
        size = temporary.stat().st_size
    return count, size


def _writing(file: Path, step: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return step(*arguments)
    except RuntimeError as error:  # ArrayRecord raises RuntimeError for every operating system error
        reason = str(error).split(";", 1)[0]
        raise Emu3Error(f"cannot write {file}: {reason}; free space or choose another place") from error


def count_records(file: Path) -> int:
    """The number of records in a local shard. Raises an `Emu3Error` if it is damaged."""
    with reading(file, f"delete it and {_AGAIN}"):
        reader = ArrayRecordReader(str(storage_path(file)))
        try:
            return reader.num_records()
        finally:
            reader.close()


def read_shard(file: Path, shard: Shard, parse: Callable[[bytes], _T]) -> Iterator[_T]:
    """Yields the items of a finished shard in order, before there is an index.

    Args:
        file: the shard's file, local.
        shard: what its voucher says.
        parse: makes an item of its bytes.

    Raises:
        Emu3Error: the file is damaged.
    """
    with reading(file, f"delete it and {_AGAIN}"):
        source = open_shard(file, shard.records)
        for index in range(shard.records):
            yield parse(source[index])


class PreparedShards:
    """Random access to the items of a directory of prepared data. `PreparedData` and `PreparedPairs` say of which kind.

    Attributes:
        kind: what the directory must hold, one of `KINDS`.
        directory: the directory; a local copy if it is in a bucket.
        index: its contents.
        readers: its shards. A shard in a bucket is copied to the local cache when a record of it is read.
    """

    kind: ClassVar[str]

    def __init__(self, directory: Path):
        """Opens the directory, but no shard. Of a directory in a bucket, copies only the index to the local cache.

        Raises:
            Emu3Error: the directory holds data of another kind, a shard is missing or truncated, or there are no
                records.
        """
        self._again = f"run the same {KINDS[self.kind]} again"
        folder = Folder(directory, lambda name: "/" not in name) if is_remote(directory) else None
        if folder is not None:
            folder.fetch(INDEX)
        self.directory = Path(directory) if folder is None else folder.copy
        self.index = Index.read(self.directory, self.kind)
        if self.index.kind != self.kind:
            trained = RECORDS, PAIRS
            task = f", or choose the task that trains on {self.index.kind}"
            raise Emu3Error(
                f"{directory} holds {self.index.kind} ({KINDS[self.index.kind]} wrote it), but {self.kind} are needed: "
                f"give a directory that {KINDS[self.kind]} wrote"
                + (task if self.kind in trained and self.index.kind in trained else "")
            )
        if not self.index.records:
            raise Emu3Error(
                f"{directory} holds no records: all {len(self.index.skipped)} entries were skipped; prepare other data"
            )
        for shard in self.index.shards:
            file = self.directory / shard.file
            local = file.stat().st_size if folder is None and file.is_file() else 0
            size = local if folder is None else folder.size(shard.file)
            if size != shard.bytes:
                raise Emu3Error(
                    f"{file} has {size} bytes, but {INDEX} says {shard.bytes}: copy the directory again, or delete "
                    f"this shard and {self._again}"
                )
        self._shards = [shard for shard in self.index.shards if shard.records]
        files = [self.directory / shard.file for shard in self._shards]
        self.readers = Readers(files, self.counts, None if folder is None else folder.fetch)

    def __len__(self) -> int:
        return self.index.records

    @property
    def counts(self) -> list[int]:
        """Number of records in each shard that has any, in the order of the records' numbers."""
        return [shard.records for shard in self._shards]

    def _read(self, index: int, parse: Callable[[bytes], _T]) -> _T:
        """Reads item `index`. Raises an `Emu3Error` that names the shard if it is damaged or cannot be copied."""

        def damaged(error: Exception) -> Emu3Error:
            file = self.directory / self._shards[self.readers.shard_of(index)].file
            reason = str(error).split("; ", 1)[0]
            return Emu3Error(f"{file} is damaged ({reason}): delete it and {self._again}")

        try:
            data = self.readers[index]
        except Emu3Error:  # the bucket cannot be read, or the cache not written
            raise
        except Exception as error:  # ArrayRecord raises errors of many kinds
            raise damaged(error) from error
        try:
            return parse(data)
        except Exception as error:
            raise damaged(error) from error

    def require_codebook(self, size: int, sha256: str | None = None) -> None:
        """Checks that the data were prepared with the model's vision tokenizer.

        Args:
            size: number of codes of the model, `SpecialTokens.visual_count`.
            sha256: SHA-256 of the model's codebook; None if the model has no vision tokenizer.

        Raises:
            Emu3Error: the data were prepared with another codebook.
        """
        ours = self.index.codebook
        if ours.size != size:
            raise Emu3Error(
                f"{self.directory} was prepared with a codebook of {ours.size} codes, but the model has {size}: "
                "prepare the data with this model"
            )
        if sha256 is not None and ours.sha256 != sha256:
            raise Emu3Error(
                f"{self.directory} was prepared with another vision tokenizer: the data's codebook has checksum "
                f"{ours.sha256[:12]}, but the model's codebook has {sha256[:12]}; prepare the data with this model "
                "(emu3-jax prepare --model)"
            )


class PreparedData(PreparedShards):
    """Random access to the records of a directory that `prepare` wrote. Works as a data source for Grain."""

    kind = RECORDS

    def __getitem__(self, index: int) -> Record:
        """Reads record `index`. Raises an `Emu3Error` that names the shard if it is damaged."""
        return self._read(index, Record.from_bytes)

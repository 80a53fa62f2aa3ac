"""A directory of shards while it is written: locks, vouchers of finished shards, and the index at the end.

A shard is written under a temporary name and renamed. Then a small JSON file beside it, the voucher, marks it as
finished. A run that starts again keeps shards with vouchers and writes the others. Of n hosts, each writes every n-th
shard. A host that finds all vouchers writes the index. Several hosts may write it, because its contents depend only on
the shards. Each host locks its share, so the same command cannot run twice at the same time.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from emu3_jax import files, locks, storage
from emu3_jax.data.records import RECORDS
from emu3_jax.data.shards import INDEX, Codebook, Index, Shard, Storable, count_records, write_json, write_shard
from emu3_jax.errors import Emu3Error
from emu3_jax.fields import is_whole
from emu3_jax.printable import counted, shown

SKIPPED = "skipped.txt"  # file in the output directory with one line for each skipped entry
_OTHER = "data prepared from another source, or with other options or another model"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
        index: the index; None while shards of other hosts are missing.
        missing: number of missing shards.
    """

    index: Index | None
    missing: int


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a voucher says about its whole job, so that shards can be joined without their source.

    Attributes:
        entries: number of entries of all shards.
        codebook: codebook of the vision tokenizer that made the codes.
    """

    entries: int
    codebook: Codebook

    @classmethod
    def from_json(cls, data: Any, voucher: Path) -> "Facts":
        """Reads a voucher's facts. Raises an `Emu3Error` that names the voucher."""
        if "entries" not in data:
            raise Emu3Error(
                f"{voucher} does not say how many entries there are, as version 0.1.0 wrote it or another command than "
                "prepare: run the same emu3-jax prepare again, which keeps the shards"
            )
        codebook = Codebook(data["codebook"]["size"], data["codebook"]["sha256"])
        entries = data["entries"]
        if not is_whole(entries, 1) or not is_whole(codebook.size, 1) or not isinstance(codebook.sha256, str):
            raise Emu3Error(f"{voucher} is damaged (entries or codebook): delete it and run again")
        return cls(entries, codebook)

    def check(self, file: Path, shard: Shard, number: int, count: int) -> None:
        """Raises an `Emu3Error` unless shard `number` of `count` holds what its voucher says, and its share of entries.

        The records of a shard in a bucket are not counted.
        """
        wanted = self.entries * (number + 1) // count - self.entries * number // count
        size = storage.size(file)
        if size != shard.bytes:
            raise Emu3Error(f"{file} has {size or 0} bytes, but its voucher says {shard.bytes}: copy it again")
        records = shard.records if storage.is_remote(file) else count_records(file)
        if records != shard.records or records + len(shard.skipped) != wanted:
            raise Emu3Error(
                f"{file} has {counted(records, 'record')} and {len(shard.skipped)} skipped entries, but should have "
                f"{wanted} in all, {shard.records} of them records: delete it and run the same emu3-jax prepare again"
            )


@contextlib.contextmanager
def held(directory: Path, host: int, hosts: int, doing: str = "prepared") -> Iterator[None]:
    """Makes the directory, and locks this host's share of it. If the block fails, removes a new directory if empty.

    The lock's name contains host and hosts, so the hosts of a run do not block each other. Two runs with different
    numbers of hosts may write the same shard. That is harmless: they use temporary names and write the same bytes.

    Args:
        directory: local or in a bucket.
        host: number of this host, from 0.
        hosts: number of hosts that share the work.
        doing: what happens to the directory, for the error line of a second run.

    Raises:
        Emu3Error: another process works on this share, or `host` and `hosts` are not legal.
    """
    if hosts < 1 or not 0 <= host < hosts:
        raise Emu3Error(f"host is {host} of {hosts}: hosts must be at least 1, and host must be 0 to hosts - 1")

    def busy(holder: str) -> str:
        return f"{directory} is being {doing} by {holder}: wait for it, stop it, or choose another directory"

    with files.shared_directory(directory), locks.locked(directory / f".lock-{host}-of-{hosts}", busy, passing=True):
        yield


class ShardDirectory:
    """The output directory with its shards and vouchers.

    Construction raises an `Emu3Error` if the directory holds data of another job.

    Attributes:
        path: the directory, local or in a bucket.
    """

    def __init__(
        self,
        path: Path,
        job: str,
        count: int,
        *,
        kind: str = RECORDS,
        other: str = _OTHER,
        facts: Facts | None = None,
    ):
        """
        Args:
            path: the directory, local or in a bucket.
            job: SHA-256 of everything that determines the contents.
            count: number of shards.
            kind: what the shards hold, see `shards.KINDS`.
            other: what a directory of another job holds, for the error line.
            facts: what vouchers say about the job, and `merge` checks; None for nothing.
        """
        self.path, self._job, self._count, self._kind, self._facts = path, job, count, kind, facts
        for file in (path / INDEX, *storage.matching(path, "shard-*.json")):
            if (data := self._read(file)) is None:
                continue
            if not isinstance(data, dict):
                raise Emu3Error(f"{file} is damaged ({shown(data)}): delete it and run again")
            if data.get("job") != job:
                raise Emu3Error(f"{path} holds {other}: choose another directory, or delete it first")

    def _read(self, file: Path) -> Any:
        """Reads a JSON file. Returns None if it does not exist, for example because another host is replacing it."""
        try:
            return storage.read_json(file, "delete it and run again")
        except Emu3Error as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise

    def file(self, number: int) -> Path:
        """The path of shard `number`."""
        return self.path / f"shard-{number:05d}-of-{self._count:05d}.arrayrecord"

    def finished(self, number: int) -> Shard | None:
        """Returns shard `number` if it has a voucher and its file still has the right size, else None."""
        file = self.file(number)
        voucher = file.with_suffix(".json")
        data = self._read(voucher)
        if data is None:
            return None
        shard = Shard.from_json(data, voucher)
        if shard.file != file.name:
            raise Emu3Error(f"{voucher} is damaged (it names {shown(shard.file)}): delete it and run again")
        if storage.size(file) != shard.bytes:
            return None
        if self._facts is not None and "entries" not in data:  # version 0.1.0 wrote less
            self.vouch(shard)
        return shard

    def write(self, number: int, made: Iterable[Storable | str], step: Callable[[], Any]) -> None:
        """Writes shard `number`, then its voucher.

        Args:
            number: number of the shard.
            made: its items in order; a text is the reason why an item is skipped.
            step: called once per item.
        """
        file, skipped = self.file(number), []

        def records() -> Iterator[Storable]:
            for item in made:
                step()
                if isinstance(item, str):
                    skipped.append(item)
                else:
                    yield item

        storage.unlink(file.with_suffix(".json"))
        count, size = write_shard(file, records())
        self.vouch(Shard(file.name, count, size, tuple(skipped)))

    def vouch(self, shard: Shard) -> None:
        """Writes the voucher of a finished shard."""
        facts = {} if self._facts is None else dataclasses.asdict(self._facts)
        voucher = (self.path / shard.file).with_suffix(".json")
        write_json(voucher, {"job": self._job, **dataclasses.asdict(shard), **facts})

    def merge(self, codebook: Codebook) -> Outcome:
        """Writes the index if every shard is finished. If all entries were skipped, leaves only the list of reasons.

        Raises:
            Emu3Error: with `facts`, a shard has another number of records or entries than it should.
        """
        shards = [self.finished(number) for number in range(self._count)]
        finished = [shard for shard in shards if shard is not None]
        if len(finished) < self._count:
            return Outcome(None, self._count - len(finished))
        if self._facts is not None:
            for number, shard in enumerate(finished):
                self._facts.check(self.path / shard.file, shard, number, self._count)
        index = Index(self._job, codebook, tuple(finished), self._kind)
        self._list_skipped(index)
        if not index.records:
            for shard in finished:
                file = self.path / shard.file
                storage.unlink(file.with_suffix(".json"))
                storage.unlink(file)
            return Outcome(index, 0)
        write_json(self.path / INDEX, index.to_json())
        return Outcome(index, 0)

    def _list_skipped(self, index: Index) -> None:
        """Writes `skipped.txt`, or removes it if no entry was skipped."""
        file = self.path / SKIPPED
        if not index.skipped:
            storage.unlink(file)
            return
        with files.new_file(file) as temporary:
            temporary.write_text("".join(f"{reason}\n" for reason in index.skipped), "utf-8", "backslashreplace")

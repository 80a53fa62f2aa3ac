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
from emu3_jax.data.shards import INDEX, Codebook, Index, Shard, Storable, write_json, write_shard
from emu3_jax.errors import Emu3Error
from emu3_jax.printable import shown

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

    def __init__(self, path: Path, job: str, count: int, *, kind: str = RECORDS, other: str = _OTHER):
        """
        Args:
            path: the directory, local or in a bucket.
            job: SHA-256 of everything that determines the contents.
            count: number of shards.
            kind: what the shards hold, see `shards.KINDS`.
            other: what a directory of another job holds, for the error line.
        """
        self.path, self._job, self._count, self._kind = path, job, count, kind
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
        return shard if storage.size(file) == shard.bytes else None

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
        shard = Shard(file.name, count, size, tuple(skipped))
        write_json(file.with_suffix(".json"), {"job": self._job, **dataclasses.asdict(shard)})

    def merge(self, codebook: Codebook) -> Outcome:
        """Writes the index if every shard is finished. If all entries were skipped, leaves only the list of reasons."""
        shards = [self.finished(number) for number in range(self._count)]
        finished = [shard for shard in shards if shard is not None]
        if len(finished) < self._count:
            return Outcome(None, self._count - len(finished))
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

"""Writes entries to shards and an index, in parallel and on several hosts. This is the work of `emu3-jax prepare`.

A shard is written under a temporary name and renamed. Then a small JSON file beside it, the voucher, marks it as
finished. A run that starts again keeps shards with vouchers and writes the others. Of n hosts, each writes every n-th
shard. A host that finds all vouchers writes the index. Several hosts may write it, because its contents depend only on
the shards. Each host locks its share, so the same command cannot run twice at the same time.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from emu3_jax import files, locks, storage
from emu3_jax.data.config import MAX_THREADS
from emu3_jax.data.records import Record
from emu3_jax.data.shards import FORMAT, INDEX, Codebook, Index, Shard, write_json, write_shard
from emu3_jax.errors import Emu3Error
from emu3_jax.printable import shown
from emu3_jax.progress import Progress

SKIPPED = "skipped.txt"  # file in the output directory with one line for each skipped entry
SHARD_ENTRIES = 1024  # entries in a shard by default: some 20 MB; a killed run loses at most a few minutes of work

_T = TypeVar("_T")
_R = TypeVar("_R")


class Entries(Protocol):
    """Entries that can be prepared, such as `SourceRecords` and `FeatureRecords`."""

    digest: str  # hash of everything that determines the records

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Makes record `index`. Raises an `Emu3Error` if it cannot be made."""

    def check(self, index: int) -> None:
        """Raises an `Emu3Error` if entry `index` has an error that can be found without encoding it."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
        index: the index; None while shards of other hosts are missing.
        missing: number of missing shards.
    """

    index: Index | None
    missing: int


def prepare(
    entries: Entries,
    output: Path,
    codebook: Codebook,
    *,
    shards: int | None = None,
    workers: int = 4,
    on_error: str = "stop",
    host: int = 0,
    hosts: int = 1,
    progress: bool | None = None,
) -> Outcome:
    """Writes the records of `entries` to shards in `output`. When all shards are finished, also writes the index.

    The bytes depend on the entries, the codebook and the number of shards, but not on workers, hosts or interruptions.

    Args:
        entries: the entries, in the order in which they are written.
        output: a directory; made if absent.
        codebook: codebook of the vision tokenizer that makes the codes.
        shards: number of shards; by default one for every 1,024 entries.
        workers: number of threads that read and encode.
        on_error: "stop" at the first bad entry, or "skip" bad entries and list them in the index.
        host: number of this host, from 0.
        hosts: number of hosts that share the work, all with the same `output`.
        progress: True shows a bar on a terminal and lines in a log, None only the bar, False nothing.

    Raises:
        Emu3Error: an argument is not legal, an entry is bad and `on_error` is "stop", `output` holds other data, or the
            disk is full. Finished shards stay.
    """
    if on_error not in ("stop", "skip"):
        raise Emu3Error(f"on_error is {on_error!r}: it must be stop or skip")
    if hosts < 1 or not 0 <= host < hosts:
        raise Emu3Error(f"host is {host} of {hosts}: hosts must be at least 1, and host must be 0 to hosts - 1")
    check_workers(workers)
    count = -(-len(entries) // SHARD_ENTRIES) if shards is None else shards
    if not 1 <= count <= len(entries):
        raise Emu3Error(f"shards is {count}: it must be 1 to {len(entries)}, the number of entries")
    job = _job(entries.digest, codebook, count)
    output = storage.place(output)
    storage.storage_place(output)  # refuses a path that ArrayRecord cannot open, before any work
    with _held(output, host, hosts):
        directory = _Directory(output, job, count)
        mine = range(host, count, hosts)
        bounds = [len(entries) * number // count for number in range(count + 1)]
        done = {number: shard for number in mine if (shard := directory.finished(number)) is not None}
        todo = [number for number in mine if number not in done]
        if on_error == "stop":
            _check(entries, directory, done.values(), (i for n in todo for i in range(bounds[n], bounds[n + 1])))
        total, finished = (sum(bounds[n + 1] - bounds[n] for n in numbers) for numbers in (mine, done))
        bar = Progress(progress, total, "records", name="prepare", initial=finished)
        with bar, _workers(workers) as in_order:
            for number in todo:
                indices = range(bounds[number], bounds[number + 1])
                directory.write(number, in_order(lambda index: _make(entries, index, on_error), indices), bar.update)
        return directory.merge(codebook)


def check_workers(workers: int) -> None:
    """Raises an `Emu3Error` unless `workers` is a legal number of threads."""
    if not 1 <= workers <= MAX_THREADS:
        raise Emu3Error(f"workers is {workers}: it must be 1 to {MAX_THREADS}")


@contextlib.contextmanager
def _held(directory: Path, host: int, hosts: int) -> Iterator[None]:
    """Makes the directory, and locks this host's share of it. If the block fails, removes a new directory if empty.

    The lock's name contains host and hosts, so the hosts of a run do not block each other. Two runs with different
    numbers of hosts may write the same shard. That is harmless: they use temporary names and write the same bytes.
    """

    def busy(holder: str) -> str:
        return f"{directory} is being prepared by {holder}: wait for it, stop it, or choose another directory"

    with files.shared_directory(directory), locks.locked(directory / f".lock-{host}-of-{hosts}", busy, passing=True):
        yield


def _job(digest: str, codebook: Codebook, shards: int) -> str:
    parts = {"format": FORMAT, "entries": digest, "codebook": dataclasses.asdict(codebook), "shards": shards}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _check(entries: Entries, directory: "_Directory", done: Iterable[Shard], indices: Iterable[int]) -> None:
    """Raises the first error that can be found before the long work starts."""
    for shard in done:
        for reason in shard.skipped:
            raise Emu3Error(
                f"{reason}. An earlier run skipped it: correct it and delete {directory.path / shard.file}, or skip it "
                "again"
            )
    for index in indices:
        entries.check(index)


def _make(entries: Entries, index: int, on_error: str) -> Record | str:
    """Makes record `index`, or returns the reason why it is skipped."""
    try:
        return entries[index]
    except Emu3Error as error:
        if on_error == "stop":
            raise
        return str(error)


@contextlib.contextmanager
def _workers(count: int) -> Iterator[Callable[[Callable[[_T], _R], Iterable[_T]], Iterator[_R]]]:
    """Yields a `map` over threads that keeps the order, and works on at most two items per thread in advance."""
    executor = ThreadPoolExecutor(count)

    def in_order(function: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[_R]:
        pending: collections.deque[Future[_R]] = collections.deque()
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) > 2 * count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    try:
        yield in_order
    finally:
        executor.shutdown(cancel_futures=True)


class _Directory:
    """The output directory with its shards and vouchers.

    Construction raises an `Emu3Error` if the directory holds data of another job.
    """

    def __init__(self, path: Path, job: str, count: int):
        self.path, self._job, self._count = path, job, count
        for file in (path / INDEX, *storage.matching(path, "shard-*.json")):
            if (data := self._read(file)) is None:
                continue
            if not isinstance(data, dict):
                raise Emu3Error(f"{file} is damaged ({shown(data)}): delete it and run again")
            if data.get("job") != job:
                raise Emu3Error(
                    f"{path} holds data prepared from another source, or with other options or another model: "
                    "choose another directory, or delete it first"
                )

    def _read(self, file: Path) -> Any:
        """Reads a JSON file. Returns None if it does not exist, for example because another host is replacing it."""
        try:
            return storage.read_json(file, "delete it and run again")
        except Emu3Error as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise

    def _shard(self, number: int) -> Path:
        return self.path / f"shard-{number:05d}-of-{self._count:05d}.arrayrecord"

    def finished(self, number: int) -> Shard | None:
        """Returns shard `number` if it has a voucher and its file still has the right size, else None."""
        file = self._shard(number)
        voucher = file.with_suffix(".json")
        data = self._read(voucher)
        if data is None:
            return None
        shard = Shard.from_json(data, voucher)
        if shard.file != file.name:
            raise Emu3Error(f"{voucher} is damaged (it names {shown(shard.file)}): delete it and run again")
        return shard if storage.size(file) == shard.bytes else None

    def write(self, number: int, made: Iterable[Record | str], step: Callable[[], Any]) -> None:
        """Writes shard `number`, then its voucher. Calls `step` once per entry."""
        file, skipped = self._shard(number), []

        def records() -> Iterator[Record]:
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
        index = Index(self._job, codebook, tuple(finished))
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

"""Writes entries to shards and an index, in parallel and on several hosts. This is the work of `emu3-jax prepare`.

`shard_directory` says how runs are interrupted and shared.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

from emu3_jax import storage
from emu3_jax.data import shard_directory
from emu3_jax.data.config import MAX_THREADS
from emu3_jax.data.records import Record
from emu3_jax.data.shard_directory import Facts, Outcome, ShardDirectory
from emu3_jax.data.shards import FORMAT, Codebook, Shard
from emu3_jax.errors import Emu3Error
from emu3_jax.progress import Progress

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
    check_workers(workers)
    count = -(-len(entries) // SHARD_ENTRIES) if shards is None else shards
    if not 1 <= count <= len(entries):
        raise Emu3Error(f"shards is {count}: it must be 1 to {len(entries)}, the number of entries")
    job = _job(entries.digest, codebook, count)
    output = storage.place(output)
    storage.storage_place(output)  # refuses a path that ArrayRecord cannot open, before any work
    with shard_directory.held(output, host, hosts):
        directory = ShardDirectory(output, job, count, facts=Facts(len(entries), codebook))
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


def _job(digest: str, codebook: Codebook, shards: int) -> str:
    parts = {"format": FORMAT, "entries": digest, "codebook": dataclasses.asdict(codebook), "shards": shards}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _check(entries: Entries, directory: "ShardDirectory", done: Iterable[Shard], indices: Iterable[int]) -> None:
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

"""Open shards: each is opened, and copied from a bucket, when a record of it is read for the first time."""

import bisect
import collections
import itertools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import storage_path

try:
    from array_record.python.array_record_data_source import ArrayRecordDataSource
except ImportError as missing:
    raise Emu3Error("token data needs ArrayRecord, which is not installed: pip install 'emu3-jax[train]'") from missing

_OPEN = 128  # shards of a source that stay open; systems often allow a process 1,024 files


class Range(NamedTuple):
    """All records of a file. With these fields, `ArrayRecordDataSource` need not open the file to count records."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def open_shard(file: Path, records: int) -> ArrayRecordDataSource:
    """Opens a local file of so many records."""
    return ArrayRecordDataSource([Range(str(storage_path(file)), 0, records, records)])


class Readers:
    """The records of several shards as bytes, by one number for all shards. Threads may read at the same time.

    Attributes:
        opened: numbers of the shards that were opened so far.
    """

    def __init__(self, files: Sequence[Path], counts: Sequence[int], fetch: Callable[[str], Any] | None = None):
        """Opens nothing.

        Args:
            files: the files, local.
            counts: number of records in each file; none is 0.
            fetch: makes the file of this name there, if it is not.
        """
        self._files, self._counts, self._fetch = list(files), list(counts), fetch
        self._ends = list(itertools.accumulate(counts))
        self._open: collections.OrderedDict[int, ArrayRecordDataSource] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._opening = [threading.Lock() for _ in files]
        self.opened: set[int] = set()

    def shard_of(self, record: int) -> int:
        """The number of the shard that holds a record."""
        return bisect.bisect_right(self._ends, record)

    def __getitem__(self, record: int) -> bytes:
        shard = self.shard_of(record)
        return self._reader(shard)[record - self._ends[shard] + self._counts[shard]]

    def _reader(self, shard: int) -> ArrayRecordDataSource:
        with self._opening[shard]:  # a second thread waits for the first one's copy
            with self._lock:
                reader = self._open.get(shard)
                if reader is not None:
                    self._open.move_to_end(shard)
                    return reader
            file = self._files[shard]
            if self._fetch is not None:
                self._fetch(file.name)
            reader = open_shard(file, self._counts[shard])
            with self._lock:
                self._open[shard] = reader
                self.opened.add(shard)
                if len(self._open) > _OPEN:
                    self._open.popitem(last=False)  # it is closed when the last thread has read from it
            return reader

"""Divides entries into training and validation entries. The division depends only on the contents of each entry."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from emu3_jax.data.prepare import Entries, check_workers
from emu3_jax.data.records import Record
from emu3_jax.errors import Emu3Error
from emu3_jax.fields import is_number
from emu3_jax.progress import Progress

DIRECTORY = "validation"  # inside the data
_BATCH = 1024  # entries that are hashed between two updates of the progress bar


class Identified(Entries, Protocol):
    """Entries with a hash of their contents."""

    def identity(self, index: int) -> bytes:
        """A hash, equal for entries that must stay together. Raises an `Emu3Error` if the entry cannot be read."""


class Part:
    """A subset of entries, in the same order."""

    def __init__(self, entries: Entries, indices: np.ndarray, name: str):
        """Selects entries.

        Args:
            entries: all entries.
            indices: the entries of this part, int [N].
            name: different for each part of the same entries; part of `digest`.
        """
        self._entries, self._indices = entries, indices
        self.digest = hashlib.sha256(f"{entries.digest} {name}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        """Makes record `index` of this part."""
        return self._entries[int(self._indices[index])]

    def check(self, index: int) -> None:
        """See `Entries.check`."""
        self._entries.check(int(self._indices[index]))


def divide(entries: Identified, share: float, *, workers: int = 4, progress: bool | None = None) -> tuple[Part, Part]:
    """Divides entries into training and validation.

    The division depends only on the contents of each entry and on the share. A larger share keeps all validation
    entries of a smaller share. Unreadable entries go to training, where preparation reports them.

    Args:
        entries: all entries.
        share: share of validation entries, between 0 and 1.
        workers: number of threads that read.
        progress: as for `prepare`.

    Returns:
        Training entries, validation entries.

    Raises:
        Emu3Error: the share is not legal, or a part would be empty.
    """
    if not (is_number(share) and 0 < share < 1):
        raise Emu3Error(f"validation is {share}: it must be a share between 0 and 1, for example 0.05")
    check_workers(workers)
    chosen = np.zeros(len(entries), bool)

    def choose(index: int) -> None:
        try:
            # Hash again with a prefix. Other programs may have divided the same data by the plain hash.
            number = hashlib.sha256(b"emu3-jax validation" + entries.identity(index)).digest()[:8]
        except Emu3Error:
            return
        chosen[index] = int.from_bytes(number, "big") < share * 2**64

    with ThreadPoolExecutor(workers) as pool, Progress(progress, len(chosen), "records", name="dividing") as bar:
        for start in range(0, len(chosen), _BATCH):
            indices = range(start, min(start + _BATCH, len(chosen)))
            list(pool.map(choose, indices))
            bar.update(len(indices))
    if chosen.all() or not chosen.any():
        name, other = ("validation", "larger") if not chosen.any() else ("training", "smaller")
        raise Emu3Error(
            f"validation is {share}: none of {len(chosen)} records would be for {name}; choose a {other} share, or add "
            "records"
        )
    return (
        Part(entries, np.flatnonzero(~chosen), f"training {share}"),
        Part(entries, np.flatnonzero(chosen), f"validation {share}"),
    )

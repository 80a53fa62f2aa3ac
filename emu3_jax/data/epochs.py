"""Epochs of a source: the order of its records in each epoch, and the records whose prompts are dropped.

All results depend only on a key (the seed and the number of the source) and on the epoch. So a run resumes with the
same batches on any machine. Changing a result would change the batches of runs in progress; `tests/test_epochs.py`
checks the exact results.
"""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np

_T = TypeVar("_T")


class PerEpoch(Generic[_T]):
    """A function of the epoch that keeps its values for the last two epochs.

    Two epochs suffice, because concurrent readers are never more than one epoch apart. Several threads may compute the
    same value; the results are equal.
    """

    def __init__(self, make: Callable[[int], _T]):
        self._make = make
        self._kept: dict[int, _T] = {}

    def __call__(self, epoch: int) -> _T:
        kept = self._kept
        if epoch not in kept:
            recent = {number: value for number, value in kept.items() if number >= epoch - 1}
            self._kept = kept = recent | {epoch: self._make(epoch)}
        return kept[epoch]


class Epochs:
    """The endless shuffled stream of a source's records. Each epoch holds every record once, in a new order.

    Attributes:
        order: maps the number of an epoch to its order of records, int [records].
    """

    def __init__(self, records: int, key: Sequence[int], *, suffix: Sequence[int] = ()):
        """Prepares the orders.

        Args:
            records: number of records of the source.
            key: numbers before the epoch in the seed of its order.
            suffix: numbers after the epoch in the seed of its order.
        """
        self._records = records
        self.order: PerEpoch[np.ndarray] = PerEpoch(
            lambda epoch: np.random.default_rng([*key, epoch, *suffix]).permutation(records)
        )

    def at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Looks up places of the endless stream.

        Args:
            places: int [N], from 0.

        Returns:
            The epoch and the record at each place, both int [N].
        """
        epochs, within = np.divmod(places, self._records)
        records = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            records[here] = self.order(epoch)[within[here]]
        return epochs, records


# These two functions use different random numbers for the same purpose. Do not unify them: runs in progress use both.


def drops_prompt(key: Sequence[int], epoch: int, record: int, share: float) -> bool:
    """Whether a record's prompt is dropped in an epoch, with probability `share`. Independent of other records."""
    if not share:
        return False
    state = np.random.SeedSequence([*key, epoch, record]).generate_state(1, np.uint64)
    return bool(state[0] < share * 2.0**64)


def drops_prompts(key: Sequence[int], epoch: int, records: int, share: float) -> np.ndarray:
    """Whether each record's prompt is dropped in an epoch: bool [records]. Used by tables; faster than single calls."""
    return np.random.default_rng([*key, epoch, 1]).random(records) < share

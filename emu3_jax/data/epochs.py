"""Epochs of a source: the order of its records in each, and the records whose prompts are dropped.

Everything here is a function of a key (the seed and the number of the source) and the epoch, so a run resumes with the
same batches on any machine. A change here would change the batches of runs in progress: `tests/test_epochs.py` pins
what it gives.
"""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np

_T = TypeVar("_T")


class Recent(Generic[_T]):
    """A value for each epoch, made on demand; the values of the last two epochs are kept.

    Threads may make a value twice, with the same result. Readers are never more than an epoch apart.
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
    """The endless stream of a source's records: each epoch holds every record once, in an order of its own.

    Attributes:
        order: from the number of an epoch to its order, int [records].
    """

    def __init__(self, records: int, key: Sequence[int], *, suffix: Sequence[int] = ()):
        """`key` and `suffix` stand before and after the epoch in the seed of its order."""
        self._records = records
        self.order: Recent[np.ndarray] = Recent(
            lambda epoch: np.random.default_rng([*key, epoch, *suffix]).permutation(records)
        )

    def at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The epochs of these places of the stream, and the records there; both like `places`, int [N]."""
        epochs, within = np.divmod(places, self._records)
        records = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            records[here] = self.order(epoch)[within[here]]
        return epochs, records


# Two functions for one decision: they disagree, and must go on to, since runs in progress depend on both.


def drops_prompt(key: Sequence[int], epoch: int, record: int, share: float) -> bool:
    """Whether a record's prompt is dropped in an epoch. No other record is asked, so any order of reading will do."""
    if not share:
        return False
    state = np.random.SeedSequence([*key, epoch, record]).generate_state(1, np.uint64)
    return bool(state[0] < share * 2.0**64)


def drops_prompts(key: Sequence[int], epoch: int, records: int, share: float) -> np.ndarray:
    """Whose prompts are dropped in an epoch, bool [records]: all at once, for tables, where a call a record is slow."""
    return np.random.default_rng([*key, epoch, 1]).random(records) < share

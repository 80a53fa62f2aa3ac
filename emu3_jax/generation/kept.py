"""The cache that a conversation keeps between its turns, so that a turn computes only what is new.

R computed rows; S tokens of the longest new part, padded.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from emu3_jax.generation.shapes import bucket, roomy_slots
from emu3_jax.models.cache import KVCache


@dataclasses.dataclass(frozen=True)
class Tail:
    """What a kept cache lacks of the prompts of R rows.

    Attributes:
        cache: the cache. Its `length` says what each row keeps.
        start: int32 [R], first slot of each row.
        tokens: int32 [R, S], the missing ids of each row, aligned to the left.
        counts: int32 [R], number of missing ids of each row, at least 1.
        width: number of slots of the first turn's prompts.
        end: a slot after the prompts of all rows, padding included.
    """

    cache: KVCache
    start: np.ndarray
    tokens: np.ndarray
    counts: np.ndarray
    width: int
    end: int

    @property
    def lockstep(self) -> bool:
        """Whether all rows have the same length after their missing ids."""
        length = np.asarray(self.cache.length) + self.counts
        return bool((length == length[0]).all())

    def roomy(self, slots: int) -> KVCache:
        """The cache, with at least `slots` slots and room for `tokens`."""
        slots = max(slots, roomy_slots(self.end))
        return self.cache.grow(slots) if slots > self.cache.slots else self.cache


class Kept:
    """The cache of a batch of rows, and the ids that it holds. It is empty at first."""

    def __init__(self) -> None:
        self._cache: KVCache | None = None
        self._start = np.zeros(0, np.int32)
        self._width = 0
        self._ids: list[np.ndarray] = []

    def put(self, cache: KVCache, start: np.ndarray, width: int, ids: Sequence[Sequence[int]]) -> None:
        """Keeps a cache.

        Args:
            cache: the cache.
            start: int32 [R], first slot of each row.
            width: number of slots of the first turn's prompts.
            ids: the ids of each computed row. Those that are not in the cache yet may be at their end.
        """
        self._cache, self._start, self._width = cache, start, width
        self._ids = [np.asarray(row, np.int64) for row in ids]

    def take(self, prompts: Sequence[Sequence[int]], pad: int) -> Tail | None:
        """Gives the cache away, because the programs overwrite it. Afterwards this object is empty.

        A row keeps the ids that its prompt begins with, but computes at least the last one: the first step needs its
        logits. Keys and values of other ids are overwritten.

        Args:
            prompts: the whole prompt of each computed row.
            pad: id of the padding.

        Returns:
            What the cache lacks of the prompts, or None if there is no cache for this number of rows.
        """
        cache, held, self._cache = self._cache, self._ids, None
        if cache is None or len(held) != len(prompts):
            return None
        start, length = self._start, np.asarray(cache.length)
        keep = np.zeros(len(prompts), np.int32)
        for row, (ids, prompt) in enumerate(zip(held, prompts, strict=True)):
            most = min(len(prompt) - 1, len(ids), int(length[row] - start[row]))
            same = ids[:most] == np.asarray(prompt[:most], np.int64)
            keep[row] = most if same.all() else int(np.argmin(same))
        counts = np.asarray([len(prompt) for prompt in prompts], np.int32) - keep
        tokens = np.full((len(prompts), bucket(int(counts.max()))), pad, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : counts[row]] = prompt[keep[row] :]
        length = (start + keep).astype(np.int32)
        end = int(length.max()) + tokens.shape[1]
        cache = cache.replace(length=length, lockstep=bool((length == length[0]).all()))
        return Tail(cache, start, tokens, counts, self._width, end)

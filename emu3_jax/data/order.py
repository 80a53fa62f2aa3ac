"""The order of training records over any number of processes: which record every row of every batch reads.

Row r of all batches is lane r. A lane has its own endless stream of sequences. What is in a lane depends on the seed,
the lane's number and the number of lanes (rows in a batch), never on processes: a process computes the lanes of its own
rows, and a run goes on with other processes from the positions of all lanes.

- `Mixture` chooses the source of each sequence of a lane.
- A source's records have an endless order, epoch after epoch. Sequence n that lane r takes from the source is the
  record at place n * lanes + r of that order.
- `BlockOrder` is the order of a source with many shards. Neighbouring lanes read the same few shards in it.

All results are pure functions. Changing a result would change the batches of runs in progress; `tests/test_order.py`
checks exact results.
"""

import functools
from collections.abc import Sequence

import numpy as np

from emu3_jax.data.epochs import PerEpoch

_ONE = 1 << 32  # shares and phases are whole numbers of 2**-32, so that all machines choose alike
_SHARDS, _RECORDS = 3, 4  # parts of the seeds; 1 and 2 belong to `epochs` and `tables`


class Mixture:
    """Chooses the source of each sequence of each lane, according to the weights.

    Of the first n sequences of any lane, a source has its share of n, to less than one for two sources. Lanes begin at
    different phases of the pattern, so that each batch, and each process' part of it, is mixed too.
    """

    def __init__(self, weights: Sequence[float]):
        """`weights` are relative numbers of records, one for each source."""
        rest = np.cumsum(np.asarray(weights, np.float64)[::-1])[::-1]
        # The sources are split off one after the other: each takes a share of what the sources before it left.
        self._shares = [
            min(max(round(_ONE * float(weight / left)), 1), _ONE - 1)
            for weight, left in zip(weights[:-1], rest[:-1], strict=True)
        ]
        # Phases of low discrepancy in all splits together: multiples of powers of 1 / g with g**(d + 1) = g + 1.
        dimensions, root = len(self._shares), 2.0
        for _ in range(64):
            root = (1 + root) ** (1 / (dimensions + 1))
        self._steps = [round(_ONE * root**-power) for power in range(1, dimensions + 1)]

    def at(self, lane: int, number: int) -> tuple[int, int]:
        """Returns the source of sequence `number` of a lane, and how many earlier ones of the lane it has."""
        for source, (share, step) in enumerate(zip(self._shares, self._steps, strict=True)):
            phase = lane * step % _ONE
            before = (number * share + phase) // _ONE
            if ((number + 1) * share + phase) // _ONE > before:
                return source, before
            number -= before
        return len(self._shares), number


class BlockOrder:
    """The endless shuffled order of a source's records, in which a lane reads few shards at a time.

    In each epoch the shards are put into a new order, which is cut into blocks of about `block` shards. The records of
    a block are shuffled. All blocks, one after the other, are the epoch's line of records. Each lane gets its own
    stretch of the line. So a process whose rows are neighbours reads a stretch of neighbouring shards, and a batch
    still has records of as many places as it has rows.
    """

    def __init__(self, counts: Sequence[int], key: Sequence[int], lanes: int, block: int, keep: int):
        """Prepares the order.

        Args:
            counts: number of records in each shard; none is 0.
            key: numbers before the epoch in the seeds.
            lanes: number of lanes.
            block: most shards whose records are shuffled together.
            keep: number of shuffled blocks to keep in memory: at least one for each lane that is read.
        """
        self._counts = np.asarray(counts, np.int64)
        self._firsts = np.cumsum(self._counts) - self._counts
        self._records, self._key, self._lanes = int(self._counts.sum()), tuple(key), lanes
        blocks = -(-len(counts) // block)
        self._bounds = np.arange(blocks + 1) * len(counts) // blocks
        self._epoch: PerEpoch[tuple[np.ndarray, np.ndarray]] = PerEpoch(self._shuffled_shards)
        self._block = functools.lru_cache(keep)(self._shuffled_block)

    def at(self, place: int) -> tuple[int, int]:
        """Returns the epoch and the record at a place of the endless order."""
        epoch, within = divmod(place, self._records)
        line = self._line(epoch, place % self._lanes, within)
        _, ends = self._epoch(epoch)
        block = int(np.searchsorted(ends, line, side="right"))
        first = int(ends[block - 1]) if block else 0
        return epoch, int(self._block(epoch, block)[line - first])

    def _line(self, epoch: int, lane: int, within: int) -> int:
        """The place in an epoch's line of the lane's record that is at place `within` of the epoch.

        The lane gets one record of the epoch or one more than others, as its places are `lanes` apart.
        """
        each, more = divmod(self._records, self._lanes)
        start = epoch * self._records % self._lanes  # the lane of the epoch's first place
        # The lanes start, start + 1, ..., start + more - 1 (around the end) have one record more.
        until_end = min(max(lane - start, 0), more)
        around = min(lane, max(start + more - self._lanes, 0))
        return lane * each + until_end + around + within // self._lanes

    def _shuffled_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """An epoch's order of shards, and the number of records up to the end of each block."""
        shards = np.random.default_rng([*self._key, epoch, _SHARDS]).permutation(len(self._counts))
        ends = np.cumsum(self._counts[shards])[self._bounds[1:] - 1]
        return shards, ends

    def _shuffled_block(self, epoch: int, block: int) -> np.ndarray:
        """The records of a block in their shuffled order."""
        shards, _ = self._epoch(epoch)
        mine = shards[self._bounds[block] : self._bounds[block + 1]]
        records = np.concatenate([np.arange(self._counts[shard]) + self._firsts[shard] for shard in mine])
        return np.random.default_rng([*self._key, epoch, _RECORDS, block]).permutation(records)

"""Batches of lanes: each row of a batch continues its own stream, see `data.order`. Grain's iterators do the rest."""

import concurrent.futures
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from emu3_jax.data.order import Mixture
from emu3_jax.data.rows import Batch, Built


class LaneSequences(grain.IterDataset[Built]):
    """The endless stream of a lane's sequences, before rows are made of them."""

    def __init__(self, lane: int, lanes: int, mixture: Mixture, streams: Sequence[Callable[[int], Built]]):
        """`streams` make the sequence at a place of each source's order."""
        super().__init__()
        self.lane, self.lanes, self.mixture, self.streams = lane, lanes, mixture, streams

    def __iter__(self) -> "_LaneIterator":
        return _LaneIterator(self)


class _LaneIterator(grain.DatasetIterator):
    def __init__(self, dataset: LaneSequences):
        super().__init__()
        self._dataset, self._number = dataset, 0

    def __next__(self) -> Built:
        data = self._dataset
        source, earlier = data.mixture.at(data.lane, self._number)
        self._number += 1
        return data.streams[source](earlier * data.lanes + data.lane)

    def get_state(self) -> dict[str, Any]:
        return {"number": self._number}

    def set_state(self, state: dict[str, Any]) -> None:
        self._number = state["number"]


class LaneBatches(grain.IterDataset[Batch]):
    """Batches of the lanes that this process reads.

    Its position has an entry for each of these lanes. `merged` puts the positions of all processes together, and
    `set_state` takes what it needs from that.
    """

    def __init__(self, lanes: Mapping[int, grain.IterDataset[Batch]], threads: int):
        """Prepares the data set.

        Args:
            lanes: for each lane, its rows as dicts of arrays [R, ...]; R is 1, or 2 for preference pairs.
            threads: number of threads that read lanes at the same time; 0 for none.
        """
        super().__init__()
        self.lanes, self.threads = dict(lanes), threads

    def __iter__(self) -> "_LaneBatchesIterator":
        return _LaneBatchesIterator(self)


class _LaneBatchesIterator(grain.DatasetIterator):
    def __init__(self, dataset: LaneBatches):
        super().__init__()
        self._lanes = {number: iter(lane) for number, lane in dataset.lanes.items()}
        self._pool = concurrent.futures.ThreadPoolExecutor(dataset.threads) if dataset.threads else None

    def __next__(self) -> Batch:
        lanes = self._lanes.values()
        rows: list[Batch] = list((self._pool.map if self._pool else map)(next, lanes))
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def get_state(self) -> dict[str, Any]:
        return {"lanes": {str(number): lane.get_state() for number, lane in self._lanes.items()}}

    def set_state(self, state: dict[str, Any]) -> None:
        for number, lane in self._lanes.items():
            lane.set_state(state["lanes"][str(number)])

    def close(self) -> None:
        super().close()
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
        for lane in self._lanes.values():
            lane.close()


def merged(positions: Sequence[Any]) -> Any:
    """One position of those that the processes of a run saved at the same step: all lanes, or what they all say."""
    first = positions[0]
    if not isinstance(first, Mapping) or "lanes" not in first:
        return first
    return {"lanes": {number: state for position in positions for number, state in position["lanes"].items()}}

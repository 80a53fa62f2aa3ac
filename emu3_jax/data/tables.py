"""Tables: small data sets as arrays of finished rows, so that a few NumPy operations make a batch of any size.

A pipeline that handles records one by one holds the interpreter lock for tens of milliseconds per batch. That would
block the training loop of a small model. Shapes: L tokens in a row, B rows in a batch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from emu3_jax.data.epochs import Epochs, PerEpoch, drops_prompts
from emu3_jax.data.sequences import TokenSequence, padded_row

Batch = dict[str, np.ndarray]


class Table:
    """The rows of one source. Each row is built when a batch needs it for the first time."""

    def __init__(
        self,
        build: Callable[[int, bool], TokenSequence],
        records: int,
        *,
        dropout: float,
        key: Sequence[int],
        length: int,
        pad: int,
        loss_on_padding: bool,
        parts: int = 1,
    ):
        """Allocates all rows.

        Args:
            build: builds the sequence of a record, which must have at most `length` tokens. Its second argument says
                whether to drop the prompt.
            records: number of records of the source.
            dropout: share of prompts to drop.
            key: seed of the order of records and of prompt dropout.
            length: tokens in a row of this table.
            pad: id that fills a row.
            loss_on_padding: see `sequences.padded_row`.
            parts: number of this table's rows in a row of a batch.
        """
        self.parts, self.pad, self.loss_on_padding = parts, pad, loss_on_padding
        self._build, self._records = build, records
        self._epochs = Epochs(records, key)
        self._dropped: PerEpoch[np.ndarray] = PerEpoch(lambda epoch: drops_prompts(key, epoch, records, dropout))
        rows = records * (2 if dropout else 1)  # the second half holds the rows without prompts
        # np.zeros uses no memory for pages that are never written, so unbuilt rows are free.
        self.tokens, self.loss_mask = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
        self.sizes = np.zeros(rows, np.int32)  # 0 marks a row that is not built yet

    def rows(self, places: np.ndarray) -> np.ndarray:
        """Returns the rows at these places of the endless shuffled stream, int [N]. Builds rows that are missing."""
        epochs, records = self._epochs.at(places)
        rows = records.copy()
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            rows[here] += self._records * self._dropped(epoch)[records[here]]
        for row in np.unique(rows[self.sizes[rows] == 0]).tolist():
            drop, record = divmod(row, self._records)
            sequence = self._build(record, bool(drop))
            length = self.tokens.shape[1]
            padded = padded_row(sequence, length, self.pad, loss_on_padding=self.loss_on_padding)
            self.tokens[row], self.loss_mask[row] = padded["tokens"], padded["loss_mask"]
            self.sizes[row] = len(sequence)
        return rows


class TableBatches(grain.IterDataset):
    """Endless batches of rows from several tables. Each row comes from a random table, according to the weights.

    Every process computes the same global batch and keeps its own rows. Batch n depends only on the seed and n.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        weights: Sequence[float],
        *,
        batch_size: int,
        length: int,
        seed: int,
        rows: Sequence[int],
    ):
        """Prepares the data set.

        Args:
            tables: the tables.
            weights: relative number of records to read from each table.
            batch_size: rows of all processes in a batch.
            length: tokens in a row of a batch.
            seed: seed of the choice of tables.
            rows: numbers of this process' rows in a batch.
        """
        super().__init__()
        self.tables, self.batch_size, self.length = list(tables), batch_size, length
        self.seed, self.mine = seed, np.asarray(rows)
        self.parts = np.asarray([table.parts for table in tables])
        shares = np.asarray(weights, np.float64) / self.parts
        self.shares = shares / shares.sum()

    def __iter__(self) -> "_TableIterator":
        return _TableIterator(self)


class _TableIterator(grain.DatasetIterator):
    def __init__(self, dataset: TableBatches):
        super().__init__()
        self._dataset = dataset
        self._number = 0
        self._before: np.ndarray  # number of records of each table in all earlier batches
        self.set_state({"batch": 0})

    def __next__(self) -> Batch:
        data = self._dataset
        sources, counts = self._sources(self._number)
        # Position of each row's first record in the stream of its table.
        places = np.empty_like(sources)
        for number, (parts, count) in enumerate(zip(data.parts.tolist(), counts.tolist(), strict=True)):
            places[sources == number] = self._before[number] + parts * np.arange(count)
        sources, places = sources[data.mine], places[data.mine]
        shape = (len(sources), data.length)
        tokens = np.full(shape, data.tables[0].pad, np.int32)
        segment_ids, positions, loss_mask = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
        for number in np.unique(sources).tolist():
            here, table = sources == number, data.tables[number]
            parts, length = table.parts, table.tokens.shape[1]
            slots, ids = np.arange(length, dtype=np.int32), np.arange(1, parts + 1, dtype=np.int32)
            rows = table.rows((places[here, None] + np.arange(parts)).ravel())
            filled = (slots < table.sizes[rows, None]).reshape(-1, parts, length)
            # As in `padded_row`.
            padding = -1 if table.loss_on_padding else 0
            for batch, of_table in (
                (tokens, table.tokens[rows]),
                (loss_mask, table.loss_mask[rows]),
                (segment_ids, np.where(filled, ids[:, None], padding)),
                (positions, (filled | table.loss_on_padding) * slots),
            ):
                batch[here, : parts * length] = of_table.reshape(-1, parts * length)
        self._number += 1
        self._before = self._before + counts * data.parts
        return {"tokens": tokens, "segment_ids": segment_ids, "positions": positions, "loss_mask": loss_mask}

    def _sources(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Chooses the table of every row in a global batch. Also returns the number of rows of each table."""
        data = self._dataset
        rng = np.random.default_rng([data.seed, number, 2])
        sources = rng.choice(len(data.tables), data.batch_size, p=data.shares)
        return sources, np.bincount(sources, minlength=len(data.tables))

    def get_state(self) -> dict[str, Any]:
        return {"batch": self._number, "too_long": 0}

    def set_state(self, state: dict[str, Any]) -> None:
        self._number = state["batch"]
        counts = (self._sources(number)[1] for number in range(self._number))
        self._before = sum(counts, start=np.zeros(len(self._dataset.tables), np.int64)) * self._dataset.parts

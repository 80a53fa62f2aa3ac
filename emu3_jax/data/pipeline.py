"""Batches for training and evaluation: Grain pipelines over prepared data.

Row r of all batches is lane r, an endless stream of its own that does not depend on processes: `data.order` says which
record it reads when. Every process makes the rows of its own lanes. Packing puts several sequences of a lane into a
row, first-fit; attention and RoPE treat them as separate segments. A position holds the places of all lanes, so a run
goes on with any number of processes. Version 0.1.0 had another order, see `ORDERS`. Runs that began with it go on with
it.

Threads of the training process make the batches. A row of 10,240 tokens takes about 2.5 ms, so worker processes are not
needed. A batch is a dict of arrays [B, S]:

    tokens       int32   ids; padding is the pad token
    segment_ids  int32   1, 2, ... within a row; 0 on padding. Tokens attend only to tokens with the same id
    positions    int32   from 0 in each segment
    loss_mask    bool    token i is a target, predicted at i - 1. Never the first token of a segment, never padding

With `loss_on_padding`, padding is a target. Its segment id is -1, so it attends to the row, and it goes on counting
positions.

A batch of preference pairs has the chosen side of a pair in row 2i and the rejected one in row 2i + 1. It has one array
more, [B]:

    pair         int32   number of the pair, counted over all sources in their order; -1 in an empty row
"""

import dataclasses
import functools
import hashlib
import itertools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.lanes import merged
from emu3_jax.data.pairs import PreparedPairs
from emu3_jax.data.rows import Batch, Built, FittingDataset, count_too_long, padded_rows, pair_rows
from emu3_jax.data.sequences import PairSequence, TokenSequence
from emu3_jax.data.shards import PreparedData
from emu3_jax.data.streams import READING, Builder, fitting_sequence, lane_rows, share_rows
from emu3_jax.data.tables import Table, TableBatches
from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import reading
from emu3_jax.storage import place
from emu3_jax.text.prompts import PromptTemplates
from emu3_jax.text.tokenizer import Tokenizer

try:
    import grain
except ImportError as missing:
    raise Emu3Error("training needs Grain, which is not installed: pip install 'emu3-jax[train]'") from missing

ORDERS = (1, 2)  # of records. 1 was that of version 0.1.0 and depends on the number of processes
_BATCHES_AHEAD = 2
_MAX_FILLED = 2**28  # tokens of all rows that a process fills at the same time: 3.5 GB, twice while new ones begin
_MAX_TOKENS = 2**25  # tokens in a process's batch: 440 MB, and several batches are in memory at once


class Batches:
    """An iterator over batches whose position can be saved and restored.

    After `set_state`, an iterator of an equal pipeline yields the same batches bit for bit from that position on.

    Attributes:
        sources: path and number of records of each source.
    """

    def __init__(
        self,
        dataset: "grain.IterDataset[Batch]",
        identity: Sequence[Any],
        sources: Sequence[tuple[str, int]],
        order: int = 1,
    ):
        """Starts the iterator.

        Args:
            dataset: Grain's data set of batches.
            identity: all values that determine the batches. `set_state` accepts only states with equal values.
            sources: path and number of records of each source.
            order: one of `ORDERS`.
        """
        self.sources, self._order = tuple(sources), order
        self._pipeline = hashlib.sha256(repr(identity).encode()).hexdigest()
        ahead = grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=_BATCHES_AHEAD)
        # Close Grain's iterator before the interpreter shuts down. Grain 0.2 prints errors otherwise.
        self._iterator = [iter(ahead)]
        self.close = weakref.finalize(self, _close, self._iterator)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        return next(self._iterator[0])

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the last batch, as JSON values: of the rows of this process."""
        order = {} if self._order == 1 else {"order": self._order}  # versions with one order did not name it
        return {**order, "pipeline": self._pipeline, "position": self._iterator[0].get_state()}

    def set_state(self, *states: Mapping[str, Any]) -> None:
        """Moves to a position from `get_state`.

        Args:
            states: what all processes of the run returned at the same step; they may be fewer or more than now. In
                order 1, only what this process returned.

        Raises:
            Emu3Error: the position belongs to other data, or to a pipeline with other settings.
        """
        if not all(isinstance(state, Mapping) and state.get("pipeline") == self._pipeline for state in states):
            raise Emu3Error(
                "the saved position belongs to other data: sources, batch size, sequence length, packing, "
                "shuffle_shards or seed differ"
                + (", or the number of processes" if self._order == 1 else "")
                + "; resume with the same data settings, or start a new run"
            )
        with reading("the saved position", "delete this checkpoint to resume from the previous one"):
            self._iterator[0].set_state(merged([state["position"] for state in states]))

    @property
    def skipped(self) -> int:
        """Number of records that this process left out so far because they were longer than a row."""
        return count_too_long(self._iterator[0].get_state())


def open_prepared(source: Source, tokenizer: Tokenizer, codebook_sha256: str | None) -> PreparedData | PreparedPairs:
    """Opens the prepared data of a source.

    Args:
        source: the source.
        tokenizer: the model's tokenizer.
        codebook_sha256: SHA-256 of the model's codebook, see `Codebook`. With None, only the number of codes is
            checked.

    Raises:
        Emu3Error: the data are missing, damaged, prepared with another codebook, or not what the task trains on.
    """
    data = (PreparedPairs if source.pairs else PreparedData)(place(source.path))
    data.require_codebook(tokenizer.special.visual_count, codebook_sha256)
    return data


def training_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    templates: PromptTemplates,
    batch_size: int,
    *,
    codebook_sha256: str | None = None,
    process_index: int = 0,
    process_count: int = 1,
    rows: Sequence[int] | None = None,
    order: int = ORDERS[-1],
) -> Batches:
    """Makes endless training batches of shuffled, mixed and packed sequences.

    Args:
        config: sources and settings.
        tokenizer: the model's tokenizer.
        templates: the model's prompt templates.
        batch_size: rows in a batch of this process; even for preference pairs.
        codebook_sha256: see `open_prepared`.
        process_index: `jax.process_index()`.
        process_count: `jax.process_count()`.
        rows: numbers of this process' rows in the batch of all processes, [batch_size]. By default every n-th row of
            n processes, or every n-th pair of rows.
        order: one of `ORDERS`. Only a run that began with an earlier one needs it; its rows are those by default.

    Raises:
        Emu3Error: a source is missing, damaged, or prepared with another codebook. During iteration: a shard is
            damaged, or a record is too long or does not suit the task.
    """
    _check_place(batch_size, config.sequence_length, process_index, process_count)
    _check_packing(batch_size, config.sequence_length, config.packing)
    process, total = (process_index, process_count), batch_size * process_count
    keep = config.in_memory and not config.whole_rows
    opened = [open_prepared(source, tokenizer, codebook_sha256) for source in config.sources]
    firsts = itertools.accumulate(map(len, opened), initial=0)
    builders = [
        Builder(source, tokenizer, templates, data, keep=keep, first=first)
        for source, data, first in zip(config.sources, opened, firsts, strict=False)
    ]
    # Leave out the sources' paths: data may move between two runs.
    sources = [(b.data.index.job, b.source.task, b.source.weight, b.source.parts) for b in builders]
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)} | {"sources": sources}
    pad, together = tokenizer.special.pad, 2 if config.pairs else 1
    if rows is None or order == 1:
        rows = [row for row in range(total) if row // together % process_count == process_index]
    lanes = [row // together for row in rows[::together]]
    if config.whole_rows:
        dataset = _table_rows(config, builders, pad, rows, total)
    elif order == 1:
        dataset = share_rows(config, builders, pad, batch_size, process)
    else:
        dataset = lane_rows(config, builders, pad, lanes, total // together)
    if order == 1:
        del settings["shuffle_shards"]  # these values must be those of version 0.1.0
        identity = [settings, templates, batch_size, process_index, process_count]
    else:
        identity = [settings, templates, total, order]
    return Batches(dataset, identity, [(builder.source.path, len(builder.data)) for builder in builders], order)


def began_in_order(states: Sequence[Any]) -> int:
    """The order of a run whose processes saved these positions, one of `ORDERS`."""
    first = states[0]
    return ORDERS[-1] if isinstance(first, Mapping) and first.get("order") == ORDERS[-1] else 1


def _table_rows(
    config: DataConfig, builders: Sequence[Builder], pad: int, rows: Sequence[int], total: int
) -> "grain.IterDataset[Batch]":
    """Batches of rows that stay in memory, see `data.tables`: these rows of a batch of `total`."""
    tables = []
    for number, builder in enumerate(builders):
        parts = builder.source.parts
        length = config.sequence_length // parts
        room = "a row" if parts == 1 else f"each of the {parts} parts of a row"
        tables.append(
            Table(
                functools.partial(fitting_sequence, builder, length, room),
                len(builder.data),
                dropout=builder.source.task.prompt_dropout,
                key=(config.seed, number),
                length=length,
                pad=pad,
                loss_on_padding=config.loss_on_padding,
                parts=parts,
            )
        )
    return TableBatches(
        tables,
        [builder.source.weight for builder in builders],
        batch_size=total,
        length=config.sequence_length,
        seed=config.seed,
        rows=rows,
    )


def evaluation_batches(
    source: Source,
    tokenizer: Tokenizer,
    templates: PromptTemplates,
    batch_size: int,
    sequence_length: int,
    *,
    too_long: str = "stop",
    codebook_sha256: str | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Makes the batches of one pass over a source in order. Each row holds one record, and no prompt is dropped.

    Every process reads a stretch of the records, and gets the same number of batches. A row is empty (segment ids 0, no
    targets) if the records do not fill the last batches, or if its record is too long and `too_long` is "skip".

    Args:
        source: the source.
        tokenizer: see `training_batches`.
        templates: see `training_batches`.
        batch_size: see `training_batches`.
        sequence_length: tokens in a row.
        too_long: what to do with a record that is longer than a row: "stop" raises an error, "skip" leaves it out.
        codebook_sha256: see `open_prepared`.
        process_index: see `training_batches`.
        process_count: see `training_batches`.

    Raises:
        Emu3Error: as `training_batches`.
    """
    _check_place(batch_size, sequence_length, process_index, process_count)
    data = open_prepared(source, tokenizer, codebook_sha256)
    builder = Builder(source, tokenizer, templates, data)
    nothing = TokenSequence(np.zeros(0, np.int32), np.zeros(0, bool))
    empty = Built("", PairSequence(nothing, nothing) if source.pairs else nothing)

    def sequence(index: int) -> Built:
        return builder.build(index, drop_prompt=False) if index < len(data) else empty

    items = batch_size // 2 if source.pairs else batch_size  # of a process' batch
    each = -(-len(data) // (items * process_count)) * items
    # Neighbouring records of each process, so that it opens its own shards only.
    first = process_index * each
    mine = grain.MapDataset.range(first, first + each).map(sequence).to_iter_dataset(READING)
    fitting = FittingDataset(mine, sequence_length, too_long, instead=empty)
    pad = tokenizer.special.pad
    if source.pairs:
        rows = pair_rows(fitting, batch_size, sequence_length, pad)
    else:
        rows = padded_rows(fitting, sequence_length, pad).batch(batch_size, drop_remainder=True)
    identity = [data.index.job, source.task, templates, batch_size, sequence_length, process_index, process_count]
    return Batches(rows, identity, [(source.path, len(data))])


def _check_place(batch_size: int, length: int, process_index: int, process_count: int) -> None:
    if batch_size < 1:
        raise Emu3Error(f"batch_size is {batch_size}: each process needs at least one row")
    if batch_size * length > _MAX_TOKENS:
        raise Emu3Error(
            f"batch_size is {batch_size} rows of {length} tokens for each process; the limit is {_MAX_TOKENS} tokens: "
            "lower batch_size or sequence_length"
        )
    if not 0 <= process_index < process_count:
        raise Emu3Error(f"process_index is {process_index} of {process_count}: it must be 0 to process_count - 1")


def _check_packing(batch_size: int, length: int, packing: int) -> None:
    if batch_size * length * packing > _MAX_FILLED:
        raise Emu3Error(
            f"data field packing is {packing}: for each of the {batch_size} rows of a process, so many rows of "
            f"{length} tokens are filled at the same time; the limit is {_MAX_FILLED} tokens: lower packing, "
            "batch_size or sequence_length"
        )


def _close(iterator: list[grain.DatasetIterator]) -> None:
    iterator.pop().close()

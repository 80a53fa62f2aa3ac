"""Batches for training and evaluation: Grain pipelines over prepared data.

Every process builds the same pipeline, and reads its own share of each source. Process p of n takes records p, p + n,
p + 2n, ... of the source's endless shuffled stream. So all shares have the same length, no record is left out, and the
stream does not depend on the number of processes. Each process then mixes its shares according to the weights. Packing
puts several sequences into a row, first-fit; attention and RoPE treat them as separate segments.

Threads of the training process make the batches. A row of 10,240 tokens takes about 2.5 ms, so worker processes are not
needed. A batch is a dict of arrays [B, S]:

    tokens       int32   ids; padding is the pad token
    segment_ids  int32   1, 2, ... within a row; 0 on padding. Tokens attend only to tokens with the same id
    positions    int32   from 0 in each segment
    loss_mask    bool    token i is a target, predicted at i - 1. Never the first token of a segment, never padding

A batch of preference pairs has the chosen side of a pair in row 2i and the rejected one in row 2i + 1. It has one array
more, [B]:

    pair         int32   number of the pair, counted over all sources in their order; -1 in an empty row
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.epochs import Epochs, drops_prompt
from emu3_jax.data.pairs import PreparedPairs
from emu3_jax.data.rows import Batch, Built, FittingDataset, count_too_long, fits, packed_rows, padded_rows, pair_rows
from emu3_jax.data.sequences import PairSequence, TokenSequence
from emu3_jax.data.shards import PreparedData
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

_READING = grain.ReadOptions(num_threads=4, prefetch_buffer_size=64)
_BATCHES_AHEAD = 2
_MAX_TOKENS = 2**25  # tokens in a process's batch: 440 MB, and several batches are in memory at once


class Batches:
    """An iterator over batches whose position can be saved and restored.

    After `set_state`, an iterator of an equal pipeline yields the same batches bit for bit from that position on.

    Attributes:
        sources: path and number of records of each source.
    """

    def __init__(
        self, dataset: "grain.IterDataset[Batch]", identity: Sequence[Any], sources: Sequence[tuple[str, int]]
    ):
        """Starts the iterator.

        Args:
            dataset: Grain's data set of batches.
            identity: all values that determine the batches. `set_state` accepts only states with equal values.
            sources: path and number of records of each source.
        """
        self.sources = tuple(sources)
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
        """Returns the position after the last batch, as JSON values."""
        return {"pipeline": self._pipeline, "position": self._iterator[0].get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Moves to a position from `get_state`.

        Raises:
            Emu3Error: the position belongs to other data, or to a pipeline with other settings.
        """
        if not isinstance(state, Mapping) or state.get("pipeline") != self._pipeline:
            raise Emu3Error(
                "the saved position belongs to other data: sources, batch size, sequence length, packing, seed or "
                "number of processes differ; resume with the same data settings, or start a new run"
            )
        with reading("the saved position", "delete this checkpoint to resume from the previous one"):
            self._iterator[0].set_state(state["position"])

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

    Raises:
        Emu3Error: a source is missing, damaged, or prepared with another codebook. During iteration: a shard is
            damaged, or a record is too long or does not suit the task.
    """
    _check_place(batch_size, config.sequence_length, process_index, process_count)
    process = (process_index, process_count)
    keep = config.in_memory and not config.whole_rows
    opened = [open_prepared(source, tokenizer, codebook_sha256) for source in config.sources]
    firsts = itertools.accumulate(map(len, opened), initial=0)
    builders = [
        _Builder(source, tokenizer, templates, data, keep=keep, first=first)
        for source, data, first in zip(config.sources, opened, firsts, strict=False)
    ]
    # Leave out the sources' paths: data may move between two runs.
    sources = [(b.data.index.job, b.source.task, b.source.weight, b.source.parts) for b in builders]
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)} | {"sources": sources}
    rows = _table_rows if config.whole_rows else _stream_rows
    dataset = rows(config, builders, tokenizer.special.pad, batch_size, process)
    identity = [settings, templates, batch_size, process_index, process_count]
    return Batches(dataset, identity, [(builder.source.path, len(builder.data)) for builder in builders])


def _table_rows(
    config: DataConfig, builders: Sequence["_Builder"], pad: int, batch_size: int, process: tuple[int, int]
) -> "grain.IterDataset[Batch]":
    """Batches of rows that stay in memory, see `data.tables`."""
    tables = []
    for number, builder in enumerate(builders):
        parts = builder.source.parts
        length = config.sequence_length // parts
        room = "a row" if parts == 1 else f"each of the {parts} parts of a row"
        tables.append(
            Table(
                functools.partial(_fitting_sequence, builder, length, room),
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
        batch_size=batch_size,
        length=config.sequence_length,
        seed=config.seed,
        process=process,
    )


def _stream_rows(
    config: DataConfig, builders: Sequence["_Builder"], pad: int, batch_size: int, process: tuple[int, int]
) -> "grain.IterDataset[Batch]":
    """Batches of rows that are built anew from the stream of sequences."""
    process_index, process_count = process
    weights = [builder.source.weight for builder in builders]
    streams, epoch = [], 0  # epoch: number of mixed sequences that contain about every record once
    for number, builder in enumerate(builders):
        records, key = len(builder.data), (config.seed, number)
        stream = _Stream(builder, key)
        numbers = grain.MapDataset.range(records)
        if config.in_memory:
            sequences = numbers.repeat().map_with_index(stream.shuffled)
        else:
            seed = int(np.random.SeedSequence(key).generate_state(1)[0])
            sequences = numbers.map_with_index(stream.unshuffled).shuffle(seed).repeat()
        streams.append(sequences[process_index::process_count])
        epoch = max(epoch, math.ceil(records * sum(weights) / builder.source.weight))
    mixture = grain.MapDataset.mix(streams, weights)
    # For data in memory, reader threads would only wait for each other.
    options = grain.ReadOptions(num_threads=0) if config.in_memory else _READING
    length = config.sequence_length
    fitting = FittingDataset(
        mixture.to_iter_dataset(options),
        length,
        config.too_long,
        patience=epoch,
        some_fit=lambda: any(builder.some_fit(length) for builder in builders),
    )
    if config.pairs:
        return pair_rows(fitting, batch_size, length, pad)
    if config.packing:
        rows = packed_rows(fitting, length, config.packing, pad)
    else:
        rows = padded_rows(fitting, length, pad, config.loss_on_padding)
    return rows.batch(batch_size, drop_remainder=True)


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

    Every process gets the same number of batches. A row is empty (segment ids 0, no targets) if the records do not fill
    the last batches, or if its record is too long and `too_long` is "skip".

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
    builder = _Builder(source, tokenizer, templates, data)
    nothing = TokenSequence(np.zeros(0, np.int32), np.zeros(0, bool))
    empty = Built("", PairSequence(nothing, nothing) if source.pairs else nothing)

    def sequence(index: int) -> Built:
        return builder.build(index, drop_prompt=False) if index < len(data) else empty

    items = batch_size // 2 if source.pairs else batch_size  # of a process' batch
    rounds = -(-len(data) // (items * process_count))
    sequences = grain.MapDataset.range(rounds * items * process_count).map(sequence)
    mine = sequences[process_index::process_count].to_iter_dataset(_READING)
    fitting = FittingDataset(mine, sequence_length, too_long, instead=empty)
    pad = tokenizer.special.pad
    if source.pairs:
        rows = pair_rows(fitting, batch_size, sequence_length, pad)
    else:
        rows = padded_rows(fitting, sequence_length, pad).batch(batch_size, drop_remainder=True)
    identity = [data.index.job, source.task, templates, batch_size, sequence_length, process_index, process_count]
    return Batches(rows, identity, [(source.path, len(data))])


class _Builder:
    """Builds the sequences of a source's records. With `keep`, built sequences stay in memory."""

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        templates: PromptTemplates,
        data: PreparedData | PreparedPairs,
        *,
        keep: bool = False,
        first: int = 0,
    ):
        """`first` is the number of the source's first pair."""
        self.source, self.data = source, data
        self._first = first
        self._tokenizer, self._templates = tokenizer, templates
        self._kept: dict[tuple[int, bool], Built] | None = {} if keep else None

    def build(self, record: int, drop_prompt: bool) -> Built:
        """Builds the sequence of a record, with its prompt or without."""
        if self._kept is None:
            return self._build(record, drop_prompt)
        key = (record, drop_prompt)
        if key not in self._kept:
            self._kept[key] = self._build(record, drop_prompt)
        return self._kept[key]

    def some_fit(self, length: int) -> bool:
        """Whether any record, with or without prompt as training may build it, has at most `length` tokens."""
        share = self.source.task.prompt_dropout
        kinds = [drop for drop, occurs in ((False, share < 1), (True, share > 0)) if occurs]
        sizes = (len(self._build(record, drop).sequence) for record in range(len(self.data)) for drop in kinds)
        return any(size <= length for size in sizes)

    def _build(self, index: int, drop_prompt: bool) -> Built:
        record: Any = self.data[index]
        task: Any = self.source.task
        name = f"{self.source.path}: {'pair' if self.source.pairs else 'record'} {record.name!r}"
        try:
            sequence = task.sequence(record, self._tokenizer, self._templates, drop_prompt)
        except Emu3Error as error:
            raise Emu3Error(f"{name}: {error}") from error
        if isinstance(sequence, PairSequence):  # its targets never begin a row
            return Built(name, sequence, self._first + index)
        mask = sequence.loss_mask.copy()
        mask[0] = False  # no earlier token can predict the first one
        return Built(name, TokenSequence(sequence.tokens, mask))


class _Stream:
    """The endless stream of a source's sequences over all epochs, for Grain's `map_with_index`."""

    def __init__(self, builder: _Builder, key: tuple[int, int]):
        self._builder, self._key = builder, key
        self._records = len(builder.data)
        self._epochs = Epochs(self._records, key)

    def unshuffled(self, index: int, _: int) -> Built:
        """The sequence at `index`, without shuffling. Grain shuffles afterwards."""
        epoch, record = divmod(index, self._records)
        return self._built(epoch, record)

    def shuffled(self, index: int, _: int) -> Built:
        """The sequence at `index`, with a new order in each epoch. Takes a tenth of the time of Grain's shuffle."""
        epoch, position = divmod(index, self._records)
        return self._built(epoch, int(self._epochs.order(epoch)[position]))

    def _built(self, epoch: int, record: int) -> Built:
        share = self._builder.source.task.prompt_dropout
        return self._builder.build(record, drops_prompt(self._key, epoch, record, share))


def _fitting_sequence(builder: _Builder, length: int, room: str, record: int, drop_prompt: bool) -> TokenSequence:
    built = builder.build(record, drop_prompt)
    fits(built, length, "stop", room)
    assert isinstance(built.sequence, TokenSequence)  # tables hold no pairs
    return built.sequence


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


def _close(iterator: list[grain.DatasetIterator]) -> None:
    iterator.pop().close()

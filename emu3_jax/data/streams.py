"""Streams of built sequences, and the rows that are made of them anew for each batch."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.epochs import Epochs, drops_prompt
from emu3_jax.data.lanes import LaneBatches, LaneSequences
from emu3_jax.data.order import BlockOrder, Mixture
from emu3_jax.data.pairs import PreparedPairs
from emu3_jax.data.rows import Batch, Built, FittingDataset, fits, packed_rows, padded_rows, pair_rows
from emu3_jax.data.sequences import PairSequence, TokenSequence
from emu3_jax.data.shards import PreparedData
from emu3_jax.errors import Emu3Error
from emu3_jax.text.prompts import PromptTemplates
from emu3_jax.text.tokenizer import Tokenizer

READING = grain.ReadOptions(num_threads=4, prefetch_buffer_size=64)


class Builder:
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


class Stream:
    """The endless stream of a source's sequences over all epochs."""

    def __init__(self, builder: Builder, key: tuple[int, int], order: Callable[[int], tuple[int, int]]):
        """`order` returns the epoch and the record at a place. `key` is the seed and the number of the source."""
        self._builder, self._key, self._order = builder, key, order

    def __call__(self, place: int) -> Built:
        """The sequence at a place, from 0."""
        epoch, record = self._order(place)
        share = self._builder.source.task.prompt_dropout
        return self._builder.build(record, drops_prompt(self._key, epoch, record, share))


def _whole_order(records: int, key: tuple[int, int], in_memory: bool) -> Callable[[int], tuple[int, int]]:
    """The order that shuffles all records of a source together: the epoch and the record at a place."""
    if in_memory:  # a tenth of the time of Grain's shuffle
        epochs = Epochs(records, key)

        def at(place: int) -> tuple[int, int]:
            epoch, within = divmod(place, records)
            return epoch, int(epochs.order(epoch)[within])

        return at
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    numbers = grain.MapDataset.range(records).map_with_index(lambda place, _: divmod(place, records))
    return numbers.shuffle(seed).repeat().__getitem__


def fitting_sequence(builder: Builder, length: int, room: str, record: int, drop_prompt: bool) -> TokenSequence:
    built = builder.build(record, drop_prompt)
    fits(built, length, "stop", room)
    assert isinstance(built.sequence, TokenSequence)  # tables hold no pairs
    return built.sequence


def lane_rows(
    config: DataConfig, builders: Sequence[Builder], pad: int, lanes: Sequence[int], count: int
) -> LaneBatches:
    """Batches of these lanes out of `count`, see `data.order`. A lane has a row of a batch, or a pair of rows."""
    streams = []
    for number, builder in enumerate(builders):
        records, key = len(builder.data), (config.seed, number)
        shards = builder.data.counts
        order: Callable[[int], tuple[int, int]]
        if len(shards) > config.shuffle_shards:
            keep = 2 * len(lanes) + 2  # lanes that read faster are in the next block already
            order = BlockOrder(shards, key, count, config.shuffle_shards, keep).at
        else:
            order = _whole_order(records, key, config.in_memory)
        streams.append(Stream(builder, key, order))
    mixture = Mixture([builder.source.weight for builder in builders])

    fit = _fit(config, builders)

    def rows(lane: int) -> "grain.IterDataset[Batch]":
        return _rows(config, fit(LaneSequences(lane, count, mixture, streams)), pad, 2 if config.pairs else 1)

    # For data in memory, reader threads would only wait for each other.
    threads = 0 if config.in_memory else min(READING.num_threads, len(lanes))
    return LaneBatches({lane: rows(lane) for lane in lanes}, threads)


def share_rows(
    config: DataConfig, builders: Sequence[Builder], pad: int, batch_size: int, process: tuple[int, int]
) -> "grain.IterDataset[Batch]":
    """Batches in order 1: process p of n mixes places p, p + n, p + 2n, ... of each source's order, and packs them."""
    process_index, process_count = process
    streams = []
    for number, builder in enumerate(builders):
        records, key = len(builder.data), (config.seed, number)
        stream = Stream(builder, key, _whole_order(records, key, config.in_memory))
        places = grain.MapDataset.range(records).repeat().map_with_index(lambda place, _, stream=stream: stream(place))
        streams.append(places[process_index::process_count])
    mixture = grain.MapDataset.mix(streams, [builder.source.weight for builder in builders])
    options = grain.ReadOptions(num_threads=0) if config.in_memory else READING
    return _rows(config, _fit(config, builders)(mixture.to_iter_dataset(options)), pad, batch_size)


def _fit(config: DataConfig, builders: Sequence[Builder]) -> "Callable[[grain.IterDataset[Built]], FittingDataset]":
    """Returns what handles sequences that are too long."""
    length = config.sequence_length
    weights = [builder.source.weight for builder in builders]
    # The number of mixed sequences that contain about every record once.
    epoch = max(
        math.ceil(len(builder.data) * sum(weights) / weight) for builder, weight in zip(builders, weights, strict=True)
    )

    @functools.cache
    def some_fit() -> bool:
        return any(builder.some_fit(length) for builder in builders)

    return lambda sequences: FittingDataset(sequences, length, config.too_long, patience=epoch, some_fit=some_fit)


def _rows(config: DataConfig, sequences: FittingDataset, pad: int, count: int) -> "grain.IterDataset[Batch]":
    """Batches of `count` rows."""
    length = config.sequence_length
    if config.pairs:
        return pair_rows(sequences, count, length, pad)
    if config.packing:
        rows = packed_rows(sequences, length, config.packing, pad)
    else:
        rows = padded_rows(sequences, length, pad, config.loss_on_padding)
    return rows.batch(count, drop_remainder=True)

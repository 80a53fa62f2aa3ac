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
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.epochs import Epochs, drops_prompt
from emu3_jax.data.sequences import TokenSequence, padded_row
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

Batch = dict[str, np.ndarray]

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
        return _too_long(self._iterator[0].get_state())


def open_prepared(source: Source, tokenizer: Tokenizer, codebook_sha256: str | None) -> PreparedData:
    """Opens the prepared data of a source.

    Args:
        source: the source.
        tokenizer: the model's tokenizer.
        codebook_sha256: SHA-256 of the model's codebook, see `Codebook`. With None, only the number of codes is
            checked.

    Raises:
        Emu3Error: the data are missing, damaged, or prepared with another codebook.
    """
    data = PreparedData(place(source.path))
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
        batch_size: rows in a batch of this process.
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
    builders = [
        _Builder(source, tokenizer, templates, open_prepared(source, tokenizer, codebook_sha256), keep=keep)
        for source in config.sources
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
    fitting = _FittingIterDataset(
        mixture.to_iter_dataset(options),
        length,
        config.too_long,
        patience=epoch,
        some_fit=lambda: any(builder.some_fit(length) for builder in builders),
    )
    if config.packing:
        rows = _packed(fitting, length, config.packing, pad)
    else:
        rows = _padded(fitting, length, pad, config.loss_on_padding)
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
    empty = TokenSequence(np.zeros(0, np.int32), np.zeros(0, bool))

    def sequence(index: int) -> _Built:
        return builder.build(index, drop_prompt=False) if index < len(data) else _Built("", empty)

    rounds = -(-len(data) // (batch_size * process_count))
    sequences = grain.MapDataset.range(rounds * batch_size * process_count).map(sequence)
    mine = sequences[process_index::process_count].to_iter_dataset(_READING)
    fitting = _FittingIterDataset(mine, sequence_length, too_long, instead=empty)
    rows = _padded(fitting, sequence_length, tokenizer.special.pad)
    identity = [data.index.job, source.task, templates, batch_size, sequence_length, process_index, process_count]
    return Batches(rows.batch(batch_size, drop_remainder=True), identity, [(source.path, len(data))])


@dataclasses.dataclass(frozen=True)
class _Built:
    """The sequence of a record, and the record's name for errors."""

    name: str
    sequence: TokenSequence


class _Builder:
    """Builds the sequences of a source's records. With `keep`, built sequences stay in memory."""

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        templates: PromptTemplates,
        data: PreparedData,
        *,
        keep: bool = False,
    ):
        self.source, self.data = source, data
        self._tokenizer, self._templates = tokenizer, templates
        self._kept: dict[tuple[int, bool], _Built] | None = {} if keep else None

    def build(self, record: int, drop_prompt: bool) -> _Built:
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

    def _build(self, index: int, drop_prompt: bool) -> _Built:
        record = self.data[index]
        name = f"{self.source.path}: record {record.name!r}"
        try:
            sequence = self.source.task.sequence(record, self._tokenizer, self._templates, drop_prompt)
        except Emu3Error as error:
            raise Emu3Error(f"{name}: {error}") from error
        mask = sequence.loss_mask.copy()
        mask[0] = False  # no earlier token can predict the first one
        return _Built(name, TokenSequence(sequence.tokens, mask))


class _Stream:
    """The endless stream of a source's sequences over all epochs, for Grain's `map_with_index`."""

    def __init__(self, builder: _Builder, key: tuple[int, int]):
        self._builder, self._key = builder, key
        self._records = len(builder.data)
        self._epochs = Epochs(self._records, key)

    def unshuffled(self, index: int, _: int) -> _Built:
        """The sequence at `index`, without shuffling. Grain shuffles afterwards."""
        epoch, record = divmod(index, self._records)
        return self._built(epoch, record)

    def shuffled(self, index: int, _: int) -> _Built:
        """The sequence at `index`, with a new order in each epoch. Takes a tenth of the time of Grain's shuffle."""
        epoch, position = divmod(index, self._records)
        return self._built(epoch, int(self._epochs.order(epoch)[position]))

    def _built(self, epoch: int, record: int) -> _Built:
        share = self._builder.source.task.prompt_dropout
        return self._builder.build(record, drops_prompt(self._key, epoch, record, share))


def _fitting_sequence(builder: _Builder, length: int, room: str, record: int, drop_prompt: bool) -> TokenSequence:
    built = builder.build(record, drop_prompt)
    _fits(built, length, "stop", room)
    return built.sequence


def _fits(built: _Built, length: int, too_long: str, room: str = "a row") -> bool:
    tokens = len(built.sequence)
    if tokens > length and too_long == "stop":
        raise Emu3Error(
            f"{built.name} has {tokens} tokens, but {room} has {length}: raise sequence_length, prepare with a smaller "
            'area, or set too_long to "skip"'
        )
    return tokens <= length


class _FittingIterDataset(grain.IterDataset):
    """Converts `_Built` sequences to arrays `tokens` and `loss_mask`. Handles sequences that are longer than a row."""

    def __init__(
        self,
        parent: "grain.IterDataset[_Built]",
        length: int,
        too_long: str,
        *,
        instead: TokenSequence | None = None,
        patience: int = 0,
        some_fit: Callable[[], bool] = lambda: True,
    ):
        """Prepares the data set.

        Args:
            parent: the sequences.
            length: tokens in a row.
            too_long: "stop" raises an error for a sequence that is too long; "skip" leaves it out and counts it.
            instead: replaces a sequence that is too long. With None, the next sequence that fits takes its place.
            patience: number of consecutive sequences that may be too long before `some_fit` is called.
            some_fit: whether any record fits. If none does, iteration stops with an error instead of searching forever.
        """
        super().__init__(parent)
        self.length, self.too_long, self.instead = length, too_long, instead
        self.patience, self.some_fit = patience, some_fit

    def __iter__(self) -> "_FittingIterator":
        return _FittingIterator(self, iter(self._parent))


class _FittingIterator(grain.DatasetIterator):
    def __init__(self, dataset: _FittingIterDataset, parent: grain.DatasetIterator):
        super().__init__(parent)
        self._dataset, self._count, self._some_fit = dataset, 0, False

    def __next__(self) -> dict[str, np.ndarray]:
        settings = self._dataset
        for passed in itertools.count(1):
            built: _Built = next(self._parent)
            if _fits(built, settings.length, settings.too_long):
                break
            self._count += 1
            if settings.instead is not None:
                return _arrays(settings.instead)
            if passed >= settings.patience and not self._some_fit:
                self._some_fit = settings.some_fit()
                if not self._some_fit:
                    raise Emu3Error(f"no record fits a row of {settings.length} tokens: raise sequence_length")
        self._some_fit = True
        return _arrays(built.sequence)

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._parent.get_state(), "too_long": self._count}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._count = state["too_long"]


def _arrays(sequence: TokenSequence) -> dict[str, np.ndarray]:
    return {"tokens": sequence.tokens, "loss_mask": sequence.loss_mask}


def _padded(
    sequences: _FittingIterDataset, length: int, pad: int, loss_on_padding: bool = False
) -> "grain.IterDataset[Batch]":
    """Rows that hold one sequence each."""
    return sequences.map(
        lambda arrays: padded_row(TokenSequence(**arrays), length, pad, loss_on_padding=loss_on_padding)
    )


def _packed(sequences: grain.IterDataset, length: int, bins: int, pad: int) -> grain.IterDataset:
    """Rows that hold several sequences each. Fills `bins` rows at the same time, first-fit."""
    rows = grain.experimental.FirstFitPackIterDataset(
        sequences,
        length_struct={"tokens": length, "loss_mask": length},
        num_packing_bins=bins,
        shuffle_bins=False,
        meta_features=["loss_mask"],  # no segment ids for the mask: it has the same segments as the tokens
        padding_struct={"tokens": pad, "loss_mask": False},
    )
    names = {"segment_ids": "tokens_segment_ids", "positions": "tokens_positions"}
    return rows.map(lambda row: {name: row[names.get(name, name)] for name in ("tokens", *names, "loss_mask")})


def _too_long(state: Any) -> int:
    """Finds the count of `_FittingIterator` in a nested state."""
    if not isinstance(state, Mapping):
        return 0
    return state.get("too_long", 0) + sum(map(_too_long, state.values()))


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

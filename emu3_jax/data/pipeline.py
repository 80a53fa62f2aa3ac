"""Batches for training and evaluation: Grain pipelines over prepared data.

Every process makes the same pipeline and reads its own share of each source: of the endless shuffled stream of records,
process p of n takes records p, p + n, p + 2n, ... So the shares are equally long, nothing is left out, and a source's
stream does not depend on the number of processes. Sources are mixed after that, which keeps each process' mixture at
the weights. Sequences are packed first-fit into rows whose segments attention and RoPE keep apart.

A row of 10,240 tokens takes about 2.5 ms, so threads of the training process make them; there are no worker processes.
A batch is a dict of arrays [B, S]:

    tokens       int32   ids; padding is the pad token
    segment_ids  int32   1, 2, ... within a row; 0 on padding. Attention stays within equal ids
    positions    int32   from 0 in each segment
    loss_mask    bool    token i is a target, predicted at i - 1. Never the first of a segment, never padding
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
_MAX_TOKENS = 2**25  # of a batch of one process: 440 MB, and some batches are made ahead


class Batches:
    """An iterator over batches whose state can be kept and restored.

    `get_state` is JSON-able and tells where the iterator stands after the batches it has given; an iterator of an
    equal pipeline that gets it by `set_state` gives the same batches from there, to the bit.

    Attributes:
        sources: the path of each source, and how many records it has.
    """

    def __init__(
        self, dataset: "grain.IterDataset[Batch]", identity: Sequence[Any], sources: Sequence[tuple[str, int]]
    ):
        """`identity` is all that decides the batches; states go only to where it is equal."""
        self.sources = tuple(sources)
        self._pipeline = hashlib.sha256(repr(identity).encode()).hexdigest()
        ahead = grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=_BATCHES_AHEAD)
        # Grain 0.2's iterators complain when they are left to the interpreter's last moments: closed before those.
        self._iterator = [iter(ahead)]
        self.close = weakref.finalize(self, _close, self._iterator)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        return next(self._iterator[0])

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON-able values."""
        return {"pipeline": self._pipeline, "position": self._iterator[0].get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Moves to the position that `get_state` told.

        Raises:
            Emu3Error: the state is of other data, or of a pipeline with other settings.
        """
        if not isinstance(state, Mapping) or state.get("pipeline") != self._pipeline:
            raise Emu3Error(
                "the saved position is of other data: its sources, batch size, sequence length, packing, seed or "
                "number of processes differ; resume with the same data settings, or start a new run"
            )
        with reading("the saved position", "delete the checkpoint to go on from the one before"):
            self._iterator[0].set_state(state["position"])

    @property
    def skipped(self) -> int:
        """How many records of this process were longer than a row and left out, up to the last batch."""
        return _too_long(self._iterator[0].get_state())


def open_source(source: Source, tokenizer: Tokenizer, codebook_sha256: str | None) -> PreparedData:
    """A source's records.

    Args:
        source: where they are.
        tokenizer: the model's.
        codebook_sha256: of the model's vision tokenizer where it is at hand, see `Codebook`; else only the number of
            codes is compared.

    Raises:
        Emu3Error: the source is missing, damaged, or of another codebook.
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
    """Endless batches of shuffled, mixed and packed sequences.

    Args:
        config: what they are made of.
        tokenizer: the model's.
        templates: the model's.
        batch_size: rows of this process.
        codebook_sha256: see `open_source`.
        process_index: `jax.process_index()`.
        process_count: `jax.process_count()`.

    Raises:
        Emu3Error: a source is missing, damaged or of another codebook; while iterating, a damaged shard, or a record
            that is too long or not of the task's kind.
    """
    _check_place(batch_size, config.sequence_length, process_index, process_count)
    process = (process_index, process_count)
    keep = config.in_memory and not config.whole_rows
    builders = [
        _Builder(source, tokenizer, templates, open_source(source, tokenizer, codebook_sha256), keep=keep)
        for source in config.sources
    ]
    # Not the sources' paths: data may move.
    sources = [(b.data.index.job, b.source.task, b.source.weight, b.source.parts) for b in builders]
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)} | {"sources": sources}
    rows = _table_rows if config.whole_rows else _stream_rows
    dataset = rows(config, builders, tokenizer.special.pad, batch_size, process)
    identity = [settings, templates, batch_size, process_index, process_count]
    return Batches(dataset, identity, [(builder.source.path, len(builder.data)) for builder in builders])


def _table_rows(
    config: DataConfig, builders: Sequence["_Builder"], pad: int, batch_size: int, process: tuple[int, int]
) -> "grain.IterDataset[Batch]":
    """Batches of rows that are kept as they are."""
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
    """Batches of rows that are made of sequences as they come."""
    process_index, process_count = process
    weights = [builder.source.weight for builder in builders]
    streams, epoch = [], 0  # an epoch of the mixture: about as many sequences as hold every record
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
    # Where nothing is read, threads would only wait for each other.
    reading = grain.ReadOptions(num_threads=0) if config.in_memory else _READING
    length = config.sequence_length
    fitting = _FittingIterDataset(
        mixture.to_iter_dataset(reading),
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
    """One pass over a source in order: every record once, one a row, no prompt dropped.

    Every process gets equally many batches. Rows are left empty (segment ids 0, no targets) where the records do not
    fill the last batches, and where a record is too long and `too_long` is "skip". The other arguments and the errors
    are those of `training_batches`.
    """
    _check_place(batch_size, sequence_length, process_index, process_count)
    data = open_source(source, tokenizer, codebook_sha256)
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
    """The sequence of a record, and what errors call the record."""

    name: str
    sequence: TokenSequence


class _Builder:
    """Records of one source to sequences; with `keep`, each is built once."""

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
        """The sequence of a record, with its prompt or without."""
        if self._kept is None:
            return self._build(record, drop_prompt)
        key = (record, drop_prompt)
        if key not in self._kept:
            self._kept[key] = self._build(record, drop_prompt)
        return self._kept[key]

    def some_fit(self, length: int) -> bool:
        """Whether any record is no longer than `length` tokens, as training may build it."""
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
        mask[0] = False  # nothing stands before it to predict it from
        return _Built(name, TokenSequence(sequence.tokens, mask))


class _Stream:
    """The endless stream of one source's sequences, epoch after epoch, for Grain's `map_with_index`."""

    def __init__(self, builder: _Builder, key: tuple[int, int]):
        self._builder, self._key = builder, key
        self._records = len(builder.data)
        self._epochs = Epochs(self._records, key)

    def unshuffled(self, index: int, _: int) -> _Built:
        """The sequence at `index` where every epoch has the records in their order; Grain shuffles them then."""
        epoch, record = divmod(index, self._records)
        return self._built(epoch, record)

    def shuffled(self, index: int, _: int) -> _Built:
        """The sequence at `index` where each epoch has its own order: a tenth of the time of Grain's shuffle."""
        epoch, place = divmod(index, self._records)
        return self._built(epoch, int(self._epochs.order(epoch)[place]))

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
            f"{built.name} has {tokens} tokens, {room} has {length}: raise sequence_length, prepare with a smaller "
            'area, or set too_long to "skip"'
        )
    return tokens <= length


class _FittingIterDataset(grain.IterDataset):
    """From `_Built` sequences to their arrays `tokens` and `loss_mask`; one longer than a row is counted, or stops."""

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
        """Sets out what fits.

        Args:
            parent: the sequences.
            length: tokens of a row.
            too_long: "stop" or "skip".
            instead: stands in for a sequence that is too long; without it, the next one that fits comes.
            patience: sequences that may be too long, one after the other, before `some_fit` is asked.
            some_fit: whether any record there is fits; else the search would never end.
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
    """Rows of one sequence each."""
    return sequences.map(
        lambda arrays: padded_row(TokenSequence(**arrays), length, pad, loss_on_padding=loss_on_padding)
    )


def _packed(sequences: grain.IterDataset, length: int, bins: int, pad: int) -> grain.IterDataset:
    """Rows of several sequences each, first-fit into `bins` rows at once."""
    rows = grain.experimental.FirstFitPackIterDataset(
        sequences,
        length_struct={"tokens": length, "loss_mask": length},
        num_packing_bins=bins,
        shuffle_bins=False,
        meta_features=["loss_mask"],  # needs no segment ids of its own
        padding_struct={"tokens": pad, "loss_mask": False},
    )
    names = {"segment_ids": "tokens_segment_ids", "positions": "tokens_positions"}
    return rows.map(lambda row: {name: row[names.get(name, name)] for name in ("tokens", *names, "loss_mask")})


def _too_long(state: Any) -> int:
    """The count that `_FittingIterator` keeps, from a state that holds its state somewhere."""
    if not isinstance(state, Mapping):
        return 0
    return state.get("too_long", 0) + sum(map(_too_long, state.values()))


def _check_place(batch_size: int, length: int, process_index: int, process_count: int) -> None:
    if batch_size < 1:
        raise Emu3Error(f"batch_size is {batch_size}: each process needs at least one row")
    if batch_size * length > _MAX_TOKENS:
        raise Emu3Error(
            f"batch_size is {batch_size} rows of {length} tokens for each process, of which a step has at most "
            f"{_MAX_TOKENS} tokens: lower batch_size or sequence_length"
        )
    if not 0 <= process_index < process_count:
        raise Emu3Error(f"process_index is {process_index} of {process_count}: it must be 0 to process_count - 1")


def _close(iterator: list[grain.DatasetIterator]) -> None:
    iterator.pop().close()

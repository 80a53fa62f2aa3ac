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
import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import TokenSequence, padded_row
from emu3_jax.data.shards import PreparedData
from emu3_jax.data.tables import Table, TableBatches
from emu3_jax.errors import Emu3Error
from emu3_jax.text.prompts import PromptTemplates
from emu3_jax.text.tokenizer import Tokenizer

try:
    import grain
except ImportError as missing:
    raise Emu3Error("training needs Grain, which is not installed: pip install 'emu3-jax[train]'") from missing

Batch = dict[str, np.ndarray]

_READING = grain.ReadOptions(num_threads=4, prefetch_buffer_size=64)
_BATCHES_AHEAD = 2


class Batches:
    """An iterator over batches whose state can be kept and restored.

    `get_state` is JSON-able and tells where the iterator stands after the batches it has given; an iterator of an
    equal pipeline that gets it by `set_state` gives the same batches from there, to the bit.
    """

    def __init__(self, dataset: "grain.IterDataset[Batch]", identity: Sequence[Any]):
        """`identity` is all that decides the batches; states go only to where it is equal."""
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
        if state.get("pipeline") != self._pipeline:
            raise Emu3Error(
                "the saved position is of other data: its sources, batch size, sequence length, packing, seed or "
                "number of processes differ; resume with the same data settings, or start a new run"
            )
        self._iterator[0].set_state(state["position"])

    @property
    def skipped(self) -> int:
        """How many records of this process were longer than a row and left out, up to the last batch."""
        return _too_long(self._iterator[0].get_state())


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
        codebook_sha256: of the model's vision tokenizer where it is at hand, see `Codebook`; else sizes are compared.
        process_index: `jax.process_index()`.
        process_count: `jax.process_count()`.

    Raises:
        Emu3Error: a source is missing, damaged or of another codebook; while iterating, a damaged shard, or a record
            that is too long or not of the task's kind.
    """
    _check_place(batch_size, process_index, process_count)
    pad = tokenizer.special.pad
    streams, tables, identity, epoch = [], [], [], 0
    total = sum(source.weight for source in config.sources)
    for number, source in enumerate(config.sources):
        data = PreparedData(source.path)
        data.require_codebook(tokenizer.special.visual_count, codebook_sha256)
        key = (config.seed, number)
        arguments = (source, tokenizer, templates, data, key)
        identity.append((data.index.job, source.task, source.weight, source.parts))
        if config.whole_rows:
            length = config.sequence_length // source.parts
            room = "a row" if source.parts == 1 else f"each of the {source.parts} parts of a row"
            build = functools.partial(_fitting_sequence, _Builder(*arguments), length, room)
            row = (length, pad, config.loss_on_padding)
            tables.append(Table(build, len(data), source.task.prompt_dropout, key, *row, source.parts))
            continue
        if config.in_memory:
            stream = grain.MapDataset.range(len(data)).repeat().map_with_index(_KeepingBuilder(*arguments).draw)
        else:
            seed = int(np.random.SeedSequence(key).generate_state(1)[0])
            stream = grain.MapDataset.range(len(data)).map_with_index(_Builder(*arguments).draw).shuffle(seed).repeat()
        streams.append(stream[process_index::process_count])
        epoch = max(epoch, math.ceil(len(data) * total / source.weight))
    # Not the sources' paths: data may move.
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)} | {"sources": identity}
    identity = [settings, templates, batch_size, process_index, process_count]
    if config.whole_rows:
        weights, process = [source.weight for source in config.sources], (process_index, process_count)
        rows = TableBatches(tables, weights, batch_size, config.sequence_length, config.seed, process)
        return Batches(rows, identity)
    mixture = grain.MapDataset.mix(streams, [source.weight for source in config.sources])
    # Where nothing is read, threads would only wait for each other.
    reading = grain.ReadOptions(num_threads=0) if config.in_memory else _READING
    fitting = _FittingIterDataset(mixture.to_iter_dataset(reading), config.sequence_length, config.too_long, epoch)
    if config.packing:
        rows = _packed(fitting, config.sequence_length, config.packing, pad)
    else:
        rows = fitting.map(
            lambda item: padded_row(
                TokenSequence(**item), config.sequence_length, pad, loss_on_padding=config.loss_on_padding
            )
        )
    return Batches(rows.batch(batch_size, drop_remainder=True), identity)


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
    _check_place(batch_size, process_index, process_count)
    data = PreparedData(source.path)
    data.require_codebook(tokenizer.special.visual_count, codebook_sha256)
    builder = _Builder(source, tokenizer, templates, data, (0, 0))
    pad = tokenizer.special.pad
    empty = TokenSequence(np.zeros(0, np.int32), np.zeros(0, bool))

    def row(index: int) -> Batch:
        sequence = empty
        if index < len(data):
            item = builder.build(index, drop_prompt=False)
            if _fits(item, sequence_length, too_long):
                sequence = TokenSequence(item["tokens"], item["loss_mask"])
        return padded_row(sequence, sequence_length, pad)

    rounds = -(-len(data) // (batch_size * process_count))
    rows = grain.MapDataset.range(rounds * batch_size * process_count).map(row)[process_index::process_count]
    identity = [data.index.job, source.task, templates, batch_size, sequence_length, process_index, process_count]
    return Batches(rows.to_iter_dataset(_READING).batch(batch_size, drop_remainder=True), identity)


class _Builder:
    """Records of one source to sequences, with the record's name for errors."""

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        templates: PromptTemplates,
        data: PreparedData,
        key: tuple[int, int],
    ):
        self._source, self._tokenizer, self._templates, self._data, self._key = source, tokenizer, templates, data, key

    def draw(self, index: int, _: int) -> dict[str, Any]:
        """The sequence at `index` in the endless stream before shuffling: record after record, epoch after epoch."""
        epoch, record = divmod(index, len(self._data))
        return self.build(record, self._drops(epoch, record))

    def _drops(self, epoch: int, record: int) -> bool:
        """Whether the prompt is dropped. It belongs to record and epoch, so that no order of reading changes it."""
        dropout = self._source.task.prompt_dropout
        if not dropout:
            return False
        state = np.random.SeedSequence([*self._key, epoch, record]).generate_state(1, np.uint64)
        return bool(state[0] < dropout * 2.0**64)

    def build(self, index: int, drop_prompt: bool) -> dict[str, Any]:
        """Of a record: `tokens` and `loss_mask`, and in `name` what errors call it."""
        record = self._data[index]
        name = f"{self._source.path}: record {record.name!r}"
        try:
            sequence = self._source.task.sequence(record, self._tokenizer, self._templates, drop_prompt)
        except Emu3Error as error:
            raise Emu3Error(f"{name}: {error}") from error
        mask = sequence.loss_mask.copy()
        mask[0] = False  # nothing stands before it to predict it from
        return {"name": name, "tokens": sequence.tokens, "loss_mask": mask}


class _KeepingBuilder(_Builder):
    """Holds what it has built, and shuffles by one permutation an epoch: a tenth of the time a record."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._kept: dict[tuple[int, bool], dict[str, Any]] = {}
        self._orders: dict[int, np.ndarray] = {}

    def draw(self, index: int, _: int) -> dict[str, Any]:
        """The sequence at `index` in the endless, shuffled stream."""
        epoch, place = divmod(index, len(self._data))
        order = self._orders.get(epoch)
        if order is None:
            # Threads may make it twice, with the same result; readers are never further apart than two epochs.
            order = np.random.default_rng([*self._key, epoch]).permutation(len(self._data))
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1} | {epoch: order}
        record = int(order[place])
        key = (record, self._drops(epoch, record))
        if key not in self._kept:
            self._kept[key] = self.build(*key)
        return self._kept[key]


def _fitting_sequence(builder: _Builder, length: int, room: str, record: int, drop_prompt: bool) -> TokenSequence:
    item = builder.build(record, drop_prompt)
    _fits(item, length, "stop", room)
    return TokenSequence(item["tokens"], item["loss_mask"])


def _fits(item: Mapping[str, Any], length: int, too_long: str, room: str = "a row") -> bool:
    tokens = len(item["tokens"])
    if tokens > length and too_long == "stop":
        raise Emu3Error(
            f"{item['name']} has {tokens} tokens, {room} has {length}: raise sequence_length, prepare with a smaller "
            'area, or set too_long to "skip"'
        )
    return tokens <= length


class _FittingIterDataset(grain.IterDataset):
    """Passes on sequences that fit a row; counts the others, or stops at the first.

    `epoch` is how many sequences hold all records: when none of so many fits, none ever will.
    """

    def __init__(self, parent: grain.IterDataset, length: int, too_long: str, epoch: int):
        super().__init__(parent)
        self._settings = (length, too_long, epoch)

    def __iter__(self) -> "_FittingIterator":
        return _FittingIterator(iter(self._parent), *self._settings)


class _FittingIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, length: int, too_long: str, epoch: int):
        super().__init__(parent)
        self._length, self._too_long, self._epoch, self._count = length, too_long, epoch, 0

    def __next__(self) -> Batch:
        for _ in range(self._epoch):
            item = next(self._parent)
            if _fits(item, self._length, self._too_long):
                return {"tokens": item["tokens"], "loss_mask": item["loss_mask"]}
            self._count += 1
        raise Emu3Error(f"no record fits a row of {self._length} tokens: raise sequence_length")

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._parent.get_state(), "too_long": self._count}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._count = state["too_long"]


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


def _check_place(batch_size: int, process_index: int, process_count: int) -> None:
    if batch_size < 1:
        raise Emu3Error(f"batch_size is {batch_size}: each process needs at least one row")
    if not 0 <= process_index < process_count:
        raise Emu3Error(f"process_index is {process_index} of {process_count}: it must be 0 to process_count - 1")


def _close(iterator: list[grain.DatasetIterator]) -> None:
    iterator.pop().close()

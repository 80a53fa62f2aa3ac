"""Frozen configs of training data: the sources, and how batches are made. Importing them does not need Grain."""

import dataclasses
from typing import Any

from emu3_jax.data.records import PAIRS
from emu3_jax.data.sequences import Preference, Task
from emu3_jax.errors import Emu3Error
from emu3_jax.fields import check_field, is_number, is_whole
from emu3_jax.foreign import local_path
from emu3_jax.printable import shown
from emu3_jax.storage import check_place

MAX_SEED = 2**32 - 1  # accepted by all random number generators in use
MAX_THREADS = 1024  # a thread takes megabytes, and operating systems limit the number of threads
MAX_LENGTH = 2**24  # tokens in a row
MAX_SHUFFLED = 2**20  # shards that are shuffled together
_MAX_PACKED = 2**26  # tokens in all rows that packing fills at once: about 600 MB


def check_path(config: Any, field: str, legal: str = "a local path", *, remote: bool = False) -> None:
    """Raises an `Emu3Error` unless the field holds a legal path or an empty string.

    An empty string may mean "none". A config that does not allow it must check this itself.

    Args:
        config: the config.
        field: name of the field.
        legal: description of the legal values.
        remote: whether a path in a bucket is legal.
    """
    value = getattr(config, field)
    check_field(config, field, isinstance(value, str), legal)
    try:
        (check_place if remote else local_path)(value or ".")
    except Emu3Error as error:
        raise Emu3Error(f"{type(config).__name__} field {field}: {error}") from error


def check_paths(config: Any, field: str, legal: str) -> None:
    """Raises an `Emu3Error` unless the field holds a tuple of legal local paths. Empty paths are not legal."""
    value = getattr(config, field)
    check_field(config, field, isinstance(value, tuple) and all(isinstance(path, str) for path in value), legal)
    for path in value:
        try:
            local_path(path)
        except Emu3Error as error:
            raise Emu3Error(f"{type(config).__name__} field {field}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Source:
    """A directory of prepared data, and the task to train on it.

    Attributes:
        path: a directory that `emu3-jax prepare` wrote; for the task `Preference`, one that `emu3-jax pairs` wrote.
        task: converts records to sequences; an object of a class in `emu3_jax.data.sequences`.
        weight: relative number of records to read from this source, compared with the weights of the other sources.
        parts: number of equal parts in a row; each part holds one record. More than 1 needs a `DataConfig` with
            `in_memory=True`, `packing=0`, `too_long="stop"` and `loss_on_padding=False`.
    """

    path: str
    task: Task | Preference
    weight: float = 1.0
    parts: int = 1

    def __post_init__(self) -> None:
        check_path(self, "path", "a directory that emu3-jax prepare wrote", remote=True)
        ok = is_number(getattr(self.task, "prompt_dropout", None)) and callable(getattr(self.task, "sequence", None))
        check_field(self, "task", ok, "one of the classes of emu3_jax.data.sequences, such as TextToImage()")
        if not (is_number(self.weight) and self.weight > 0):
            raise Emu3Error(f"weight of {self.path} is {shown(self.weight)}: it must be a number > 0")
        if not is_whole(self.parts, 1):
            raise Emu3Error(f"parts of {self.path} is {shown(self.parts)}: it must be a whole number >= 1")

    @property
    def pairs(self) -> bool:
        """Whether the task trains on preference pairs."""
        return getattr(self.task, "reads", None) == PAIRS


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Training data, and how batches are made from it.

    Attributes:
        sources: the sources; several are mixed. Empty for GRPO alone, which draws its own pictures.
        sequence_length: tokens in a row.
        packing: number of rows that are filled at the same time, for each row of a batch: they are this row of so many
            batches. More rows leave less padding, but move records further from their place in the shuffled order. 0
            turns packing off: one record per row, as in the reference.
        too_long: what to do with a record that is longer than a row. "stop" raises an error. "skip" leaves the record
            out, and counts it in every epoch.
        seed: seed of shuffling and prompt dropout.
        in_memory: keep built data in memory, for data that are read for many epochs. With `packing=0` and
            `too_long="stop"` this keeps finished rows, at five bytes per token of a row. Otherwise it keeps sequences,
            at six bytes per token.
        loss_on_padding: reproduce a defect of the reference, see `sequences.padded_row`. Needs `packing=0`.
        shuffle_shards: most shards of a source whose records are shuffled together. A source with more shards is
            shuffled in blocks of shards, in a new order in each epoch, so that each host reads few of them: see
            `data.order`. With `packing=0`, `in_memory=True` and `too_long="stop"` all records are shuffled together.
    """

    sources: tuple[Source, ...]
    sequence_length: int
    packing: int = 8
    too_long: str = "stop"
    seed: int = 0
    in_memory: bool = False
    loss_on_padding: bool = False
    shuffle_shards: int = 16

    def __post_init__(self) -> None:
        bounds = {
            "sequence_length": (2, MAX_LENGTH),
            "packing": (0, _MAX_PACKED),
            "seed": (0, MAX_SEED),
            "shuffle_shards": (1, MAX_SHUFFLED),
        }
        for field, (least, most) in bounds.items():
            value = getattr(self, field)
            if not (is_whole(value, least) and value <= most):
                raise Emu3Error(
                    f"data field {field} is {shown(value)}: it must be a whole number from {least} to {most}"
                )
        if self.packing * self.sequence_length > _MAX_PACKED:
            raise Emu3Error(
                f"data field packing is {self.packing}: packing * sequence_length must be at most {_MAX_PACKED}; lower "
                "packing or sequence_length"
            )
        if not isinstance(self.sources, tuple) or not all(isinstance(source, Source) for source in self.sources):
            raise Emu3Error(f"data field sources is {shown(self.sources)}: it must be a tuple of Source")
        if self.too_long not in ("stop", "skip"):
            raise Emu3Error(f"data field too_long is {shown(self.too_long)}: it must be stop or skip")
        if self.loss_on_padding and self.packing:
            raise Emu3Error("data field loss_on_padding is true: it needs packing=0, one record per row")
        if self.pairs and (self.packing or self.loss_on_padding or any(source.parts > 1 for source in self.sources)):
            raise Emu3Error(
                "the data are preference pairs, whose sides take a row each: they need packing=0, "
                "loss_on_padding=False and parts=1"
            )
        if any(source.pairs != self.pairs for source in self.sources):
            raise Emu3Error(
                "data field sources has preference pairs beside other data: train on one of them; cross_entropy of a "
                "PreferenceConfig adds the loss of the chosen sides"
            )
        for source in self.sources:
            if source.parts == 1:
                continue
            if source.parts > self.sequence_length or not self.whole_rows or self.loss_on_padding:
                raise Emu3Error(
                    f'parts of {source.path} is {source.parts}: parts need in_memory=True, packing=0, too_long="stop", '
                    "loss_on_padding=False and at least one token each; change these fields, or leave parts at 1"
                )

    @property
    def pairs(self) -> bool:
        """Whether the data are preference pairs. Then rows 2i and 2i + 1 of a batch are a pair."""
        return any(source.pairs for source in self.sources)

    @property
    def whole_rows(self) -> bool:
        """Whether finished rows are kept in memory, see `data.tables`."""
        return not self.pairs and self.in_memory and not self.packing and self.too_long == "stop"

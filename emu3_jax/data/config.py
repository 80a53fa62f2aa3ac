"""What training batches are made of, as frozen configs; importing them needs no Grain."""

import dataclasses
from typing import Any

from emu3_jax.data.sequences import Task
from emu3_jax.errors import Emu3Error
from emu3_jax.fields import check_field, is_number, is_whole
from emu3_jax.foreign import local_path
from emu3_jax.printable import shown
from emu3_jax.storage import check_place

MAX_SEED = 2**32 - 1  # what every generator of random numbers takes
MAX_THREADS = 1024  # each takes megabytes, and a system refuses a process that starts too many
MAX_LENGTH = 2**24  # tokens of a row
_MAX_PACKED = 2**26  # tokens of the rows that are filled at once: about 600 MB


def check_path(config: Any, field: str, legal: str = "a local path", *, remote: bool = False) -> None:
    """Raises an `Emu3Error` that names the field unless it is text, and empty or a local path.

    Whether an empty one means "none" is the config's business; what opens it refuses it.

    Args:
        config: with the field.
        field: its name.
        legal: what it may be.
        remote: a path in a bucket is legal too.
    """
    value = getattr(config, field)
    check_field(config, field, isinstance(value, str), legal)
    try:
        (check_place if remote else local_path)(value or ".")
    except Emu3Error as error:
        raise Emu3Error(f"{type(config).__name__} field {field}: {error}") from error


def check_paths(config: Any, field: str, legal: str) -> None:
    """The same for a tuple of paths, none of which may be empty."""
    value = getattr(config, field)
    check_field(config, field, isinstance(value, tuple) and all(isinstance(path, str) for path in value), legal)
    for path in value:
        try:
            local_path(path)
        except Emu3Error as error:
            raise Emu3Error(f"{type(config).__name__} field {field}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Source:
    """Prepared data and what is trained on it.

    Attributes:
        path: a directory that `emu3-jax prepare` wrote.
        task: how its records become sequences, one of the classes of `emu3_jax.data.sequences`.
        weight: how many of its records are read, in proportion to the other sources' weights.
        parts: equal parts of a row, each of which holds one record; more than 1 only where whole rows are in memory.
    """

    path: str
    task: Task
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


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What batches are made of.

    Attributes:
        sources: at least one; several are mixed.
        sequence_length: tokens of a row.
        packing: rows that are filled at once. More rows leave less padding, and move records further from their place
            in the stream. 0 packs nothing: one record a row, as the reference trains.
        too_long: what happens to a record longer than a row: "stop", or "skip", which leaves it out and counts it once
            an epoch.
        seed: of shuffling and prompt dropout.
        in_memory: keeps what was built, for data that are read many times over: without packing whole rows, at five
            bytes a token of the row, else sequences, at about six bytes a token.
        loss_on_padding: reproduces a defect of the reference, see `padded_row`; only without packing.
    """

    sources: tuple[Source, ...]
    sequence_length: int
    packing: int = 8
    too_long: str = "stop"
    seed: int = 0
    in_memory: bool = False
    loss_on_padding: bool = False

    def __post_init__(self) -> None:
        bounds = {"sequence_length": (2, MAX_LENGTH), "packing": (0, _MAX_PACKED), "seed": (0, MAX_SEED)}
        for field, (least, most) in bounds.items():
            value = getattr(self, field)
            if not (is_whole(value, least) and value <= most):
                raise Emu3Error(
                    f"data field {field} is {shown(value)}: it must be a whole number from {least} to {most}"
                )
        if self.packing * self.sequence_length > _MAX_PACKED:
            raise Emu3Error(
                f"data field packing is {self.packing}: times sequence_length it must be at most {_MAX_PACKED} tokens, "
                "which are held at once"
            )
        if not isinstance(self.sources, tuple) or not all(isinstance(source, Source) for source in self.sources):
            raise Emu3Error(f"data field sources is {shown(self.sources)}: it must be a tuple of Source")
        if not self.sources:
            raise Emu3Error("data field sources is empty: name at least one directory of prepared data")
        if self.too_long not in ("stop", "skip"):
            raise Emu3Error(f"data field too_long is {shown(self.too_long)}: it must be stop or skip")
        if self.loss_on_padding and self.packing:
            raise Emu3Error("data field loss_on_padding is true: it needs packing=0, one record a row")
        for source in self.sources:
            if source.parts == 1:
                continue
            if source.parts > self.sequence_length or not self.whole_rows or self.loss_on_padding:
                raise Emu3Error(
                    f'parts of {source.path} is {source.parts}: parts need in_memory=True, packing=0, too_long="stop", '
                    "loss_on_padding=False and at least a token each; change those, or leave parts at 1"
                )

    @property
    def whole_rows(self) -> bool:
        """Whether rows are kept as they are, see `data.tables`."""
        return self.in_memory and not self.packing and self.too_long == "stop"

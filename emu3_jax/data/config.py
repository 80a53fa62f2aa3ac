"""What training batches are made of, as frozen configs; importing them needs no Grain."""

import dataclasses

from emu3_jax.data.sequences import Task
from emu3_jax.errors import Emu3Error
from emu3_jax.fields import is_number, is_whole


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
        if not (is_number(self.weight) and self.weight > 0):
            raise Emu3Error(f"weight of {self.path} is {self.weight!r}: it must be a number > 0")
        if not is_whole(self.parts, 1):
            raise Emu3Error(f"parts of {self.path} is {self.parts!r}: it must be a whole number >= 1")


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
        for field, least in (("sequence_length", 2), ("packing", 0), ("seed", 0)):
            value = getattr(self, field)
            if not (is_whole(value, least) and value < 2**32):
                raise Emu3Error(f"data field {field} is {value!r}: it must be a whole number from {least}")
        if not self.sources:
            raise Emu3Error("data field sources is empty: name at least one directory of prepared data")
        if self.too_long not in ("stop", "skip"):
            raise Emu3Error(f"data field too_long is {self.too_long!r}: it must be stop or skip")
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

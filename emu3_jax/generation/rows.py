"""Arguments of generation with one value for all rows or one per row: checks them and converts them for the loop."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from emu3_jax.errors import Emu3Error
from emu3_jax.generation import defaults
from emu3_jax.generation.sampling import RowSettings
from emu3_jax.printable import counted, shown


def prompt_list(prompts: str | Sequence[str]) -> list[str]:
    """Returns one or several prompts as a list. Raises `Emu3Error` if there is none, or one is no text."""
    found = [prompts] if isinstance(prompts, str) else _texts("prompts", prompts)
    if not found:
        raise Emu3Error("there is no prompt: give at least one")
    return found


def texts_per_row(name: str, value: Any, count: int, row: str = "prompt") -> list[str]:
    """As `per_row`, for texts. Raises `Emu3Error` if a value is no text."""
    return per_row(name, value if isinstance(value, str) else _texts(name, value), count, row)


def _texts(name: str, value: Any) -> list[str]:
    legal = f"a text or a list of texts, such as {_EXAMPLES.get(name, repr('a red apple'))}"
    # A set has no order, and a dictionary's values would be lost.
    if isinstance(value, bytes | bytearray | set | frozenset | Mapping) or not isinstance(value, Iterable):
        raise Emu3Error(f"{name} is {shown(value)}: it must be {legal}")
    found = list(value)
    for index, text in enumerate(found):
        if not isinstance(text, str):
            raise Emu3Error(f"{name}[{index}] is {shown(text)}: {name} must be {legal}")
    return found


def per_row(name: str, value: Any, count: int, row: str = "prompt") -> list[Any]:
    """Returns a list with one value per row. Raises `Emu3Error` if a sequence has another length.

    `name` and `row` are what the error line calls the values and a row.
    """
    if not _is_sequence(value):
        return [value] * count
    if len(value) != count:
        given, rows = counted(len(value), "value"), counted(count, row)
        raise Emu3Error(f"{given} of {name} for {rows}: give one, or one for each {row}")
    return list(value)


_SMALL, _LARGE = 1e-9, 1e9
_EXAMPLES = {"ratio": "'16:9'"}

# Predicate of legal values, and their description in error lines.
_LEGAL: dict[str, tuple[Callable[[Any], bool], str]] = {
    # Smaller temperatures would divide by 0 in float32, larger ones would overflow.
    "temperature": (lambda v: v == 0 or _SMALL <= v <= _LARGE, "0, or a number from 1e-9 to 1e9"),
    "top_k": (lambda v: 1 <= v < 2**31 and v == int(v), "a whole number from 1 to 2**31 - 1"),
    "top_p": (lambda v: _SMALL <= v <= 1, "a number from 1e-9 to 1"),
    "guidance": (lambda v: 0 <= v <= _LARGE, "a number from 0 to 1e9"),
    "seed": (lambda v: 0 <= v < 2**32 and v == int(v), "a whole number from 0 to 2**32 - 1"),
}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of sampling. Each field is one value for all rows, or a sequence with one value per row.

    Attributes:
        temperature: sampling temperature; 0 is greedy.
        top_k: number of likeliest tokens to sample from.
        top_p: total probability of the likeliest tokens to sample from.
        guidance: classifier-free guidance scale; 1 means no guidance.
        seed: one number, which counts up over the rows, or one seed per prompt, see `settings`.

    Raises:
        Emu3Error: a value is not legal.
    """

    temperature: float | Sequence[float] = defaults.TEMPERATURE
    top_k: int | Sequence[int] = defaults.TOP_K
    top_p: float | Sequence[float] = defaults.TOP_P
    guidance: float | Sequence[float] = defaults.GUIDANCE
    seed: int | Sequence[int] = defaults.SEED

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _check(field.name, list(value) if _is_sequence(value) else [value])

    def settings(self, count: int, n: int = 1) -> RowSettings:
        """The settings of `count` prompts with `n` rows each, grouped by prompt.

        One seed counts up over all rows. With a sequence of seeds, each prompt's rows count up from its own.

        Raises:
            Emu3Error: a sequence does not have `count` values, or a seed becomes too large.
        """
        columns: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            column = repeat(per_row(field.name, getattr(self, field.name), count), n)
            if field.name == "seed":
                within = n if _is_sequence(self.seed) else count * n
                column = [int(seed) + row % within for row, seed in enumerate(column)]
                _check("seed", column)
            columns[field.name] = column
        return RowSettings.of(count * n, **columns)


def repeat(values: Sequence[Any], n: int) -> list[Any]:
    """Each value `n` times, one after the other."""
    return [value for value in values for _ in range(n)]


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)


def _check(name: str, values: list[Any]) -> None:
    legal, words = _LEGAL[name]
    for value in values:
        if not (isinstance(value, int | float | np.number) and legal(value)):
            raise Emu3Error(f"{name} is {shown(value)}: it must be {words}")


def describe(settings: RowSettings, index: int) -> dict[str, str]:
    """The sampling settings of a row as texts, for a picture's metadata. Numbers get as many digits as they need."""
    found = {name: getattr(settings, name)[index] for name in ("seed", "guidance", "temperature", "top_k", "top_p")}
    return {
        name.replace("_", "-"): str(value) if isinstance(value, np.integer) else _digits(value)
        for name, value in found.items()
    }


def _digits(value: np.floating) -> str:
    return np.format_float_positional(value, trim="-")

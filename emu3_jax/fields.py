"""How frozen configs check their fields when they are made, and how they are made from JSON objects."""

import contextlib
import dataclasses
import numbers
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from emu3_jax.errors import Emu3Error
from emu3_jax.printable import shown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


class FieldError(Emu3Error):
    """A field of a config holds an illegal value. Only what read the value from a file knows the remedy: `read_from`.

    Attributes:
        field: its name.
        value: what it holds.
        legal: what it may hold, in words.
    """

    def __init__(self, config: str, field: str, value: Any, legal: str):
        super().__init__(f"{config} field {field} is {shown(value)}: it must be {legal}")
        self.field, self.value, self.legal = field, value, legal


@contextlib.contextmanager
def read_from(file: Path) -> Iterator[None]:
    """For a block that makes configs of what `file` holds: its errors name the file, where a bad value is corrected."""
    try:
        yield
    except FieldError as error:
        found = f"config field {error.field} is {shown(error.value)}: it must be {error.legal}"
        raise Emu3Error(f"{file}: {found}; correct it in {file.name}") from error
    except Emu3Error as error:
        raise Emu3Error(f"{file}: {error}") from error


# ------------------------------------------------------------------------------------------------ checks


def check_field(config: Any, field: str, ok: Any, legal: str) -> None:
    """Raises a `FieldError` that names the config's class, the field, its value and what is `legal`, unless `ok`."""
    if not ok:
        raise FieldError(type(config).__name__, field, getattr(config, field), legal)


def check_positive_whole(config: Any, *fields: str) -> None:
    """Raises a `FieldError` unless each of the fields is an int > 0."""
    for field in fields:
        check_field(config, field, is_whole(getattr(config, field), 1), "a whole number > 0")


def check_counts(config: Any, **most: int) -> None:
    """Raises a `FieldError` unless each of the named fields is an int from 1 to the number that is given for it.

    What is read from files sizes loops and arrays: an absurd count is refused before anything loops or allocates.
    """
    check_positive_whole(config, *most)
    for field, bound in most.items():
        check_field(config, field, getattr(config, field) <= bound, f"at most {bound:,}")


def check_positive_number(config: Any, *fields: str) -> None:
    """Stores each of the fields as a float; raises a `FieldError` unless it is a finite number > 0.

    JSON has ints of any size, and devices take none of more than 64 bits.
    """
    for field in fields:
        value = getattr(config, field)
        check_field(config, field, is_number(value) and value > 0, "a finite number > 0")
        object.__setattr__(config, field, float(value))


def tuple_field(
    config: Any, field: str, is_entry: Callable[[Any], bool], legal: str, *, length: int | None = None
) -> None:
    """Stores a list as a tuple; raises a `FieldError` unless every entry `is_entry`, and there are `length` of them."""
    value = getattr(config, field)
    ok = isinstance(value, list | tuple) and all(map(is_entry, value)) and length in (None, len(value))
    check_field(config, field, ok, legal)
    object.__setattr__(config, field, tuple(value))


def is_whole(value: Any, least: float) -> bool:
    """Whether `value` is an int of at least `least`; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_count(value: Any) -> bool:
    """Whether an argument is a whole number >= 1, of Python or NumPy. Fields of configs are Python's: `is_whole`."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1


def is_number(value: Any) -> bool:
    """Whether `value` is a finite int or float; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


# ------------------------------------------------------------------------------------------------ JSON objects


def from_json(cls: type[Config], data: Mapping[str, Any]) -> Config:
    """Makes `cls` of the fields in `data`; absent ones keep their defaults.

    Raises:
        Emu3Error: `data` is no object, a field is unknown, or `cls` refuses a value.
    """
    if not isinstance(data, Mapping):
        raise Emu3Error(
            f"the {cls.__name__} is {shown(data)}: it must be an object of named fields; make the file again"
        )
    unknown = sorted(set(data) - {field.name for field in dataclasses.fields(cls)})
    if unknown:
        raise Emu3Error(
            f"unknown {cls.__name__} field {shown(unknown[0])}: remove it, or make the file again with this version"
        )
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})

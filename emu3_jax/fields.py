"""Checks for the fields of frozen configs, and construction of configs from JSON objects."""

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
    """A config field holds an illegal value. `read_from` adds the file name and the remedy.

    Attributes:
        field: name of the field.
        value: the illegal value.
        legal: description of the legal values.
    """

    def __init__(self, config: str, field: str, value: Any, legal: str):
        super().__init__(f"{config} field {field} is {shown(value)}: it must be {legal}")
        self.field, self.value, self.legal = field, value, legal


@contextlib.contextmanager
def read_from(file: Path) -> Iterator[None]:
    """Adds the file's name to errors of the block, which constructs configs from the contents of `file`.

    Raises:
        Emu3Error: the block raised one. The message names the file and, for a field, says to correct it there.
    """
    try:
        yield
    except FieldError as error:
        found = f"config field {error.field} is {shown(error.value)}: it must be {error.legal}"
        raise Emu3Error(f"{file}: {found}; correct it in {file.name}") from error
    except Emu3Error as error:
        raise Emu3Error(f"{file}: {error}") from error


# ------------------------------------------------------------------------------------------------ checks


def check_field(config: Any, field: str, ok: Any, legal: str) -> None:
    """Raises a `FieldError` unless `ok`. The error names the config's class, the field, its value and what is `legal`.

    Args:
        config: the config under construction.
        field: name of the field.
        ok: whether the value is legal.
        legal: description of the legal values; follows the words "it must be".
    """
    if not ok:
        raise FieldError(type(config).__name__, field, getattr(config, field), legal)


def check_positive_whole(config: Any, *fields: str) -> None:
    """Raises a `FieldError` unless every named field is an int > 0."""
    for field in fields:
        check_field(config, field, is_whole(getattr(config, field), 1), "a whole number > 0")


def check_counts(config: Any, **most: int) -> None:
    """Raises a `FieldError` unless every named field is an int from 1 to its maximum, as in `num_layers=1024`.

    These values come from files and determine loop lengths and array sizes. So absurd values are refused here, before
    anything is allocated.
    """
    check_positive_whole(config, *most)
    for field, bound in most.items():
        check_field(config, field, getattr(config, field) <= bound, f"at most {bound:,}")


def check_positive_number(config: Any, *fields: str) -> None:
    """Converts the fields to float; raises a `FieldError` unless every one is a finite number > 0.

    The conversion matters because JSON ints have any size, while devices accept at most 64 bits.
    """
    for field in fields:
        value = getattr(config, field)
        check_field(config, field, is_number(value) and value > 0, "a finite number > 0")
        object.__setattr__(config, field, float(value))


def tuple_field(
    config: Any, field: str, is_entry: Callable[[Any], bool], legal: str, *, length: int | None = None
) -> None:
    """Converts a list field to a tuple, and checks its entries.

    Args:
        config: the config under construction.
        field: name of the field.
        is_entry: returns whether an entry is legal.
        legal: description of the legal values.
        length: required number of entries; None allows any number.

    Raises:
        FieldError: the field is not a list or tuple, its length differs, or an entry is illegal.
    """
    value = getattr(config, field)
    ok = isinstance(value, list | tuple) and all(map(is_entry, value)) and length in (None, len(value))
    check_field(config, field, ok, legal)
    object.__setattr__(config, field, tuple(value))


def is_whole(value: Any, least: float) -> bool:
    """Whether `value` is an int >= `least`. Bools do not count as ints."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_count(value: Any) -> bool:
    """Whether an argument is a Python or NumPy integer >= 1. For config fields, use `is_whole`: it refuses NumPy's."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1


def is_number(value: Any) -> bool:
    """Whether `value` is a finite int or float. Bools do not count."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


# ------------------------------------------------------------------------------------------------ JSON objects


def from_json(cls: type[Config], data: Mapping[str, Any]) -> Config:
    """Constructs `cls` from the fields in `data`. Absent fields keep their defaults, and lists become tuples.

    Raises:
        Emu3Error: `data` is not a JSON object, a field is unknown, or `cls` refuses a value.
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

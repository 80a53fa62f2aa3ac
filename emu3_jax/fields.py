"""How frozen configs check their fields when they are made."""

import math
from typing import Any

from emu3_jax.errors import Emu3Error


def check_field(config: Any, field: str, ok: Any, legal: str) -> None:
    """Raises an `Emu3Error` that names the config's class, the field, its value and what is `legal`, unless `ok`."""
    if not ok:
        raise Emu3Error(f"{type(config).__name__} field {field} is {getattr(config, field)!r}: it must be {legal}")


def is_whole(value: Any, least: float) -> bool:
    """Whether `value` is an int of at least `least`; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    """Whether `value` is a finite int or float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

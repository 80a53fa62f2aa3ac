"""What callers say of rows: one value for all or one for each, checked, as the decode loop wants it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from emu3_jax.errors import Emu3Error
from emu3_jax.generation.sampling import RowSettings


def prompt_list(prompts: str | Sequence[str]) -> list[str]:
    """One or several prompts as a list. Raises `Emu3Error` if there is none."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise Emu3Error("there is no prompt: give at least one")
    return prompts


def per_row(name: str, value: Any, count: int) -> list[Any]:
    """One value per row from a single value or a sequence. Raises `Emu3Error` if it has another length."""
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
        return [value] * count
    if len(value) != count:
        raise Emu3Error(f"{name} has {len(value)} values for {count} rows: give one for all, or one for each")
    return list(value)


def row_settings(count: int, temperature, top_k, top_p, guidance, seed) -> RowSettings:
    """Settings, one per row; a single seed counts up. Raises `Emu3Error` on a value that is not legal."""
    if not isinstance(seed, Sequence | np.ndarray):
        seed = [seed + index for index in range(count)]
    limits = {
        "temperature": (temperature, np.float32, lambda v: 0 <= v < np.inf, "a number >= 0"),
        "top_k": (top_k, np.int32, lambda v: 1 <= v < 2**31 and v == int(v), "a whole number >= 1"),
        "top_p": (top_p, np.float32, lambda v: 0 < v <= 1, "above 0 and at most 1"),
        "guidance": (guidance, np.float32, lambda v: 0 <= v < np.inf, "a number >= 0"),
        "seed": (seed, np.uint32, lambda v: 0 <= v < 2**32 and v == int(v), "a whole number from 0 to 2**32 - 1"),
    }
    columns = {}
    for name, (value, dtype, legal, words) in limits.items():
        values = per_row(name, value, count)
        for found in values:
            if not (isinstance(found, int | float | np.number) and legal(found)):
                raise Emu3Error(f"{name} is {found!r}: it must be {words}")
        columns[name] = np.asarray(values, dtype)
    return RowSettings(**columns)


def describe(settings: RowSettings, index: int) -> dict[str, str]:
    """How a row was sampled, for the picture's text fields."""
    return {
        name.replace("_", "-"): f"{getattr(settings, name)[index]:g}"
        if name != "seed"
        else str(int(settings.seed[index]))
        for name in ("seed", "guidance", "temperature", "top_k", "top_p")
    }

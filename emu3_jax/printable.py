"""Makes foreign text safe for a terminal: escapes control characters and limits the length."""

import re
import reprlib
from typing import Any

LINE = 300  # maximum characters in an error line
_SHOWN = 80  # maximum characters of a value in an error line
_SHORTEST = 40  # a long word is shortened to no fewer characters
_CUT = "..."


class _Repr(reprlib.Repr):
    """A `repr` that reads only the part of a value that it shows, so huge values cost little."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = _SHOWN
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple = 3, 4, 4, 4

    def repr_int(self, x: int, level: int) -> str:
        # Python raises ValueError for numbers of more than 4,300 digits, because converting them is slow.
        return repr(x) if x.bit_length() <= 4096 else f"a number of {x.bit_length()} bits"

    def repr_str(self, x: str, level: int) -> str:
        return super().repr_str(x[: 4 * _SHOWN], level) if len(x) > 4 * _SHOWN else super().repr_str(x, level)


_REPR = _Repr()


def shown(value: Any) -> str:
    """Returns `repr(value)` for an error line: printable, and at most 80 characters long."""
    return _cut(printable(_REPR.repr(value)), _SHOWN)


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun, in the plural unless the number is 1: `1 shard`, `2 shards`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def printable(text: str, keep: str = "") -> str:
    r"""Escapes control characters and characters that UTF-8 cannot encode, for example as `\x1b`.

    Args:
        text: any string.
        keep: characters that are not escaped, for example a line end in an answer.

    Returns:
        The text, which a terminal can print without side effects.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape", "backslashreplace").decode() for c in text
    )


def one_line(message: str) -> str:
    """Turns an error message into one printable line of at most 300 characters.

    In a longer message, the longest words lose their middle first. They are mostly paths and quoted values, and the
    two ends of a path say most.
    """
    message = message if len(message) <= 100 * LINE else message[: 50 * LINE] + _CUT + message[-50 * LINE :]
    line = printable(" ".join(message.split()))
    while len(line) > LINE:
        longest = max(re.findall(r"\S+", line), key=len)
        if len(longest) <= _SHORTEST:
            return _cut(line, LINE)
        line = line.replace(longest, _cut(longest, max(_SHORTEST, len(longest) - (len(line) - LINE))), 1)
    return line


def _cut(text: str, length: int) -> str:
    """Replaces the middle of `text` by `...` if it has more than `length` characters."""
    if len(text) <= length:
        return text
    head = (length - len(_CUT)) // 2
    return text[:head] + _CUT + text[len(text) - (length - len(_CUT) - head) :]

"""Text from elsewhere, made fit for a terminal: control characters escaped, and never more than a line of it."""

import re
import reprlib
from typing import Any

LINE = 300  # characters of an error line
_SHOWN = 80  # characters of a value in an error line
_SHORTEST = 40  # characters that stay of a word in a line that is too long
_CUT = "..."


class _Repr(reprlib.Repr):
    """`repr` that looks at no more of a value than it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = _SHOWN
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple = 3, 4, 4, 4

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to make more than 4,300 digits of a number, which may take long.
        return repr(x) if x.bit_length() <= 4096 else f"a number of {x.bit_length()} bits"

    def repr_str(self, x: str, level: int) -> str:
        return super().repr_str(x[: 4 * _SHOWN], level) if len(x) > 4 * _SHOWN else super().repr_str(x, level)


_REPR = _Repr()


def shown(value: Any) -> str:
    """`repr(value)` for an error line: at most 80 characters, whatever the value, and all of them printable."""
    return _cut(printable(_REPR.repr(value)), _SHOWN)


def printable(text: str, keep: str = "") -> str:
    """`text` with everything escaped that moves a terminal's cursor, or that UTF-8 has no bytes for.

    Args:
        text: from anywhere.
        keep: characters that stay as they are, for example a line end in an answer.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape", "backslashreplace").decode() for c in text
    )


def one_line(message: str) -> str:
    """An error message as one printable line of at most 300 characters.

    Long words, which are paths and what a file says, lose their middle first: both ends of a path tell most.
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
    """`text` without its middle where it is longer."""
    if len(text) <= length:
        return text
    head = (length - len(_CUT)) // 2
    return text[:head] + _CUT + text[len(text) - (length - len(_CUT) - head) :]

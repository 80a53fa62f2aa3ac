"""Standard output and standard error, whatever they are: closed, full, or in an encoding that lacks characters."""

import contextlib
import json
import os
import sys
import typing
from collections.abc import Iterator


class OutputError(Exception):
    """Standard output cannot be written. No `OSError`, so that nothing takes it for an error of another file."""

    def __init__(self, error: OSError):
        super().__init__(str(error))
        self.error = error


class _Stream:
    """A text stream whose errors are told apart from those of other files.

    Args:
        stream: what is written to.
        silent: errors are dropped; else they are `OutputError`.
    """

    def __init__(self, stream: typing.Any, silent: bool):
        self._stream, self._silent = stream, silent

    def __getattr__(self, name: str) -> typing.Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._errors():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._errors():
            self._stream.flush()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # Python flushes what is left once more at its end: that must not fail again.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if not self._silent:
                raise OutputError(error) from error


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Within, characters that an output's encoding lacks are escaped, and an error of standard output is `OutputError`.

    Where nobody can read standard error, nothing is said.
    """
    streams = sys.stdout, sys.stderr
    for stream in streams:
        with contextlib.suppress(AttributeError, ValueError):  # replaced by one that cannot, or closed
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = _Stream(streams[0], silent=False), _Stream(streams[1], silent=True)
    try:
        yield
    finally:
        with contextlib.suppress(OutputError):
            sys.stdout.flush()
        sys.stdout, sys.stderr = streams


def json_line(value: typing.Any) -> str:
    """`value` as a line of JSON for standard output; characters stay as they are where a terminal can show them."""
    line = json.dumps(value, ensure_ascii=False)
    try:
        line.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeError:  # what Python would write in their place is no JSON
        return json.dumps(value)
    return line if line.isprintable() else json.dumps(value)


def open_closed_streams() -> None:
    """Puts the null device in the place of standard streams that the process was started without.

    Else the first files that it opens would get their numbers, and what libraries have to say.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)  # the least number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115

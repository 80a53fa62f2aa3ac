"""Makes standard output and standard error safe if they are closed, full, or in an encoding that lacks characters."""

import contextlib
import json
import os
import sys
import typing
from collections.abc import Iterator


class OutputError(Exception):
    """Standard output cannot be written. Not an `OSError`, so that no handler takes it for an error of another file."""

    def __init__(self, error: OSError):
        super().__init__(str(error))
        self.error = error


class _Stream:
    """A text stream whose errors differ from the errors of other files.

    Args:
        stream: the stream to write to.
        silent: whether to drop errors. If false, errors become `OutputError`.
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
            # At its end, Python flushes the stream again. That must not fail a second time.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if not self._silent:
                raise OutputError(error) from error


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Within the block, an error of standard output is an `OutputError`, and errors of standard error are dropped.

    Characters that an output's encoding lacks are escaped.
    """
    streams = sys.stdout, sys.stderr
    for stream in streams:
        with contextlib.suppress(AttributeError, ValueError):  # closed, or replaced by an object without this method
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = _Stream(streams[0], silent=False), _Stream(streams[1], silent=True)
    try:
        yield
    finally:
        with contextlib.suppress(OutputError):
            sys.stdout.flush()
        sys.stdout, sys.stderr = streams


def json_line(value: typing.Any) -> str:
    """`value` as one line of JSON for standard output. If it cannot be shown, escapes all non-ASCII characters."""
    line = json.dumps(value, ensure_ascii=False)
    try:
        line.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeError:  # `guarded` would write escapes that are not JSON
        return json.dumps(value)
    return line if line.isprintable() else json.dumps(value)


def open_closed_streams() -> None:
    """Opens the null device for each standard stream that the process was started without.

    Otherwise the first files that the process opens would get the numbers 0 to 2, and libraries would print into them.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)  # gets the lowest free number
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115

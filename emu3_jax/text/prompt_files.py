"""Reads text files with one prompt per line."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from emu3_jax.errors import Emu3Error, RowError
from emu3_jax.foreign import plain_file, reading
from emu3_jax.text.tokenizer import SpecialTokenError

STANDARD_INPUT = "-"
MAX_BYTES = 16 << 20


@contextlib.contextmanager
def naming_rows(place: Callable[[int], str]) -> Iterator[None]:
    """An error of the block that is about one row names the row's place instead, which `place` gives."""
    try:
        yield
    except RowError as error:
        raise Emu3Error(f"{place(error.row)}: {error.reason}") from error
    except SpecialTokenError as error:
        if error.row is None:
            raise
        raise Emu3Error(f"{place(error.row)}: {error}") from error


@dataclasses.dataclass(frozen=True)
class PromptFile:
    """The prompts of a file.

    Attributes:
        name: how error lines call the file.
        prompts: the prompts, in the order of the file.
        lines: the number of each prompt's line, from 1.
    """

    name: str
    prompts: list[str]
    lines: list[int]

    def place(self, prompt: int) -> str:
        """The file and the line of a prompt, which is given by its index in `prompts`."""
        return f"{self.name} line {self.lines[prompt]}"

    @contextlib.contextmanager
    def naming_lines(self, n: int = 1) -> Iterator[None]:
        """An error of the block that is about one row names the line of the row's prompt instead.

        Args:
            n: rows per prompt.
        """
        with naming_rows(lambda row: self.place(row // n)):
            yield


def read_prompts(path: str | os.PathLike) -> PromptFile:
    """Reads prompts from a file, one per line. Skips blank lines, and strips blanks at both ends of a line.

    Args:
        path: the file; `-` stands for standard input.

    Raises:
        Emu3Error: the file is absent, too large or not UTF-8, or contains no prompt.
    """
    name = "standard input" if os.fspath(path) == STANDARD_INPUT else os.fspath(path)
    with reading(name, "give a text file in UTF-8"):
        data = _read(path)
        if len(data) > MAX_BYTES:
            raise Emu3Error(
                f"{name} has more than {MAX_BYTES:,} bytes of prompts: split it, and run once for each part"
            )
        prompts = {}
        # Do not use `str.splitlines`, which also splits at form feeds and other characters inside a prompt.
        for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
            if b"\0" in line:
                raise Emu3Error(f"{name} line {number} has a null character, so it is no text: correct the line")
            try:
                prompts[number] = line.decode().strip()
            except UnicodeDecodeError as error:
                raise Emu3Error(f"{name} line {number} is not UTF-8: save the file as UTF-8") from error
    prompts = {number: prompt for number, prompt in prompts.items() if prompt}
    if not prompts:
        raise Emu3Error(f"{name} has no prompt: write one prompt per line")
    return PromptFile(name, [*prompts.values()], [*prompts])


def _read(path: str | os.PathLike) -> bytes:
    if os.fspath(path) == STANDARD_INPUT:
        if sys.stdin.isatty():
            print("write one prompt per line; Ctrl-D ends the input", file=sys.stderr, flush=True)
        return sys.stdin.buffer.read(MAX_BYTES + 1)
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise Emu3Error(
            f"cannot read {os.fspath(path)}: it is a pipe or device; give a file, or pipe the prompts to standard "
            "input and give -"
        )
    plain_file(path)
    with open(Path(path), "rb") as stream:
        return stream.read(MAX_BYTES + 1)

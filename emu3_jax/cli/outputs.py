"""The files that a command writes into a user's folder. Refuses or reports the replacement of old files."""

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from emu3_jax import storage
from emu3_jax.errors import Emu3Error
from emu3_jax.files import check_directory
from emu3_jax.printable import printable

_NAMED = 10  # most replaced files that the report names


def add_no_clobber(command: argparse.ArgumentParser) -> None:
    """`--no-clobber`."""
    command.add_argument(
        "--no-clobber",
        action="store_true",
        help="write nothing if one of the output files exists already (default: replace it, and name it at the end)",
    )


class Outputs:
    """The output files of one command.

    Create the object before the work: with `no_clobber`, it raises if an output file exists. Call `look` again just
    before the files get their names, because another program may have written one meanwhile. Then call `report`.
    Between `look` and the end, `files.new_file` and `files.files_into` refuse by themselves with `replace=False`.

    Attributes:
        replaced: the files that existed when `look` was last called.

    Raises:
        Emu3Error: their directory cannot be made, or `no_clobber`, and one of the files exists.
    """

    def __init__(self, files: Iterable[Path], *, no_clobber: bool):
        """`files` are all in one directory, which may be in a bucket and may be absent."""
        self.replaced: list[Path] = []
        self._files, self._no_clobber = list(files), no_clobber
        if self._files:
            check_directory(self._files[0].parent)
        if no_clobber:
            self.look()

    def look(self) -> None:
        """Finds the files that exist. Raises the errors that the class names."""
        self.replaced = _existing(self._files)
        if self._no_clobber and self.replaced:
            first, more = self.replaced[0], len(self.replaced) - 1
            others = f" (and {more} more of the output files)" if more else ""
            raise Emu3Error(f"{first} exists already{others}: choose another output, or leave --no-clobber out")

    def report(self) -> None:
        """Names the replaced files on standard error. Call it before printing: standard output may be full."""
        if self.replaced:
            names = [printable(str(file)) for file in self.replaced[:_NAMED]]
            if len(self.replaced) > _NAMED:
                names.append(f"and {len(self.replaced) - _NAMED} more")
            print(f"emu3-jax: replaced {', '.join(names)}", file=sys.stderr)


def _existing(files: list[Path]) -> list[Path]:
    if not files or not storage.is_remote(files[0]):
        return [file for file in files if os.path.lexists(file)]
    if len(files) == 1:
        return [file for file in files if storage.exists(file)]
    there = storage.listing(files[0].parent)
    return [file for file in files if file.name in there]

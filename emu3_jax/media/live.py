"""Frames as pictures in folders while a clip is made: for eyes and programs that do not want to wait for its end."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from emu3_jax.errors import Emu3Error
from emu3_jax.files import new_file
from emu3_jax.foreign import local_path


@contextlib.contextmanager
def live_frames(directory: pathlib.Path) -> Iterator[Callable[[int, int, np.ndarray], None]]:
    """Yields a function that writes frames uint8 [n, H, W, 3] of a row, from a number on: DIR/000/0000.png, ...

    Each picture appears whole. The directory is made at once; if the block fails, what was written stays, and an empty
    directory goes.

    Raises:
        Emu3Error: there is something in `directory`, which old frames would be, or it cannot be written.
    """
    directory = local_path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise Emu3Error(f"{directory} is not empty: choose another directory for live frames, or empty it")
    except OSError as error:
        raise Emu3Error(f"cannot write {directory}: {error.strerror}; choose another directory") from error

    def write(row: int, first: int, frames: np.ndarray) -> None:
        folder = directory / f"{row:03d}"
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise Emu3Error(f"cannot write {folder}: {error.strerror}; choose another directory") from error
        for number, frame in enumerate(frames, first):
            with new_file(folder / f"{number:04d}.png") as temporary:
                Image.fromarray(frame).save(temporary)

    try:
        yield write
    except BaseException:
        with contextlib.suppress(OSError):  # there are frames
            directory.rmdir()
        raise

"""Writes the frames of a clip to PNG files while the clip is still being generated."""

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
    """Yields a function `write(row, first, frames)` that writes frames as DIR/000/0000.png and so on.

    `row` is the number of the clip, `first` the number of the first frame, and `frames` a uint8 array [n, H, W, 3].
    Files are complete when they appear. If the block fails, written frames stay, and an empty directory is removed.

    Args:
        directory: is made at once. It must be empty, so that no frames of an earlier run mix with the new ones.

    Raises:
        Emu3Error: `directory` is not empty, or cannot be written.
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
        with contextlib.suppress(OSError):  # fails if the directory holds frames, which stay
            directory.rmdir()
        raise

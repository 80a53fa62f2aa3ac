"""A decoded frame as players show it: on white where it is transparent, with square pixels, turned and mirrored."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from emu3_jax.errors import Emu3Error
from emu3_jax.media.images import on_white

_WIDEST_PIXEL = 10  # wide screens of DVDs have 1.42


def picture_maker(path: Path, stream: Any, most_pixels: int) -> Callable[[Any], np.ndarray]:
    """A function that makes uint8 [H, W, 3] of PyAV's frames of `stream`.

    Raises:
        Emu3Error: the function does, for frames of more than `most_pixels` pixels, or of absurd pixels.
    """
    aspect = stream.sample_aspect_ratio  # of a pixel, width to height; None or 0 where the file does not tell
    aspect = float(aspect) if aspect else 1.0
    if not 1 / _WIDEST_PIXEL <= aspect <= _WIDEST_PIXEL:
        raise Emu3Error(f"{path} has pixels {aspect:.3g} times as wide as high: convert it to square ones")

    def picture(frame: Any) -> np.ndarray:
        width, height = frame.width, frame.height
        # The side that is too short grows, as in players: no rows or columns are lost.
        width, height = (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))
        if width * height > most_pixels:
            raise Emu3Error(
                f"{path} has frames of {width}x{height} pixels, and at most {most_pixels:,} are read: scale it down"
            )
        shown = _rgb(frame)
        if shown.shape[:2] != (height, width):
            shown = np.asarray(Image.fromarray(shown).resize((width, height), Image.Resampling.BICUBIC))
        return _upright(shown, _display_matrix(frame))

    return picture


def _rgb(frame: Any) -> np.ndarray:
    if not (frame.format.has_palette or any(component.is_alpha for component in frame.format.components)):
        return frame.to_ndarray(format="rgb24")
    return np.asarray(on_white(Image.fromarray(frame.to_ndarray(format="rgba"))))


def _display_matrix(frame: Any) -> np.ndarray | None:
    """How the file wants a frame to be turned and mirrored: int32 [9], or None."""
    from av.sidedata.sidedata import Type

    found = frame.side_data.get(Type.DISPLAYMATRIX)
    return None if found is None else np.frombuffer(bytes(found), np.int32)


def _upright(picture: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    """The picture after the nearest quarter turn, and mirrored where the matrix mirrors.

    A pixel at (x, y) is shown at (a x + c y, b x + d y), where y points down, by the matrix [a, b, ., c, d, ...].
    """
    if matrix is None or len(matrix) != 9:
        return picture
    a, b, _, c, d = (int(entry) for entry in matrix[:5])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        across, down = a, d
    else:
        picture, across, down = picture.swapaxes(0, 1), c, b
    return picture[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]

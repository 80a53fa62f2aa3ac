"""Converts decoded frames to what players show: white background, square pixels, rotated and mirrored as stated."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from emu3_jax.errors import Emu3Error
from emu3_jax.media.images import on_white

_WIDEST_PIXEL = 10  # largest accepted aspect ratio of a pixel; widescreen DVDs have 1.42


def picture_maker(path: Path, stream: Any, most_pixels: int) -> Callable[[Any], np.ndarray]:
    """Makes a function that converts PyAV's frames of `stream` to uint8 [H, W, 3].

    Args:
        path: the file, for errors.
        stream: PyAV's stream.
        most_pixels: the function raises an `Emu3Error` for larger frames.

    Raises:
        Emu3Error: the file states an absurd aspect ratio of its pixels.
    """
    aspect = stream.sample_aspect_ratio  # width to height of a pixel; None or 0 if the file does not state it
    aspect = float(aspect) if aspect else 1.0
    if not 1 / _WIDEST_PIXEL <= aspect <= _WIDEST_PIXEL:
        raise Emu3Error(f"{path} has pixels {aspect:.3g} times as wide as high: convert it to square pixels")

    def picture(frame: Any) -> np.ndarray:
        width, height = frame.width, frame.height
        # Enlarge the side that is too short, as players do, so that no rows or columns are lost.
        width, height = (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))
        if width * height > most_pixels:
            raise Emu3Error(
                f"{path} has frames of {width}x{height} pixels; the limit is {most_pixels:,}: scale it down"
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
    """The file's display matrix for a frame, which rotates and mirrors it: int32 [9]; None if there is none."""
    from av.sidedata.sidedata import Type

    found = frame.side_data.get(Type.DISPLAYMATRIX)
    return None if found is None else np.frombuffer(bytes(found), np.int32)


def _upright(picture: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    """Rotates a picture by the nearest quarter turn and mirrors it, as the display matrix says.

    The matrix [a, b, ., c, d, ...] shows a pixel at (x, y) at (a x + c y, b x + d y). y points down.
    """
    if matrix is None or len(matrix) != 9:
        return picture
    a, b, _, c, d = (int(entry) for entry in matrix[:5])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        across, down = a, d
    else:
        picture, across, down = picture.swapaxes(0, 1), c, b
    return picture[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]

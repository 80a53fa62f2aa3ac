"""What callers may hand over as a picture or a clip."""

import os
import pathlib

import numpy as np
from PIL import Image

from emu3_jax.errors import Emu3Error
from emu3_jax.media.clips import Clip, load_clip, resample
from emu3_jax.media.frames import FrameReader, check_resampling, is_animated, open_clip
from emu3_jax.media.images import load_image, to_rgb

Media = str | os.PathLike | Image.Image | np.ndarray | Clip


def as_media(item: Media) -> Image.Image | Clip:
    """An RGB picture or a clip.

    Args:
        item: a file (an animated one, or a folder of frames, is a clip), a PIL image, a uint8 array [H, W, 3] or
            [T, H, W, 3], or a `Clip`.

    Raises:
        Emu3Error: if the file cannot be read, or the array is of another kind.
    """
    if isinstance(item, Clip):
        return item
    if isinstance(item, Image.Image):
        return to_rgb(item)
    if isinstance(item, np.ndarray):
        if item.dtype != np.uint8 or item.ndim not in (3, 4) or item.shape[-1] != 3:
            raise Emu3Error(f"array of {item.dtype} {item.shape}: give uint8 [H, W, 3] or [T, H, W, 3]")
        return Image.fromarray(item) if item.ndim == 3 else Clip(item)
    path = pathlib.Path(item)
    return load_clip(path) if is_animated(path) else load_image(path)


def open_media(item: Media, *, fps: float | None = None, frames: int | None = None) -> Image.Image | FrameReader:
    """An RGB picture, or a clip to be read frame by frame: a file is never whole in memory.

    Args:
        item: as for `as_media`.
        fps: a clip is resampled to this rate; see `clips.resample`, also for:
        frames: the number of a clip's frames. Neither means anything to a picture.

    Raises:
        Emu3Error: as `as_media`, or a rate or number that is not legal.
    """
    check_resampling(fps, frames)
    if isinstance(item, str | os.PathLike) and is_animated(item):
        return open_clip(item, fps=fps, frames=frames)
    media = as_media(item)
    if not isinstance(media, Clip):
        return media
    clip = resample(media, fps, frames)
    return FrameReader(clip.fps, len(clip.frames), lambda: iter(clip.frames))

"""Converts all accepted kinds of pictures and clips (files, PIL images, arrays, clips) to one form."""

import os
import pathlib

import numpy as np
from PIL import Image

from emu3_jax.errors import Emu3Error
from emu3_jax.media.clips import Clip, load_clip, resample
from emu3_jax.media.frames import FrameReader, check_resampling, is_animated, open_clip
from emu3_jax.media.images import load_image, to_rgb
from emu3_jax.printable import shown

Media = str | os.PathLike | Image.Image | np.ndarray | Clip


def as_media(item: Media) -> Image.Image | Clip:
    """Loads a picture or a clip.

    Args:
        item: a path, a PIL image, a uint8 array [H, W, 3] (a picture) or [T, H, W, 3] (a clip), or a `Clip`. A path to
            a video, an animated file or a folder of frames gives a clip, any other file a picture.

    Returns:
        A picture in RGB, or a clip.

    Raises:
        Emu3Error: the file cannot be read, the array has another shape or dtype, or the item is none of these.
    """
    if isinstance(item, Clip):
        return item
    if isinstance(item, Image.Image):
        return to_rgb(item)
    if isinstance(item, np.ndarray):
        if item.dtype != np.uint8 or item.ndim not in (3, 4) or item.shape[-1] != 3:
            raise Emu3Error(f"array of {item.dtype} {item.shape}: give uint8 [H, W, 3] or [T, H, W, 3]")
        return Image.fromarray(item) if item.ndim == 3 else Clip(item)
    path = pathlib.Path(_checked(item))
    return load_clip(path) if is_animated(path) else load_image(path)


def _checked(item: object) -> str | os.PathLike:
    """Returns a path. Raises `Emu3Error` for anything else."""
    if not isinstance(item, str | os.PathLike) or not isinstance(os.fspath(item), str):
        raise Emu3Error(f"{shown(item)} is no picture or clip: give a path, a PIL image, a uint8 array or a Clip")
    return item


def open_media(item: Media, *, fps: float | None = None, frames: int | None = None) -> Image.Image | FrameReader:
    """Opens a picture or a clip. A clip from a file is read frame by frame, so it never occupies memory as a whole.

    Args:
        item: as for `as_media`.
        fps: frames per second to which a clip is resampled; see `clips.resample`. Ignored for pictures.
        frames: number of frames of a clip; see `clips.resample`. Ignored for pictures.

    Returns:
        A picture in RGB, or a reader of a clip's frames.

    Raises:
        Emu3Error: as `as_media`; or `fps` or `frames` is not legal.
    """
    check_resampling(fps, frames)
    if isinstance(item, str | os.PathLike) and is_animated(item):
        return open_clip(item, fps=fps, frames=frames)
    media = as_media(item)
    if not isinstance(media, Clip):
        return media
    clip = resample(media, fps, frames)
    return FrameReader(clip.fps, len(clip.frames), lambda: iter(clip.frames))

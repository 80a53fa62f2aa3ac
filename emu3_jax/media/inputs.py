"""What callers may hand over as a picture or a clip."""

import os
import pathlib

import numpy as np
from PIL import Image

from emu3_jax.errors import Emu3Error
from emu3_jax.media.clips import Clip, is_animated, load_clip
from emu3_jax.media.images import load_image, to_rgb

Media = str | os.PathLike | Image.Image | np.ndarray | Clip


def as_clip(item: Media) -> Clip:
    """A clip; of a picture, one of a single frame. Raises as `as_media`."""
    media = as_media(item)
    return media if isinstance(media, Clip) else Clip(np.asarray(media)[None])


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
    return load_clip(path) if path.is_dir() or is_animated(path) else load_image(path)

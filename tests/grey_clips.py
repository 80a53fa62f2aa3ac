"""Clips of grey frames with a red corner, and files that Pillow writes of them."""

import numpy as np
from PIL import Image

GREYS = (10, 60, 110, 160)


def grey_frames(levels=GREYS, height=16, width=24):
    frames = np.zeros((len(levels), height, width, 3), np.uint8)
    frames[:] = np.array(levels, np.uint8)[:, None, None, None]
    frames[:, :4, :4] = (200, 0, 0)
    return frames


def save_frames(path, frames, **options):
    first, *rest = (f if isinstance(f, Image.Image) else Image.fromarray(f) for f in frames)
    first.save(path, save_all=True, append_images=rest, **options)
    return path

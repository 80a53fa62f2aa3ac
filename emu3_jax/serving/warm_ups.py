"""Programs that jobs need beside those of the pools: each function compiles some of them by using them."""

import numpy as np

from emu3_jax.generation import defaults
from emu3_jax.generation.clips import GrowingClip
from emu3_jax.generation.codec import Vision, decode_picture
from emu3_jax.generation.schedule import TokenClass


def decode_zeros(vision: Vision, size: tuple[int, int]) -> None:
    """Decodes a picture of `size` (rows, columns) codes."""
    decode_picture(vision, np.zeros(size, np.int32))


def decode_clip_of_zeros(vision: Vision, size: tuple[int, int]) -> None:
    """Decodes a clip of the default length, whose frames have `size` (rows, columns) codes each."""
    config = vision.clips()
    height, width = (side * config.spatial_factor for side in size)
    latents = -(-defaults.FRAMES // config.temporal_factor)
    clip = GrowingClip(vision, 0, np.zeros((0, height, width, 3), np.uint8), defaults.FRAMES)
    codes = np.zeros(latents * size[0] * size[1], np.int32)
    clip.begin(None, np.full(len(codes), TokenClass.VISUAL, np.int8))
    clip.take(codes)

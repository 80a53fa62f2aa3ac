"""Pictures and clips to codes and back: what happens around the vision tokenizer's programs."""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from emu3_jax.config import ImageConfig, VisionConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.media.clips import Clip, preprocess_clip
from emu3_jax.media.images import normalise, postprocess, preprocess
from emu3_jax.media.inputs import Media, as_media
from emu3_jax.models.vision import Stream, check_codes, make_decoder, make_encoder

PART_FRAMES = 16  # of a clip that pass the tokenizer together


@dataclasses.dataclass(frozen=True)
class Vision:
    """The vision tokenizer in memory; several models may hold the same one. `fast`: see `make_decoder`."""

    config: VisionConfig
    image: ImageConfig
    params: Any
    fast: bool = False


def encode(vision: Vision, item: Media, independent: bool = False) -> np.ndarray:
    """int32 codes [h, w] of a picture, [t, h, w] of a clip; see `Emu3.tokenize`."""
    media = as_media(item)
    try:
        if isinstance(media, Clip):

            def prepare(frames: np.ndarray) -> np.ndarray:
                return preprocess_clip(Clip(frames), vision.image, vision.config.spatial_factor)

            return _encode_frames(vision, media.frames, prepare, independent)
        pixels = preprocess(media, vision.image, vision.config.spatial_factor)
    except Emu3Error as error:
        if isinstance(item, str | os.PathLike):
            raise Emu3Error(f"{item}: {error}") from error
        raise
    return np.asarray(make_encoder(vision.config)(vision.params, pixels[None]))[0]


def encode_end(vision: Vision, frames: np.ndarray, count: int) -> np.ndarray:
    """Codes [count, h, w] of the end of frames (uint8 [T, H, W, 3], not resized), as a clip that begins there.

    Too few frames begin with repetitions of the first.
    """
    wanted = count * vision.config.temporal_factor
    frames = frames[-wanted:]
    frames = np.concatenate([np.repeat(frames[:1], wanted - len(frames), axis=0), frames])
    return _encode_frames(vision, frames, lambda part: normalise(part, vision.image))


def _encode_frames(
    vision: Vision, frames: np.ndarray, prepare: Callable[[np.ndarray], np.ndarray], independent: bool = False
) -> np.ndarray:
    """`prepare` makes pixels for the tokenizer of a part of the frames."""
    config = vision.config
    size = config.temporal_factor if independent else max(PART_FRAMES, config.temporal_factor)
    step = functools.partial(make_encoder(config), vision.params)
    if len(frames) > size and not independent:
        step = Stream(config, vision.params, "encode")
    codes = []
    for first in range(0, len(frames), size):
        part = frames[first : first + size]
        part = np.concatenate([part, np.repeat(part[-1:], -len(part) % config.temporal_factor, axis=0)])
        codes.append(np.asarray(step(prepare(part)[None]))[0])
    return np.concatenate(codes)


def decode(vision: Vision, codes: np.ndarray, independent: bool = False) -> Image.Image | Clip:
    """The picture of codes [h, w], or the clip of [t, h, w]; see `Emu3.detokenize`."""
    check_codes(codes, vision.config)
    codes, config = codes.astype(np.int32), vision.config
    step = functools.partial(make_decoder(config, vision.fast), vision.params)
    if codes.ndim == 2:
        return Image.fromarray(postprocess(np.asarray(step(codes[None]))[0], vision.image))
    size = 1 if independent else max(PART_FRAMES // config.temporal_factor, 1)
    if len(codes) > size and not independent:
        step = Stream(config, vision.params, "decode", vision.fast)
    parts = [np.asarray(step(codes[None, first : first + size]))[0] for first in range(0, len(codes), size)]
    return Clip(np.concatenate([postprocess(part, vision.image) for part in parts]))

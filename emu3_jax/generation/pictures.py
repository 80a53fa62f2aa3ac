"""Pictures from prompts: codes by the decoder, pixels by the vision tokenizer."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from emu3_jax.generation.codec import Vision, decode_picture
from emu3_jax.generation.language import Batching, Grid, Language, generate_grids
from emu3_jax.generation.rows import Sampling, describe, per_row, prompt_list
from emu3_jax.media.sizes import generate_size


@dataclasses.dataclass(frozen=True)
class Generation:
    """One generated picture.

    Attributes:
        ids: int32 [prompt + generated], from BOS to EOS.
        prompt_length: how many of `ids` are the prompt.
        codes: int32 [h, w], the picture's codes.
        image: the picture; `image.info` says how it was made.
    """

    ids: np.ndarray
    prompt_length: int
    codes: np.ndarray
    image: Image.Image


def generate_pictures(
    language: Language,
    vision: Vision,
    prompts: str | Sequence[str],
    sampling: Sampling,
    *,
    ratio: str | Sequence[str],
    area: int | None,
    negative: str | Sequence[str],
    batching: Batching,
    allow_special: bool,
    name: str,
) -> list[Generation]:
    """See `Emu3.generate_sequences`; `name` is what the pictures say of the model."""
    prompts = prompt_list(prompts)
    area = language.config.image_area if area is None else area
    ratios = per_row("ratio", ratio, len(prompts))
    sizes = [generate_size(r, area, vision.config.spatial_factor) for r in ratios]
    negatives = per_row("negative", negative, len(prompts))
    settings = sampling.settings(len(prompts))
    grids = [Grid(*row) for row in zip(prompts, negatives, sizes, strict=True)]
    made = generate_grids(language, grids, settings, batching=batching, allow_special=allow_special)
    results = []
    for index, grid in enumerate(made):
        image = decode_picture(vision, grid.codes)
        about: dict[Any, Any] = {
            "prompt": prompts[index],
            "negative": negatives[index],
            "size": f"{image.width}x{image.height}",
        }
        about |= {"ratio": ratios[index], **describe(settings, index), "model": name, "software": "emu3-jax"}
        image.info = about
        results.append(Generation(grid.ids, grid.prompt_length, grid.codes, image))
    return results

"""Generates pictures from prompts: the decoder generates codes, the vision tokenizer decodes them to pixels."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from emu3_jax.errors import Emu3Error
from emu3_jax.fields import is_count
from emu3_jax.generation import defaults
from emu3_jax.generation.codec import Vision, decode_picture
from emu3_jax.generation.language import Batching, Grid, Language, stream_grids
from emu3_jax.generation.rows import Sampling, describe, prompt_list, repeat, texts_per_row
from emu3_jax.media.sizes import generate_size
from emu3_jax.printable import shown


@dataclasses.dataclass(frozen=True)
class Generation:
    """One generated picture.

    Attributes:
        ids: int32 [prompt + generated], from BOS to EOS.
        prompt_length: number of `ids` that belong to the prompt.
        codes: int32 [h, w], codes of the picture.
        image: the picture. `image.info` holds the prompt, the seed and all settings.
    """

    ids: np.ndarray
    prompt_length: int
    codes: np.ndarray
    image: Image.Image


def stream_pictures(
    language: Language,
    vision: Vision,
    prompts: str | Sequence[str],
    sampling: Sampling,
    *,
    n: int,
    ratio: str | Sequence[str],
    area: int | None,
    negative: str | Sequence[str],
    batching: Batching,
    allow_special: bool,
    name: str,
) -> Iterator[tuple[int, Generation]]:
    """See `Emu3.stream_sequences`. `name` is the model's name in the pictures' metadata."""
    prompts = prompt_list(prompts)
    count = len(prompts)
    if not is_count(n) or n * count > defaults.MAX_PICTURES:
        most = f"{defaults.MAX_PICTURES:,} pictures at most"
        raise Emu3Error(f"n is {shown(n)}: it must be a whole number >= 1, for {most}")
    area = language.config.image_area if area is None else area
    ratios = texts_per_row("ratio", ratio, count)
    sizes = [generate_size(r, area, vision.config.spatial_factor) for r in ratios]
    negatives = texts_per_row("negative", negative, count)
    settings = sampling.settings(count, n)
    grids = repeat([Grid(*row) for row in zip(prompts, negatives, sizes, strict=True)], n)
    for row, grid in stream_grids(language, grids, settings, batching=batching, allow_special=allow_special):
        image = decode_picture(vision, grid.codes)
        drawn = describe(settings, row) | {"passes": str(grid.passes)}
        if batching.zipar is not None:
            drawn["zipar"] = str(batching.zipar)
        image.info = metadata(image, grids[row], ratios[row // n], drawn, name)
        yield row, Generation(grid.ids, grid.prompt_length, grid.codes, image)


def metadata(image: Image.Image, grid: Grid, ratio: str, drawn: Mapping[str, str], name: str) -> dict[Any, Any]:
    """What a generated picture says of itself in `info`.

    Args:
        image: the picture.
        grid: its request.
        ratio: its ratio, as it was asked for.
        drawn: settings of sampling and number of passes, as texts.
        name: the model's name.
    """
    size = f"{image.width}x{image.height}"
    about = {"prompt": grid.prompt, "negative": grid.negative, "size": size, "ratio": ratio}
    return {**about, **drawn, "model": name, "software": "emu3-jax"}

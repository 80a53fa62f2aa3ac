"""`POST /v1/images/edits`: pictures from pictures and a text, by models that were trained on documents."""

import dataclasses
from typing import Any

from PIL import Image

from emu3_jax.generation import defaults
from emu3_jax.printable import shown
from emu3_jax.serving.fields import Fields, check_model
from emu3_jax.serving.jobs import DocumentJob
from emu3_jax.serving.limits import Limits
from emu3_jax.serving.pictures_api import PictureRequest, read_output, read_ratio, read_sampling
from emu3_jax.serving.pixels import read_picture, read_upload
from emu3_jax.serving.refusals import bad


def read_request(fields: Fields, limits: Limits, model: str, client: str) -> PictureRequest:
    """Reads the fields, and decodes the pictures.

    Args:
        fields: the fields. Pictures are files of a form, or data URLs in JSON.
        limits: limits of requests.
        model: name of the model.
        client: who asks.

    Raises:
        Refused: a field is wrong or unknown, or a picture cannot be read.
    """
    check_model(fields, model)
    n = fields.whole("n", 1, 1, limits.n)
    settings, seeds = read_sampling(fields, n, defaults.TEMPERATURE)
    sized = fields.raw("ratio") is not None or fields.raw("size") not in (None, "auto")
    job = DocumentJob(
        prompt=fields.filled("prompt"),
        guidance=fields.number("guidance_scale", defaults.GUIDANCE),
        text_temperature=fields.number("text_temperature", defaults.TEMPERATURE),
        ratio=read_ratio(fields) if sized else None,
        pictures=tuple(_pictures(fields, limits)),
        most_pictures=1,
        client=client,
        **settings,
    )
    output = read_output(fields, limits)
    fields.only(mask=(), input_fidelity=("high", "low"))
    fields.close()
    return PictureRequest(jobs=tuple(dataclasses.replace(job, seed=seed) for seed in seeds), **output)


def _pictures(fields: Fields, limits: Limits) -> list[Image.Image]:
    given: Any = fields.raw("image")
    items = given if isinstance(given, list) else [given]
    if given is None or not items:
        raise bad("image", "image is missing: give a picture to edit", "missing_field")
    if len(items) > limits.pictures:
        raise bad("image", f"there are {len(items)} pictures; the limit is {limits.pictures}: send fewer", "too_large")
    for item in items:
        if not isinstance(item, str | bytes):
            raise bad("image", f"image is {shown(item)}: it must be a file of a form, or a data URL in JSON")
    pictures: list[Image.Image] = []
    for item in items:
        left = limits.picture_pixels - sum(picture.width * picture.height for picture in pictures)
        read: Any = read_upload if isinstance(item, bytes) else read_picture
        pictures.append(read(item, "image", dataclasses.replace(limits, picture_pixels=left)))
    return pictures

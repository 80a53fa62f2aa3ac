"""Pictures in requests and answers: data URLs in, PNG, JPEG and WebP out."""

import base64
import binascii
import io
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from emu3_jax.errors import Emu3Error
from emu3_jax.media.images import open_picture, to_rgb
from emu3_jax.printable import shown
from emu3_jax.serving.limits import Limits
from emu3_jax.serving.refusals import bad, refusing

FORMATS = ("png", "jpeg", "webp")
_DATA = re.compile(r"data:image/[a-zA-Z0-9.+-]{1,40};base64,")
_GREY = 118  # of rows that are not there yet


def read_picture(url: Any, name: str, limits: Limits) -> Image.Image:
    """Reads the picture of a data URL. Its pixels are counted before it is decoded.

    Raises:
        Refused: it is no data URL, no picture, damaged, or too large.
    """
    if not isinstance(url, str):
        raise bad(name, f"{name} is {shown(url)}: it must be a data URL, such as data:image/png;base64,...")
    start = _DATA.match(url)
    if start is None:
        raise bad(name, f"{name} is {shown(url)}: this server fetches nothing; send data:image/png;base64,...")
    try:
        data = base64.b64decode(url[start.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad(name, f"{name} is not base64: encode the picture's bytes in base64") from error
    return read_upload(data, name, limits)


def read_upload(data: bytes, name: str, limits: Limits) -> Image.Image:
    """Reads the picture of a file. Its pixels are counted before it is decoded.

    Raises:
        Refused: it is no picture, damaged, or too large.
    """
    with refusing(name), open_picture(pathlib.Path(name), data=data) as image:
        if image.width * image.height > limits.picture_pixels:
            most = f"{limits.picture_pixels:,}"  # `open_picture` puts the name before it
            raise Emu3Error(f"it has {image.width}x{image.height} pixels; the limit is {most}: scale it down")
        return to_rgb(image)


def encode_picture(
    image: Image.Image, form: str, compression: int = 100, about: Mapping[str, str] | None = None
) -> str:
    """Encodes a picture, in base64.

    Args:
        image: the picture.
        form: one of `FORMATS`.
        compression: quality of JPEG and WebP, 0 to 100. WebP of 100 is lossless.
        about: text fields of a PNG.
    """
    file = io.BytesIO()
    if form == "png":
        info = PngImagePlugin.PngInfo()
        for key, value in (about or {}).items():
            info.add_text(key, value)
        image.save(file, format="PNG", pnginfo=info)
    elif form == "jpeg":
        image.save(file, format="JPEG", quality=compression)
    else:
        image.save(file, format="WEBP", quality=compression, lossless=compression == 100)
    return base64.b64encode(file.getvalue()).decode()


def partial_picture(pixels: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """A whole picture of the first rows, uint8 [height, width, 3]. The other rows are grey."""
    width, height = size
    whole = np.full((height, width, 3), _GREY, np.uint8)
    whole[: len(pixels)] = pixels
    return Image.fromarray(whole)

"""Writes generated pictures as PNG, JPEG or WebP files. Each file also stores the settings that made the picture."""

import json
from collections.abc import Mapping
from pathlib import Path

from PIL import ExifTags, Image

from emu3_jax.errors import Emu3Error
from emu3_jax.files import new_file
from emu3_jax.media.images import save_png

PICTURE_FORMATS = ("png", "jpg", "webp")  # also the endings of files

_MOST_JPEG_BYTES = 65_000  # of the comment; JPEG stores all EXIF data in one segment of 65,533 bytes
_ASCII = b"ASCII\0\0\0"  # EXIF's prefix for a comment in ASCII


def save_picture(image: Image.Image, path: Path, about: Mapping[str, str]) -> None:
    """Writes a picture, all or nothing. The ending of `path` must be one of `PICTURE_FORMATS`.

    PNG and WebP are lossless. JPEG has quality 95 and full colour resolution, so it loses a little.

    Args:
        image: the picture in RGB.
        path: the file. An existing file is replaced.
        about: the settings that made the picture. PNG stores each entry as a text field. JPEG and WebP store all
            entries as a JSON object in EXIF's UserComment.

    Raises:
        Emu3Error: `about` is longer than the format can hold, or the file cannot be written.
    """
    kind = path.suffix[1:]
    if kind == "png":
        save_png(image, path, about)
        return
    check_about(kind, about)
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = "emu3-jax"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _ASCII + _comment(about)
    options = {"quality": 95, "subsampling": 0} if kind == "jpg" else {"lossless": True}
    with new_file(path) as temporary:
        image.save(temporary, format="JPEG" if kind == "jpg" else "WEBP", exif=exif, **options)


def check_about(kind: str, about: Mapping[str, str]) -> None:
    """Raises an `Emu3Error` if the format `kind` cannot hold `about`. Call it before generating the picture."""
    found = len(_comment(about))
    if kind == "jpg" and found > _MOST_JPEG_BYTES:
        raise Emu3Error(
            f"a jpg file holds at most {_MOST_JPEG_BYTES:,} bytes about how its picture was made, but the prompts need "
            f"{found:,}: shorten them, or choose png or webp"
        )


def _comment(about: Mapping[str, str]) -> bytes:
    return json.dumps(dict(about)).encode()

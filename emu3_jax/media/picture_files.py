"""Generated pictures as files: PNG, JPEG or WebP, each with how the picture was made."""

import json
from collections.abc import Mapping
from pathlib import Path

from PIL import ExifTags, Image

from emu3_jax.errors import Emu3Error
from emu3_jax.files import new_file
from emu3_jax.media.images import save_png

PICTURE_FORMATS = ("png", "jpg", "webp")  # also the endings of files

_MOST_JPEG_BYTES = 65_000  # of EXIF, which JPEG keeps in one segment of 65,533
_ASCII = b"ASCII\0\0\0"  # how EXIF says in what characters a comment is


def save_picture(image: Image.Image, path: Path, about: Mapping[str, str]) -> None:
    """Writes a picture whole or not at all. The ending of `path` is one of `PICTURE_FORMATS`.

    PNG and WebP lose nothing. JPEG has quality 95 and full colour resolution, and loses a little.

    Args:
        image: the picture, RGB.
        path: of the file; one of the same name is replaced.
        about: how the picture was made. In PNG each entry is a text field. In JPEG and WebP all are one JSON object in
            EXIF's UserComment.

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
    """Raises an `Emu3Error` where a file of this format cannot hold `about`. To be called before the work, too."""
    found = len(_comment(about))
    if kind == "jpg" and found > _MOST_JPEG_BYTES:
        raise Emu3Error(
            f"a jpg file holds at most {_MOST_JPEG_BYTES:,} bytes about how its picture was made, and the prompts take "
            f"{found:,}: shorten them, or choose png or webp"
        )


def _comment(about: Mapping[str, str]) -> bytes:
    return json.dumps(dict(about)).encode()

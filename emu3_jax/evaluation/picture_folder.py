"""A folder of pictures of any size, such as the validation pictures of ImageNet or COCO, cut to one size."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from emu3_jax.data.sources.examples import picture_suffixes
from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import local_path
from emu3_jax.media.images import HEIC_SUFFIXES, load_image, require_heic


class PictureFolder:
    """The pictures of a folder and its subfolders, sorted by path. Hidden files and links to folders are skipped.

    Attributes:
        directory: the folder.
        files: paths of the pictures relative to it.
    """

    def __init__(self, directory: str | Path):
        """Lists the pictures. Reads none.

        Raises:
            Emu3Error: the folder is absent, cannot be read or has no pictures; or it has HEIC pictures and pillow-heif
                is not installed.
        """
        self.directory = local_path(directory)
        if not self.directory.is_dir():
            found = "is a file" if self.directory.exists() else "does not exist"
            raise Emu3Error(f"{directory} {found}: give a folder of pictures as the config's field data")
        self.files = _files(self.directory)
        if not self.files:
            raise Emu3Error(f"{directory} holds no pictures: give a folder of PNG, JPEG, WebP or other pictures")
        require_heic(self.directory, sum(Path(file).suffix.lower() in HEIC_SUFFIXES for file in self.files))

    def pixels(self, file: str, side: int) -> np.ndarray:
        """Reads a picture and cuts it with `cut`: uint8 [side, side, 3]. Raises `Emu3Error` if it is damaged."""
        return np.asarray(cut(load_image(self.directory / file), side))


def cut(picture: Image.Image, side: int) -> Image.Image:
    """Resizes a picture (bicubic) so that its shorter side has `side` pixels, and cuts out the square in its middle.

    A smaller picture is enlarged. Rounding is that of torchvision's `Resize` and `CenterCrop`.
    """
    shorter = min(picture.size)
    if shorter != side:
        width, height = (int(side * length / shorter) for length in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (round((length - side) / 2) for length in picture.size)
    return picture.crop((left, top, left + side, top + side))


def _files(root: Path) -> Sequence[str]:
    def unreadable(error: OSError) -> None:
        raise Emu3Error(f"cannot read {error.filename}: {error.strerror}; make it readable, or move it away")

    suffixes, found = picture_suffixes(), []
    for directory, folders, names in os.walk(root, onerror=unreadable):
        folders[:] = [name for name in folders if name[0] != "."]
        for name in names:
            if name[0] != "." and os.path.splitext(name)[1].lower() in suffixes:
                found.append(os.path.relpath(os.path.join(directory, name), root))
    return sorted(found)

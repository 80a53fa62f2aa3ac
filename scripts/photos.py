"""Writes a folder of 24 photographs with captions, to try `prepare` and `train`.

python scripts/photos.py DIR      writes DIR/*.jpg and captions of the same names, DIR/*.txt

The script needs `pip install 'emu3-jax[photos]'`. The photographs are pieces of pictures that come with scikit-image.
The docstrings in `skimage.data` allow free use of them. camera, chelsea, coffee, brick, grass, gravel, retina and cell
are CC0. astronaut, hubble_deep_field, rocket and text are in the public domain. coins and ihc have no known copyright
restrictions.
"""

import argparse
import importlib.util
import pathlib
import sys

from PIL import Image

SIDE = 256  # pixels of a photograph's height and width

# Name of the photograph, file of the original picture, left, top and side of the piece in pixels, caption.
PHOTOS = (
    ("astronaut", "astronaut.png", 0, 0, 512, "an astronaut in an orange space suit"),
    ("face", "astronaut.png", 145, 0, 165, "the face of a smiling woman"),
    ("shuttle", "astronaut.png", 335, 5, 170, "a model of a white space shuttle"),
    ("helmet", "astronaut.png", 290, 300, 212, "a black and white space helmet"),
    ("flag", "astronaut.png", 0, 0, 150, "a blue flag with white stars"),
    ("cameraman", "camera.png", 0, 0, 512, "a man with a camera on a tripod"),
    ("profile", "camera.png", 130, 30, 200, "a man looks through a camera, close-up"),
    ("cat", "chelsea.png", 75, 0, 300, "a ginger cat looks at the camera"),
    ("eye", "chelsea.png", 135, 75, 90, "the green eye of a cat"),
    ("nose", "chelsea.png", 195, 180, 118, "the pink nose of a cat"),
    ("coffee", "coffee.png", 80, 0, 400, "a red cup of coffee on a wooden table"),
    ("espresso", "coffee.png", 165, 20, 240, "coffee in a cup, seen from above"),
    ("spoon", "coffee.png", 300, 215, 130, "a silver spoon on a red saucer"),
    ("coins", "coins.png", 40, 0, 303, "rows of old coins"),
    ("coin", "coins.png", 312, 145, 70, "one old coin"),
    ("grass", "grass.png", 0, 0, 160, "grass in black and white"),
    ("gravel", "gravel.png", 0, 0, 160, "grey gravel"),
    ("bricks", "brick.png", 0, 0, 256, "a brick wall"),
    ("galaxies", "hubble_deep_field.jpg", 100, 100, 400, "galaxies in the night sky"),
    ("rocket", "rocket.jpg", 110, 0, 427, "a rocket on the launch pad at dusk"),
    ("retina", "retina.jpg", 0, 0, 1411, "the retina of an eye"),
    ("tissue", "ihc.png", 0, 0, 512, "brown and blue cells under a microscope"),
    ("cell", "cell.png", 306, 252, 240, "one bright round cell under a microscope"),
    ("writing", "text.png", 225, 0, 172, "handwriting on paper"),
)


def pictures() -> pathlib.Path:
    """The directory of scikit-image's pictures. It is found without importing scikit-image."""
    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        sys.exit("photos.py: scikit-image is not installed: pip install 'emu3-jax[photos]'")
    return pathlib.Path(found.origin).parent / "data"


def write_photos(directory: pathlib.Path) -> None:
    """Writes the photographs and their captions to `directory`."""
    source = pictures()
    directory.mkdir(parents=True, exist_ok=True)
    for name, file, left, top, side, caption in PHOTOS:
        with Image.open(source / file) as picture:
            piece = picture.convert("RGB").crop((left, top, left + side, top + side))
        piece.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(directory / f"{name}.jpg", quality=92)
        (directory / f"{name}.txt").write_text(f"{caption}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path, metavar="DIR")
    options = parser.parse_args()
    write_photos(options.directory)
    print(f"{options.directory}: {len(PHOTOS)} photographs with captions")

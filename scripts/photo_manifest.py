"""Cuts a photograph into nine captioned pictures: a minimal data set for `prepare` and `train`.

python scripts/photo_manifest.py DIR      writes DIR/manifest.jsonl and DIR/*.png
"""

import argparse
import json
import pathlib

from PIL import Image

PHOTO = pathlib.Path(__file__).parent / "assets" / "chelsea.jpg"
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")


def write_manifest(directory: pathlib.Path) -> pathlib.Path:
    """Writes nine pieces of the photograph and a manifest. Returns the manifest's path."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    with Image.open(PHOTO) as photo:
        side = min(photo.size) // 3
        left = (photo.width - 3 * side) // 2
        for y, row in enumerate(ROWS):
            for x, column in enumerate(COLUMNS):
                box = (left + x * side, y * side, left + (x + 1) * side, (y + 1) * side)
                name = f"{row}-{column}.png"
                photo.crop(box).save(directory / name)
                lines.append({"image": name, "text": f"a photo of a cat, {row} {column}"})
    manifest = directory / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return manifest


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path, metavar="DIR")
    print(write_manifest(parser.parse_args().directory))

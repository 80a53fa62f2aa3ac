"""Shows the embedded model: pictures from prompts, descriptions, an edit, a story, and clips.

One decoder does all this. It is small, was trained by this project on drawings, and is part of the package.
"""

import argparse
import os
import pathlib
import shlex
import sys
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from emu3_jax.cli import main as cli
from emu3_jax.media.clips import load_clip
from emu3_jax.media.images import save_png

ASSETS = pathlib.Path(__file__).parent / "assets" / "emoji"
# Prompts marked "unseen" are pairs of a thing and a style that training did not contain; it contained the thing and the
# style in other pairs. The prompts are hand-picked; the figures in the model's card cover all cases.
PROMPTS = {
    "a cat": "",
    "a red car": "",
    "flag of Japan": "",
    "pizza": "",
    "noto emoji of hamburger": "unseen",
    "twemoji emoji of pineapple": "unseen",
    "flat emoji of tiger face": "unseen",
    "3d emoji of rainbow": "unseen",
    "a Christmas tree": "",
    "a blue star above a red heart on a white background": "unseen",
    "three green circles on a black background": "",
    "a large red square in the center of a white background": "",
}
EDITED, REQUEST = "a large red square in the center of a white background", "Make it green"
STORY = "Tell a story in three pictures about a large purple triangle"
CLIPS = ("animated emoji of beating heart", "a large yellow heart moves right on a black background")
# The first half of a clip. Its triple of colour, shape and motion was not in training.
HALF, GOES_ON = "star-moves-down.webp", "a large purple star moves down on a white background"
QUESTIONS = ("Describe the image.", "What category is this?")
_STRIP, _LINE, _MARGIN = 44, 26, 8


def run(output: pathlib.Path, model: pathlib.Path | None = None) -> None:
    """Runs all commands, with the embedded model or with `model`."""
    chosen = () if model is None else ("--model", model)
    pictures, clips, extended, edit, story = (output / d for d in ("pictures", "clips", "extended", "edit", "story"))
    files, half = [os.path.relpath(file) for file in sorted(ASSETS.glob("*.webp")) if file.name != HALF], ASSETS / HALF
    print("# Text to pictures: prompts as people write them, things that training showed in other styles, and scenes")
    emu3_jax("generate", *PROMPTS, "--seed", 13, "--batch-size", len(PROMPTS), "-o", pictures, *chosen)
    print("# Pictures to text: two questions about each of four pictures that were not in training")
    print("# The pictures show:")
    for file in files:
        thing, _, style = pathlib.Path(file).stem.rpartition("-")
        print(f"#   {file}: {style} emoji of {thing}")
    asked = [(file, question) for file in files for question in QUESTIONS]
    emu3_jax(
        "chat", *(file for file, _ in asked), "--prompt", *(question for _, question in asked), "--max-new-tokens", 32,
        *chosen,
    )  # fmt: skip
    print("# A picture and a request")
    before = pictures / f"{list(PROMPTS).index(EDITED):03d}.png"
    emu3_jax("interleave", REQUEST, "--image", before, "-o", edit, *chosen)
    print("# Pictures and text in turn: the model decides when a picture begins and when the story ends")
    emu3_jax("interleave", STORY, "--seed", 2, "-o", story, *chosen)
    # Passes of eight tokens: on a CPU that is faster for a few clips, and slower for many pictures at once.
    print("# Text to clips: eight frames each. A pass of the decoder checks eight guessed tokens")
    emu3_jax("video", *CLIPS, "--seed", 1, "--parallel", 8, "-o", clips, *chosen)
    print("# Continuing a clip: four frames are given, four are new")
    emu3_jax(
        "video", GOES_ON, "--extend", os.path.relpath(half), "--frames", 4, "--parallel", 8, "-o", extended, *chosen
    )
    print("# A clip to text: two questions in one conversation")
    emu3_jax(
        "chat", extended / "000.webp", "--together", "--prompt", "Describe the clip.", "What does the shape do?",
        "--max-new-tokens", 32, *chosen,
    )  # fmt: skip

    tiles = []
    for index, (prompt, note) in enumerate(PROMPTS.items()):
        with Image.open(pictures / f"{index:03d}.png") as picture:
            tiles.append((f"{prompt} ({note})" if note else prompt, picture.convert("RGB")))
    for name, folder in ((REQUEST, edit), (STORY, story)):
        for file in sorted(folder.glob("000_*.png")):
            with Image.open(file) as picture:
                tiles.append((name, picture.convert("RGB")))
    shown = [(prompt, clips / f"{index:03d}.webp") for index, prompt in enumerate(CLIPS)]
    shown.append((f"{GOES_ON} (the first four frames were given)", extended / "000.webp"))
    strips = [(name, load_clip(file).frames) for name, file in shown]
    sheet = output / "sheet.png"
    save_png(contact_sheet(tiles, strips), sheet, {"software": "emu3-jax"})
    print(f"\nAll pictures, and the frames of the clips, on one sheet: {sheet}")
    print(f"The clips: {' '.join(str(file) for _, file in shown)}")


def emu3_jax(command: str, *arguments: object) -> None:
    """Prints and runs one `emu3-jax` command in this process, because starting JAX again takes longer than the work."""
    words = [command, *map(str, arguments)]
    print(f"$ emu3-jax {shlex.join(words)}", flush=True)
    if code := cli.main(words):
        sys.exit(code)


def contact_sheet(
    tiles: Sequence[tuple[str, Image.Image]], clips: Sequence[tuple[str, np.ndarray]], columns: int = 4, side: int = 128
) -> Image.Image:
    """A sheet with the pictures in rows, their names below them, and then the frames [T, H, W, 3] of each clip."""
    font, width = ImageFont.load_default(), columns * (side + _MARGIN) + _MARGIN
    rows = -(-len(tiles) // columns)
    strips = []
    for name, frames in clips:
        strip = Image.fromarray(frames.swapaxes(0, 1).reshape(frames.shape[1], -1, 3))
        size = (width - 2 * _MARGIN, round(strip.height * (width - 2 * _MARGIN) / strip.width))
        strips.append((name, strip.resize(size, Image.Resampling.BICUBIC)))
    height = rows * (side + _STRIP) + sum(strip.height + _LINE for _, strip in strips) + 2 * _MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (name, picture) in enumerate(tiles):
        row, column = divmod(index, columns)
        left, top = _MARGIN + column * (side + _MARGIN), _MARGIN + row * (side + _STRIP)
        sheet.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (left, top))
        draw.text((left, top + side + 3), textwrap.fill(name, side // 6 + 1), "black", font)
    top = _MARGIN + rows * (side + _STRIP)
    for name, strip in strips:
        sheet.paste(strip, (_MARGIN, top))
        draw.text((_MARGIN, top + strip.height + 3), name, "black", font)
        top += strip.height + _LINE
    return sheet


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "-o", "--output", type=pathlib.Path, default="out/demo", metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument(
        "--model", type=pathlib.Path, metavar="BUNDLE", help="bundle to show (default: the embedded model)"
    )
    options = parser.parse_args()
    run(options.output, options.model)

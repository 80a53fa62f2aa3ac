"""The embedded model at work: pictures for prompts, descriptions of pictures it never saw, and a clip.

One decoder does all three. It is small, trained by this project on emoji, and part of the package.
"""

import argparse
import os
import pathlib
import shlex
import sys
import textwrap

from PIL import Image, ImageDraw, ImageFont

from emu3_jax.cli import main as cli
from emu3_jax.media.clips import load_clip
from emu3_jax.media.images import save_png

ASSETS = pathlib.Path(__file__).parent / "assets" / "emoji"
# The model saw all of these things and styles in training, but not together where it says unseen. They were chosen
# among those that it draws well; the figures in its card are over all.
PROMPTS = {
    "noto emoji of hamburger": "unseen",
    "twemoji emoji of pineapple": "unseen",
    "3d emoji of rainbow": "unseen",
    "vintage emoji of avocado": "unseen",
    "flat emoji of tiger face": "unseen",
    "vintage emoji of hammer": "unseen",
    "twemoji emoji of octopus": "unseen",
    "vintage emoji of mushroom": "unseen",
    "3d emoji of rocket": "",
    "noto emoji of volcano": "",
    "flat emoji of cactus": "",
    "twemoji emoji of strawberry": "",
}
CLIP = "animated emoji of rooster"
QUESTIONS = ("Describe the image.", "What category is this?")
_SIDE, _STRIP, _MARGIN, _COLUMNS = 128, 44, 8, 4


def run(output: pathlib.Path, model: pathlib.Path | None = None) -> None:
    """Runs every command, with the embedded model or another like it."""
    chosen = () if model is None else ("--model", model)
    pictures, clips = output / "pictures", output / "clips"
    files = [os.path.relpath(file) for file in sorted(ASSETS.glob("*.webp"))]
    print("# Text to pictures: eight of these in styles that the model never saw them in")
    emu3_jax("generate", *PROMPTS, "--seed", 1, "--batch-size", len(PROMPTS), "-o", pictures, *chosen)
    print("# Pictures to text: four pictures that it never saw, two questions about each")
    asked = [(file, question) for file in files for question in QUESTIONS]
    emu3_jax(
        "chat", *(file for file, _ in asked), "--prompt", *(question for _, question in asked), "--max-new-tokens", 32,
        *chosen,
    )  # fmt: skip
    print("# Text to a clip: eight frames")
    emu3_jax("video", CLIP, "--seed", 1, "-o", clips, *chosen)

    tiles = [(f"{prompt} ({note})" if note else prompt, pictures / f"{index:03d}.png") for index, (prompt, note) in
             enumerate(PROMPTS.items())]  # fmt: skip
    strip = output / "clip.png"
    frames = load_clip(clips / "000.webp").frames
    save_png(Image.fromarray(frames.swapaxes(0, 1).reshape(frames.shape[1], -1, 3)), strip, {"software": "emu3-jax"})
    sheet = output / "sheet.png"
    save_png(contact_sheet(tiles, (CLIP, strip)), sheet, {"software": "emu3-jax"})
    print(f"\nThe pictures and the clip's frames on one sheet: {sheet}")
    print(f"The clip: {clips / '000.webp'}")


def emu3_jax(command: str, *arguments: object) -> None:
    """Shows and runs one command of `emu3-jax`, in this process: starting JAX anew takes longer than the work."""
    words = [command, *map(str, arguments)]
    print(f"$ emu3-jax {shlex.join(words)}", flush=True)
    if code := cli.main(words):
        sys.exit(code)


def contact_sheet(tiles: list[tuple[str, pathlib.Path]], clip: tuple[str, pathlib.Path]) -> Image.Image:
    """Pictures in rows, each with its name below, and under them the frames of a clip."""
    font, width = ImageFont.load_default(), _COLUMNS * (_SIDE + _MARGIN) + _MARGIN
    rows = -(-len(tiles) // _COLUMNS)
    with Image.open(clip[1]) as image:
        scale = (width - 2 * _MARGIN) / image.width
        frames = image.convert("RGB").resize(
            (width - 2 * _MARGIN, round(image.height * scale)), Image.Resampling.BICUBIC
        )
    sheet = Image.new("RGB", (width, rows * (_SIDE + _STRIP) + frames.height + _STRIP + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (name, file) in enumerate(tiles):
        row, column = divmod(index, _COLUMNS)
        left, top = _MARGIN + column * (_SIDE + _MARGIN), _MARGIN + row * (_SIDE + _STRIP)
        with Image.open(file) as image:
            sheet.paste(image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BICUBIC), (left, top))
        draw.text((left, top + _SIDE + 3), textwrap.fill(name, 22), "black", font)
    top = _MARGIN + rows * (_SIDE + _STRIP)
    sheet.paste(frames, (_MARGIN, top))
    draw.text((_MARGIN, top + frames.height + 3), clip[0], "black", font)
    return sheet


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=pathlib.Path, default="out/demo", metavar="DIR")
    parser.add_argument("--model", type=pathlib.Path, metavar="BUNDLE", help="default: the embedded model")
    options = parser.parse_args()
    run(options.output, options.model)

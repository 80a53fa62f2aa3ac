"""The main job from one end to the other: a PyTorch checkpoint becomes pictures and answers.

The model is small and its weights are random, so its pictures are noise. Everything around it is real: the checkpoint
layout, the vocabulary, the photograph, and the commands, which are those that serve the published weights.
"""

import argparse
import pathlib
import shlex
import sys

from PIL import Image, ImageDraw, ImageFont
from small_checkpoint import write_checkpoint

from emu3_jax.cli import main as cli
from emu3_jax.media.images import save_png

PHOTO = pathlib.Path(__file__).parent / "assets" / "chelsea.jpg"
PROMPTS = ("a shiba inu in a spacesuit, studio light", "a lighthouse at dusk, oil painting")
QUESTION = "Please describe the image"


def run(output: pathlib.Path, area: int = 256 * 256) -> None:
    """Runs every command. `area`: pixels of the pictures."""
    bundle, codes = output / "bundle", output / "codes.npz"
    if bundle.exists():
        print(f"{bundle} is here from the last time (delete it to see it converted again)")
    else:
        print("# A small checkpoint in upstream's PyTorch layout. Its weights are random: expect noise, not art.")
        print(f"$ python scripts/small_checkpoint.py {output / 'checkpoint'}")
        sources = write_checkpoint(output / "checkpoint", area)
        print("# PyTorch weights to a bundle, the directory that a model lives in")
        emu3_jax("convert", *sources, "-o", bundle)
    print("# A photograph to codes of the 32,768-entry codebook, and back")
    emu3_jax("tokenize", PHOTO, "--model", bundle, "-o", codes)
    emu3_jax("detokenize", codes, "--model", bundle, "-o", output / "reconstruction")
    print("# Text to pictures")
    emu3_jax("generate", *PROMPTS, "--model", bundle, "--seed", 1, "-o", output / "generated")
    print("# A picture and a question to text")
    emu3_jax("chat", PHOTO, "--prompt", QUESTION, "--model", bundle, "--max-new-tokens", 24)

    pictures = {
        "the photograph": PHOTO,
        "reconstructed, random weights": output / "reconstruction" / f"{PHOTO.stem}.png",
        **{f'"{prompt}"': output / "generated" / f"{i:03d}.png" for i, prompt in enumerate(PROMPTS)},
    }
    sheet = output / "sheet.png"
    save_png(contact_sheet(pictures), sheet, {"software": "emu3-jax", "weights": "random"})
    print("\nThe weights are random, so the drawn pictures, the reconstruction and the answer mean nothing;")
    print("with a published model converted (emu3-jax convert BAAI/Emu3-Gen BAAI/Emu3-VisionTokenizer -o gen)")
    print("the same commands make real ones.")
    print("\nAll pictures on one sheet:", sheet)


def emu3_jax(command: str, *arguments: object) -> None:
    """Shows and runs one command of `emu3-jax`, in this process: starting JAX anew takes longer than the work."""
    words = [command, *map(str, arguments)]
    print(f"$ emu3-jax {shlex.join(words)}", flush=True)
    if code := cli.main(words):
        sys.exit(code)


def contact_sheet(pictures: dict[str, pathlib.Path], height: int = 256) -> Image.Image:
    """The pictures side by side, all of one `height`, each with its name below."""
    font, margin, strip = ImageFont.load_default(), 8, 24
    scaled = []
    for file in pictures.values():
        with Image.open(file) as image:
            scaled.append(image.convert("RGB").resize((image.width * height // image.height, height)))
    width = sum(image.width + margin for image in scaled) + margin
    sheet = Image.new("RGB", (width, height + strip + 2 * margin), "white")
    draw, left = ImageDraw.Draw(sheet), margin
    for name, image in zip(pictures, scaled, strict=True):
        sheet.paste(image, (left, margin))
        draw.text((left, margin + height + 6), name, "black", font)
        left += image.width + margin
    return sheet


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=pathlib.Path, default="out/demo", metavar="DIR")
    run(parser.parse_args().output)

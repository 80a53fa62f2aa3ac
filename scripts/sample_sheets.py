"""Draws pictures of a manifest's prompts, none left out, on sheets for the documentation.

    python scripts/sample_sheets.py out/pictures64/prompts_heldout.jsonl -o out/samples

The prompts are chosen by `--seed`, each text at most once, and each is drawn once with the same seed.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
from demo import contact_sheet

import emu3_jax
from emu3_jax import Emu3Error
from emu3_jax.cli.common import whole
from emu3_jax.data.config import MAX_SEED
from emu3_jax.files import new_directory

COLUMNS, SIDE = 10, 96  # of a sheet; pixels of a picture on it


def chosen_prompts(manifest: pathlib.Path, count: int, seed: int) -> list[str]:
    """`count` different texts of the manifest, in random order.

    Raises:
        Emu3Error: the manifest has fewer, or a line without a text.
    """
    try:
        texts = sorted({json.loads(line)["text"] for line in manifest.read_text().splitlines()})
    except (KeyError, TypeError, ValueError) as error:
        raise Emu3Error(f"{manifest} has a line that is no object with the field text: correct it") from error
    if len(texts) < count:
        raise Emu3Error(f"{manifest} has {len(texts)} different texts, {count} are wanted: correct --count")
    return [texts[place] for place in np.random.default_rng(seed).permutation(len(texts))[:count]]


def draw(
    model: emu3_jax.Emu3, prompts: list[str], target: pathlib.Path, *, per_sheet: int, seed: int, guidance: float
) -> None:
    """Writes the sheets sheet-1.webp, sheet-2.webp and so on to the new directory `target`."""
    pictures = model.generate(prompts, guidance=guidance, seed=seed, batch_size=32, progress=True)
    with new_directory(target, 0) as directory:
        for first in range(0, len(prompts), per_sheet):
            part = slice(first, first + per_sheet)
            sheet = contact_sheet(list(zip(prompts[part], pictures[part], strict=True)), [], COLUMNS, SIDE)
            sheet.save(directory / f"sheet-{first // per_sheet + 1}.webp", quality=90)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=pathlib.Path, metavar="JSONL", help="its objects have the field text")
    parser.add_argument("-o", "--output", type=pathlib.Path, required=True, metavar="DIR", help="new directory")
    parser.add_argument("--model", type=pathlib.Path, metavar="BUNDLE", help="default: the embedded model")
    parser.add_argument("--count", type=whole(1, 10_000), default=200, help="number of prompts (default: %(default)s)")
    parser.add_argument(
        "--per-sheet", type=whole(1, 10_000), default=100, help="pictures on a sheet (default: %(default)s)"
    )
    parser.add_argument("--seed", type=whole(0, MAX_SEED), default=0, help="default: %(default)s")
    parser.add_argument("--guidance", type=float, default=3.0, help="default: %(default)s")
    options = parser.parse_args()
    try:
        prompts = chosen_prompts(options.manifest, options.count, options.seed)
        settings = {"per_sheet": options.per_sheet, "seed": options.seed, "guidance": options.guidance}
        draw(emu3_jax.load(options.model), prompts, options.output, **settings)
    except (Emu3Error, OSError, ValueError) as error:
        sys.exit(f"sample_sheets: error: {error}")

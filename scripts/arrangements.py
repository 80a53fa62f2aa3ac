"""Builds captioned pictures of several coloured shapes, counted or in a row.

python scripts/arrangements.py out/arrangements

The directory gets pictures/, the manifests train.jsonl and heldout.jsonl that `emu3-jax prepare` reads, with questions
about the same pictures in questions_train.jsonl and questions_heldout.jsonl, the captions of both in prompts.txt and
held_out.txt, and summary.json. No arrangement of heldout.jsonl is in train.jsonl.
`evaluation.arrangements` draws the pictures and reads them back. The script downloads nothing.
"""

import argparse
import collections
import json
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from emoji_data.manifests import write_lines
from PIL import Image

from emu3_jax.data.config import MAX_SEED
from emu3_jax.errors import Emu3Error
from emu3_jax.evaluation.arrangements import SMALLEST_SIDE, Arrangement, draw_arrangement, rasterise
from emu3_jax.files import new_directory
from emu3_jax.progress import each

_SIZES = (SMALLEST_SIDE, 512)  # pixels
HELD_OUT = 256  # pictures in heldout.jsonl
PROMPTS = {"train": "prompts.txt", "heldout": "held_out.txt"}
_MOST = 10**6  # pictures: file names have six digits
_BYTES_PER_PICTURE = 8_192  # of the whole directory: two blocks of a file system, for the disk check


def build(directory: pathlib.Path, *, count: int = 12_000, size: int = 64, seed: int = 0) -> dict:
    """Writes the whole data set, or nothing, and returns its summary.

    Args:
        directory: new directory for the data set.
        count: number of pictures to train on.
        size: side of the pictures in pixels.
        seed: seed of scenes and variations. The first pictures do not depend on `count`.

    Raises:
        Emu3Error: an argument is out of range, `directory` exists, or a file cannot be written.
    """
    if not 1 <= count <= _MOST:
        raise Emu3Error(f"count is {count}: it must be from 1 to {_MOST}")
    if not _SIZES[0] <= size <= _SIZES[1]:
        raise Emu3Error(f"size is {size}: the pictures must have from {_SIZES[0]} to {_SIZES[1]} pixels a side")
    if not 0 <= seed <= MAX_SEED:
        raise Emu3Error(f"seed is {seed}: it must be from 0 to {MAX_SEED}")
    kinds: collections.Counter[str] = collections.Counter()
    with new_directory(directory, count * max(_BYTES_PER_PICTURE, 3 * size**2)) as target:
        (target / "pictures").mkdir()
        for part, (name, number) in enumerate((("train", count), ("heldout", HELD_OUT))):
            rng, lines, questions = np.random.default_rng([seed, part]), [], []
            for index in each(range(number), True, "pictures", name=f"rasterising {name}"):
                scene = draw_arrangement(rng, unseen=name == "heldout")
                file = f"pictures/{name}_{index:06d}.webp"
                Image.fromarray(rasterise(scene, size, rng)).save(target / file, lossless=True)
                line = {"image": file, "name": f"arrangements/{name}_{index:06d}"}
                lines.append({**line, "text": scene.caption})
                questions.append({**line, "conversation": _conversation(scene)})
                if name == "train":
                    kinds[scene.order or f"{len(scene.things)} counted"] += 1
            write_lines(target / f"{name}.jsonl", lines)
            write_lines(target / f"questions_{name}.jsonl", questions)
            captions = dict.fromkeys(line["text"] for line in lines)
            (target / PROMPTS[name]).write_text("".join(f"{text}\n" for text in captions))
        summary = {
            "arguments": {"count": count, "size": size, "seed": seed},
            "held_out": HELD_OUT,
            "kinds": dict(sorted(kinds.items())),
        }
        (target / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _conversation(scene: Arrangement) -> list[dict]:
    """All questions about a picture, one after the other."""
    asked = {"Describe the image.": scene.caption, **scene.questions}
    return [
        {"role": role, "text": text}
        for pair in asked.items()
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path, metavar="DIR", help="new directory for the data set")
    parser.add_argument("--count", type=int, default=12_000, metavar="N", help="pictures (default: %(default)s)")
    parser.add_argument(
        "--size", type=int, default=64, metavar="PIXELS", help="side of pictures (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes and variations (default: %(default)s)")
    given = parser.parse_args(arguments)
    try:
        summary = build(given.directory, count=given.count, size=given.size, seed=given.seed)
    except Emu3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"pictures: {given.count} to train on, {HELD_OUT} held out")
    for kind, count in summary["kinds"].items():
        print(f"{kind}: {count}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

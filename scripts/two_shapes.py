"""Builds captioned pictures of two coloured shapes, to fine-tune a small model on.

python scripts/two_shapes.py out/two_shapes

The directory gets pictures/, a manifest train.jsonl that `emu3-jax prepare` reads, and summary.json. The places, sizes
and colours of the shapes vary a little. The pairs of shapes that configs/eval_two_shapes.py asks for are never drawn.
For configs/grpo_emoji.py it gets prompts.txt, the captions of the pictures, and held_out.txt, captions of pairs that
are never drawn. configs/two_shapes_sft.py says how to train a model of 32x32 pixels on the result; for other models
give --size. The script downloads nothing.
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
from emu3_jax.evaluation.procedural import Variation
from emu3_jax.evaluation.relations import draw_two_shapes, rasterise
from emu3_jax.files import new_directory
from emu3_jax.progress import each

_SIZES = (16, 512)  # pixels; on fewer the shapes run together
_HELD_OUT = 128  # captions in held_out.txt
_MOST = 10**6  # pictures: file names have six digits
_BYTES_PER_PICTURE = 8_192  # of the whole directory: two blocks of a file system, for the disk check


def build(directory: pathlib.Path, *, count: int = 6_000, size: int = 32, seed: int = 0) -> dict:
    """Writes the whole data set, or nothing, and returns its summary.

    Args:
        directory: new directory for the data set.
        count: number of pictures.
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
    rng, lines, relations = np.random.default_rng(seed), [], collections.Counter()
    with new_directory(directory, count * max(_BYTES_PER_PICTURE, 3 * size**2)) as target:
        (target / "pictures").mkdir()
        for number in each(range(count), True, "pictures", name="rasterising"):
            scene = draw_two_shapes(rng, unseen=False)
            pixels = rasterise(scene, size, (Variation.draw(rng), Variation.draw(rng)))
            file = f"pictures/{number:06d}.webp"
            Image.fromarray(pixels).save(target / file, lossless=True)
            lines.append({"image": file, "text": scene.caption, "name": f"two_shapes/{number:06d}"})
            relations[scene.relation] += 1
        write_lines(target / "train.jsonl", lines)
        captions = dict.fromkeys(line["text"] for line in lines)
        unseen = (draw_two_shapes(rng, unseen=True).caption for _ in range(_HELD_OUT))
        for name, texts in (("prompts.txt", captions), ("held_out.txt", unseen)):
            (target / name).write_text("".join(f"{text}\n" for text in texts))
        summary = {
            "arguments": {"count": count, "size": size, "seed": seed},
            "captions": len(captions),
            "relations": dict(sorted(relations.items())),
        }
        (target / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path, metavar="DIR", help="new directory for the data set")
    parser.add_argument("--count", type=int, default=6_000, metavar="N", help="pictures (default: %(default)s)")
    parser.add_argument(
        "--size", type=int, default=32, metavar="PIXELS", help="side of pictures (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes and variations (default: %(default)s)")
    given = parser.parse_args(arguments)
    try:
        summary = build(given.directory, count=given.count, size=given.size, seed=given.seed)
    except Emu3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"pictures: {given.count}, with {summary['captions']} different captions")
    for relation, count in summary["relations"].items():
        print(f"{relation}: {count}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

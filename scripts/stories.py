"""Writes training data of illustrated stories and edits: coloured shapes that move and change.

    python scripts/stories.py out/stories
    emu3-jax prepare out/stories/SET.jsonl --keep-size -o out/stories_tokens/SET    # for each SET
    emu3-jax train configs/stories.py

The directory gets the pictures, 1,440 scenes in 16 drawings each, and a manifest for each SET: stories_train,
edits_train, stories_heldout and edits_heldout. The training sets have no subject of `evaluation.scenes.UNSEEN`, the
held-out sets have them.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator

import numpy as np
from PIL import Image

from emu3_jax.errors import Emu3Error
from emu3_jax.evaluation import scenes
from emu3_jax.evaluation.procedural import Still, Variation, all_stills, rasterise_still
from emu3_jax.files import new_directory
from emu3_jax.progress import each

SIDE = 32
HELD_OUT = 256  # documents of each held-out set
# Drawings that differ a little: shifted, scaled, tinted. With exact drawings alone, a model learns the 1,440 pictures
# by heart, and reads a given picture of a new subject as one that it knows.
VARIATIONS = 15
Line = dict[str, object]


def write(target: pathlib.Path, stories: int, edits: int, seed: int = 0) -> pathlib.Path:
    """Writes pictures and manifests.

    Args:
        target: new directory.
        stories: number of stories to train on.
        edits: number of edits to train on.
        seed: seed of all draws.

    Returns:
        `target`.

    Raises:
        Emu3Error: `target` exists, or cannot be written.
    """
    with new_directory(target, 0) as temporary:
        (temporary / "pictures").mkdir()
        rng = np.random.default_rng([seed, 4])
        variations = [Variation(), *(Variation.draw(rng) for _ in range(VARIATIONS))]
        drawings = [(scene, number) for number in range(len(variations)) for scene in all_stills()]
        for scene, number in each(drawings, None, "pictures", name="stories"):
            pixels = rasterise_still(scene, SIDE, variations[number])
            Image.fromarray(pixels).save(temporary / _file(scene, number))
        sets = {
            "stories_train": _stories(stories, [seed, 0], unseen=False),
            "edits_train": _edits(edits, [seed, 1], unseen=False),
            "stories_heldout": _stories(HELD_OUT, [seed, 2], unseen=True),
            "edits_heldout": _edits(HELD_OUT, [seed, 3], unseen=True),
        }
        for name, documents in sets.items():
            lines = ({"document": document, "name": f"{name} {i}"} for i, document in enumerate(documents))
            (temporary / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return target


def _file(scene: Still, variation: int) -> str:
    shown = f"{scene.colour}-{scene.shape}-{scene.size}-{scene.background}-{scene.position}"
    return f"pictures/{shown}-{variation}.png"


def _variation(rng: np.random.Generator, unseen: bool) -> int:
    """The number of a document's variation. Held-out documents and a quarter of the others are drawn exactly."""
    return 0 if unseen or rng.random() < 0.25 else 1 + int(rng.integers(VARIATIONS))


def _stories(count: int, seed: list[int], *, unseen: bool) -> Iterator[list[Line]]:
    rng = np.random.default_rng(seed)
    for number in range(count):
        story = scenes.draw_story(rng, unseen=unseen, free=number % 2 == 0)
        variation = _variation(rng, unseen)
        document: list[Line] = [{"role": "user", "text": story.prompt}]
        for sentence, scene in zip(story.sentences, story.scenes, strict=True):
            document.append({"role": "assistant", "text": sentence})
            document.append({"role": "assistant", "image": _file(scene, variation)})
        yield document


def _edits(count: int, seed: list[int], *, unseen: bool) -> Iterator[list[Line]]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        edit = scenes.draw_edit(rng, unseen=unseen)
        variation = _variation(rng, unseen)
        yield [
            {"role": "user", "image": _file(edit.before, variation)},
            {"role": "user", "text": edit.change.request},
            {"role": "assistant", "image": _file(edit.after, variation)},
        ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=pathlib.Path, metavar="DIR", help="new directory")
    parser.add_argument("--stories", type=int, default=40_000, metavar="N", help="stories to train on (%(default)s)")
    parser.add_argument("--edits", type=int, default=20_000, metavar="N", help="edits to train on (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws (%(default)s)")
    options = parser.parse_args()
    try:
        print(write(options.output, options.stories, options.edits, options.seed))
    except Emu3Error as error:
        sys.exit(f"stories: error: {error}")

"""Writes training data of illustrated stories and edits: coloured shapes that move and change.

    python scripts/stories.py out/stories
    emu3-jax prepare out/stories/SET.jsonl --keep-size -o out/stories_tokens/SET    # for each SET
    emu3-jax train configs/stories.py

The directory gets pictures, and a manifest for each SET: stories_train, edits_train, stories_heldout and edits_heldout.
The training sets have no subject of `evaluation.scenes.UNSEEN`, the held-out sets have them.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator

import numpy as np
from PIL import Image

from emu3_jax.errors import Emu3Error
from emu3_jax.evaluation import scenes
from emu3_jax.evaluation.procedural import BACKGROUNDS, COLOURS, Still, Variation, rasterise_still
from emu3_jax.files import new_directory
from emu3_jax.progress import each

SIDE = 64  # pixels of the embedded model's pictures
_SIZES = (16, 512)
HELD_OUT = 256  # documents of each held-out set
# With exact drawings alone, a model learns the 1,440 pictures by heart, and reads a given picture of a new subject as
# one that it knows. So most drawings are shifted, scaled and tinted a little, and the subjects of many edits have
# colours without name: what is not to change must be copied.
VARIATIONS = 15
PAINTS = 64
Line = dict[str, object]


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A picture. `paint` is the number of the paint of its subject, or None for the scene's colour."""

    scene: Still
    variation: int
    paint: int | None = None

    @property
    def file(self) -> str:
        """The picture's file, in the output directory."""
        scene = self.scene
        colour = scene.colour if self.paint is None else f"paint{self.paint}"
        shown = f"{colour}-{scene.shape}-{scene.size}-{scene.background}-{scene.position}"
        return f"pictures/{shown}-{self.variation}.png"


class Studio:
    """Draws documents, and then the pictures that they need."""

    def __init__(self, seed: int, size: int = SIDE):
        self._size = size
        rng = np.random.default_rng([seed, 4])
        self._variations = [Variation(), *(Variation.draw(rng) for _ in range(VARIATIONS))]
        self._paints = list(itertools.islice(_paints(rng), PAINTS))
        self._needed: dict[str, Drawing] = {}

    def stories(self, count: int, rng: np.random.Generator, *, unseen: bool) -> Iterator[list[Line]]:
        """Yields stories. Half of them are free (see `scenes.Story`)."""
        for number in range(count):
            story = scenes.draw_story(rng, unseen=unseen, free=number % 2 == 0)
            variation = _variation(rng, unseen)
            document: list[Line] = [{"role": "user", "text": story.prompt}]
            for sentence, scene in zip(story.sentences, story.scenes, strict=True):
                document.append({"role": "assistant", "text": sentence})
                document.append({"role": "assistant", "image": self._need(Drawing(scene, variation))})
            yield document

    def edits(self, count: int, rng: np.random.Generator, *, unseen: bool) -> Iterator[list[Line]]:
        """Yields edits. In half of the seen ones the given subject has a colour without name."""
        for _ in range(count):
            edit = scenes.draw_edit(rng, unseen=unseen)
            variation = _variation(rng, unseen)
            paint = None if unseen or rng.random() < 0.5 else int(rng.integers(PAINTS))
            kept = None if edit.change.field == "colour" else paint
            yield [
                {"role": "user", "image": self._need(Drawing(edit.before, variation, paint))},
                {"role": "user", "text": edit.change.request},
                {"role": "assistant", "image": self._need(Drawing(edit.after, variation, kept))},
            ]

    def draw(self, target: pathlib.Path) -> None:
        """Writes the pictures of the documents that were drawn."""
        for drawing in each(list(self._needed.values()), None, "pictures", name="stories"):
            variation = self._variations[drawing.variation]
            if drawing.paint is not None:
                variation = dataclasses.replace(variation, tint=self._paints[drawing.paint] - _colour(drawing.scene))
            Image.fromarray(rasterise_still(drawing.scene, self._size, variation)).save(target / drawing.file)

    def _need(self, drawing: Drawing) -> str:
        self._needed[drawing.file] = drawing
        return drawing.file


def write(target: pathlib.Path, stories: int, edits: int, seed: int = 0, *, size: int = SIDE) -> pathlib.Path:
    """Writes pictures and manifests.

    Args:
        target: new directory.
        stories: number of stories to train on.
        edits: number of edits to train on.
        seed: seed of all draws.
        size: side of the pictures in pixels.

    Returns:
        `target`.

    Raises:
        Emu3Error: `size` is out of range, `target` exists, or cannot be written.
    """
    if not _SIZES[0] <= size <= _SIZES[1]:
        raise Emu3Error(f"size is {size}: the pictures must have from {_SIZES[0]} to {_SIZES[1]} pixels a side")
    with new_directory(target, 0) as temporary:
        (temporary / "pictures").mkdir()
        studio = Studio(seed, size)
        sets = {
            "stories_train": studio.stories(stories, np.random.default_rng([seed, 0]), unseen=False),
            "edits_train": studio.edits(edits, np.random.default_rng([seed, 1]), unseen=False),
            "stories_heldout": studio.stories(HELD_OUT, np.random.default_rng([seed, 2]), unseen=True),
            "edits_heldout": studio.edits(HELD_OUT, np.random.default_rng([seed, 3]), unseen=True),
        }
        for name, documents in sets.items():
            lines = ({"document": document, "name": f"{name} {i}"} for i, document in enumerate(documents))
            (temporary / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        studio.draw(temporary)
    return target


def _variation(rng: np.random.Generator, unseen: bool) -> int:
    """The number of a document's variation. Held-out documents and a quarter of the others are drawn exactly."""
    return 0 if unseen or rng.random() < 0.25 else 1 + int(rng.integers(VARIATIONS))


def _paints(rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yields RGB colours, int [3], that are neither a named colour nor a background."""
    named = np.array([*COLOURS.values(), *BACKGROUNDS.values()])
    while True:
        paint = rng.integers(0, 256, 3)
        if np.linalg.norm(named - paint, axis=1).min() > 60:
            yield paint


def _colour(scene: Still) -> np.ndarray:
    return np.array(COLOURS[scene.colour])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=pathlib.Path, metavar="DIR", help="new directory")
    parser.add_argument("--stories", type=int, default=40_000, metavar="N", help="stories to train on (%(default)s)")
    parser.add_argument("--edits", type=int, default=40_000, metavar="N", help="edits to train on (%(default)s)")
    parser.add_argument("--size", type=int, default=SIDE, metavar="PIXELS", help="side of pictures (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws (%(default)s)")
    options = parser.parse_args()
    try:
        print(write(options.output, options.stories, options.edits, options.seed, size=options.size))
    except Emu3Error as error:
        sys.exit(f"stories: error: {error}")

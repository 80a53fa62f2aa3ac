"""Two coloured shapes and their relation: drawing them, captioning them, and recognising them in pixels.

The reader cuts the picture between the shapes, where it finds least of them, and reads each part as a picture of one
shape (see `procedural`).
"""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence

import numpy as np

from emu3_jax.evaluation import procedural
from emu3_jax.evaluation.procedural import BACKGROUNDS, COLOURS, SHAPES, plain, with_article

# Where the first shape is, seen from the second: a step (right, down).
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
ATTRIBUTES = ("first_colour", "first_shape", "second_colour", "second_shape", "relation", "background")

_RADIUS = 0.17  # of both shapes, as a share of the side
_APART = 0.24  # of each from the middle
_VALLEY = 0.3  # two shapes are apart if the line between them has at most this share of what either has
_CAPTION = re.compile(
    rf"an? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) ({'|'.join(RELATIONS)}) an? ({'|'.join(COLOURS)}) "
    rf"({'|'.join(SHAPES)}) on an? ({'|'.join(BACKGROUNDS)}) background"
)


@dataclasses.dataclass(frozen=True)
class TwoShapes:
    """The content of a picture of two shapes."""

    first_colour: str
    first_shape: str
    relation: str
    second_colour: str
    second_shape: str
    background: str

    @property
    def caption(self) -> str:
        """For example "a red circle left of an orange square on a gray background"."""
        first, second = f"{self.first_colour} {self.first_shape}", f"{self.second_colour} {self.second_shape}"
        return f"{with_article(first)} {self.relation} {with_article(second)} on a {self.background} background"

    @classmethod
    def parse(cls, caption: str) -> "TwoShapes | None":
        """The content of a caption, or None if it describes no two shapes."""
        match = _CAPTION.fullmatch(plain(caption))
        return None if match is None else cls(*match.groups())


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a picture shows.

    Attributes:
        shapes: colour, shape and centre (x, y) of each shape. A name is None if it was not recognised.
        background: name of the background's colour.
    """

    shapes: tuple[tuple[str | None, str | None, tuple[float, float]], ...]
    background: str | None


def all_two_shapes() -> Iterator[TwoShapes]:
    """All 27,648 possible pictures."""
    subjects = list(itertools.product(COLOURS, SHAPES))
    for first, relation, second, background in itertools.product(subjects, RELATIONS, subjects, BACKGROUNDS):
        yield TwoShapes(*first, relation, *second, background)


def held_out(scene: TwoShapes) -> bool:
    """Whether training must not see these two shapes together, in any relation: about one pair in eight.

    Which of them is named first does not matter, because "A left of B" is the same picture as "B right of A".
    """
    pair = sorted((f"{scene.first_colour} {scene.first_shape}", f"{scene.second_colour} {scene.second_shape}"))
    return hashlib.sha256(", ".join(pair).encode()).digest()[0] < 32


def draw_two_shapes(rng: np.random.Generator, *, unseen: bool) -> TwoShapes:
    """Draws a picture at random. `unseen` says whether training must not have seen its two shapes together."""
    while True:
        colours, shapes = rng.choice(list(COLOURS), 2), rng.choice(SHAPES, 2)
        relation, background = rng.choice(list(RELATIONS)), rng.choice(list(BACKGROUNDS))
        names = (colours[0], shapes[0], relation, colours[1], shapes[1], background)
        scene = TwoShapes(*map(str, names))
        if held_out(scene) == unseen:
            return scene


def rasterise(scene: TwoShapes, side: int, variations: Sequence[procedural.Variation] = ()) -> np.ndarray:
    """Rasterises two shapes to uint8 [side, side, 3]. There may be a variation for each of them.

    The tint of the background is that of the first variation.
    """
    variations = [*variations, *[procedural.Variation()] * 2][:2]
    step = np.array(RELATIONS[scene.relation])
    centres = [
        0.5 + _APART * direction + variation.shift
        for direction, variation in zip((step, -step), variations, strict=True)
    ]
    shapes = (
        (scene.first_colour, scene.first_shape, centres[0], _RADIUS),
        (scene.second_colour, scene.second_shape, centres[1], _RADIUS),
    )
    return procedural.rasterise_shapes(scene.background, shapes, side, variations)


def read(pixels: np.ndarray) -> Seen:
    """Recognises the content of a picture.

    Args:
        pixels: uint8, or float in 0..255, [side, side, 3].
    """
    pixels = np.asarray(pixels, np.float64)
    parts = _cut(pixels)
    found = []
    for part in parts if parts is not None else [pixels]:
        still, centre = procedural.read_placed_still(part)
        if still.colour is not None and centre is not None:
            found.append((still.colour, still.shape, centre))
    return Seen(tuple(found), procedural.background_of(pixels))


def right(wanted: TwoShapes, seen: Seen) -> dict[str, bool]:
    """Which of `ATTRIBUTES` a picture shows.

    The shapes are named first and second so that most is right. The relation counts only between shapes of which each
    has the right colour or the right shape; otherwise one of the two ways round would always be right.
    """
    best: dict[str, bool] = {}
    for shapes in itertools.permutations([*seen.shapes, *[(None, None, None)] * 2][:2]):
        (colour, shape, place), (other_colour, other_shape, other_place) = shapes
        found = {
            "first_colour": colour == wanted.first_colour,
            "first_shape": shape == wanted.first_shape,
            "second_colour": other_colour == wanted.second_colour,
            "second_shape": other_shape == wanted.second_shape,
        }
        known = (found["first_colour"] or found["first_shape"]) and (found["second_colour"] or found["second_shape"])
        found["relation"] = known and _relation(place, other_place) == wanted.relation
        if sum(found.values()) > sum(best.values()) or not best:
            best = found
    return {**best, "background": seen.background == wanted.background}


def _relation(first: tuple[float, float], second: tuple[float, float]) -> str | None:
    """The relation of two places, or None if it is not clearly along an axis."""
    offset = np.subtract(first, second)
    along = int(np.abs(offset).argmax())
    if abs(offset[1 - along]) > abs(offset[along]) / 2:
        return None
    unit = tuple(int(np.sign(offset[along])) if axis == along else 0 for axis in range(2))
    return next((name for name, step in RELATIONS.items() if step == unit), None)


def _cut(pixels: np.ndarray) -> list[np.ndarray] | None:
    """Two pictures with one shape each and the background in place of the other, or None if there is no gap."""
    strength = procedural.strength_of(pixels)
    if strength is None:
        return None
    ground, amount = strength
    best = (_VALLEY, 0, 0)
    for axis in range(2):
        profile = amount.sum(axis=1 - axis)
        for line in range(1, len(profile) - 1):
            before, after = profile[:line].max(), profile[line + 1 :].max()
            lower = min(before, after)
            if lower > 0.2 * profile.max() and profile[line] / lower < best[0]:
                best = (profile[line] / lower, axis, line)
    if best[0] == _VALLEY:
        return None
    _, axis, line = best
    parts = []
    for kept in (slice(None, line), slice(line + 1, None)):
        part = np.broadcast_to(ground, pixels.shape).copy()
        place = (kept, slice(None)) if axis == 0 else (slice(None), kept)
        part[place] = pixels[place]
        parts.append(part)
    return parts

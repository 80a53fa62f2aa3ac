"""Pictures of several coloured shapes, counted or in a row: drawing them, captioning them, and reading them in pixels.

A picture has up to six shapes of one or two kinds ("three red circles and one blue square"), or a row or column of
three ("from left to right: a red circle, a blue square and a green star"). The reader finds the parts of the picture
that hang together, and reads each as a picture of one shape (see `procedural`). It needs pictures of 64 pixels a side.
"""

import collections
import dataclasses
import hashlib
import itertools
import re

import numpy as np
from scipy import ndimage

from emu3_jax.evaluation import procedural
from emu3_jax.evaluation.procedural import BACKGROUNDS, COLOURS, SHAPES, plain, with_article
from emu3_jax.evaluation.relations import Seen

ORDERS = {"from left to right": (1, 0), "from top to bottom": (0, 1)}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
ATTRIBUTES = ("count", "things", "order", "background")
SMALLEST_SIDE = 64  # of a picture that can be read, in pixels

_ROW_PLACES = {
    "from left to right": ("on the left", "in the middle", "on the right"),
    "from top to bottom": ("at the top", "in the middle", "at the bottom"),
}
_MOST = 5  # shapes of one kind
_RADIUS = 0.115  # of each shape, as a share of the side
_LINES = (0.19, 0.5, 0.81)  # rows and columns on which shapes lie
_SHIFT = 0.4  # of a variation's shift that a shape gets: more would let neighbours touch
_ASIDE = 0.2  # largest distance of a row from the middle
_SMALLEST = 0.25  # of the area of a square's silhouette; smaller parts are noise, and a star has 0.4
_PLURALS = {shape: f"{shape}es" if shape.endswith("s") else f"{shape}s" for shape in SHAPES}
_THING = rf"({'|'.join(NUMBERS[1 : _MOST + 1])}) ({'|'.join(COLOURS)}) ({'|'.join([*SHAPES, *_PLURALS.values()])})"
_ONE = rf"an? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_GROUND = rf"on an? ({'|'.join(BACKGROUNDS)}) background"
_COUNTED = re.compile(rf"{_THING}(?: and {_THING})? {_GROUND}")
_ROW = re.compile(rf"({'|'.join(ORDERS)}): {_ONE}, {_ONE} and {_ONE} {_GROUND}")


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """The content of a picture.

    Attributes:
        things: number, colour and shape of each kind, or of each shape of a row in its order.
        order: of `ORDERS` for a row, else None.
        background: name of the background's colour.
    """

    things: tuple[tuple[int, str, str], ...]
    order: str | None
    background: str

    @property
    def caption(self) -> str:
        """For example "two red circles and one blue square on a gray background"."""
        if self.order is None:
            said = " and ".join(
                f"{NUMBERS[number]} {colour} {shape if number == 1 else _PLURALS[shape]}"
                for number, colour, shape in self.things
            )
        else:
            first, second, third = (with_article(f"{colour} {shape}") for _, colour, shape in self.things)
            said = f"{self.order}: {first}, {second} and {third}"
        return f"{said} on a {self.background} background"

    @property
    def shapes(self) -> list[tuple[str, str]]:
        """Colour and shape of each shape."""
        return [(colour, shape) for number, colour, shape in self.things for _ in range(number)]

    @property
    def questions(self) -> dict[str, str]:
        """Questions about the picture, and their answers."""
        asked = {"How many shapes are there?": NUMBERS[len(self.shapes)]}
        if self.order is None:
            for number, colour, shape in self.things:
                asked[f"How many {colour} {_PLURALS[shape]} are there?"] = NUMBERS[number]
        else:
            for place, (_, colour, shape) in zip(_ROW_PLACES[self.order], self.things, strict=True):
                asked[f"What is {place}?"] = with_article(f"{colour} {shape}")
        return asked

    @classmethod
    def parse(cls, caption: str) -> "Arrangement | None":
        """The content of a caption, or None if it describes no such picture."""
        caption = plain(caption)
        if match := _ROW.fullmatch(caption):
            order, *words, ground = match.groups()
            return cls(tuple((1, *pair) for pair in zip(words[::2], words[1::2], strict=True)), order, ground)
        if match := _COUNTED.fullmatch(caption):
            *words, ground = (word for word in match.groups() if word is not None)
            singular = {plural: shape for shape, plural in _PLURALS.items()}
            things = [
                (NUMBERS.index(n), colour, singular.get(s, s))
                for n, colour, s in zip(words[::3], words[1::3], words[2::3], strict=True)
            ]
            found = cls(tuple(things), None, ground)
            return found if found.caption == caption else None  # "one red circles" is none
        return None


def held_out(scene: Arrangement) -> bool:
    """Whether training must not see this arrangement, in any order or on any background: about one in eight."""
    names = sorted(f"{number} {colour} {shape}" for number, colour, shape in scene.things)
    return hashlib.sha256(", ".join(names).encode()).digest()[0] < 32


def draw_arrangement(rng: np.random.Generator, *, unseen: bool) -> Arrangement:
    """Draws an arrangement at random. `unseen` says whether it is held out of training."""
    while True:
        background, kind = _choose(rng, BACKGROUNDS), rng.integers(3)
        if kind == 0:
            things = ((int(rng.integers(2, _MOST + 1)), *_subject(rng)),)
        elif kind == 1:
            numbers = rng.permuted([int(rng.integers(1, 4)), int(rng.integers(2, 4))])
            things = tuple((int(number), *_subject(rng)) for number in numbers)
        else:
            things = tuple((1, *_subject(rng)) for _ in range(3))
        scene = Arrangement(things, _choose(rng, ORDERS) if kind == 2 else None, background)
        # Two kinds must differ, or the numbers would add up.
        if len({thing[1:] for thing in things}) == len(things) and held_out(scene) == unseen:
            return scene


def rasterise(scene: Arrangement, side: int, rng: np.random.Generator) -> np.ndarray:
    """Rasterises an arrangement to uint8 [side, side, 3]. Places, sizes and colours vary a little with `rng`."""
    variations = [procedural.Variation.draw(rng) for _ in scene.shapes]
    shapes = [
        (colour, shape, np.add(place, np.multiply(_SHIFT, variation.shift)), _RADIUS)
        for (colour, shape), place, variation in zip(scene.shapes, _places(scene, rng), variations, strict=True)
    ]
    return procedural.rasterise_shapes(scene.background, shapes, side, variations)


def read(pixels: np.ndarray) -> Seen:
    """Recognises the content of a picture.

    Args:
        pixels: uint8, or float in 0..255, [side, side, 3], side at least 64.
    """
    pixels = np.asarray(pixels, np.float64)
    background = procedural.background_of(pixels)
    strength = procedural.strength_of(pixels)
    if strength is None:
        return Seen((), background)
    ground, amount = strength
    labels, count = ndimage.label(amount > 0.5)
    smallest = _SMALLEST * (1.7 * _RADIUS * len(pixels)) ** 2
    found = []
    for label in range(1, count + 1):
        inside = labels == label
        if inside.sum() < smallest:
            continue
        # The soft edge around the part belongs to it; other parts do not.
        edge = ndimage.binary_dilation(inside, np.ones((3, 3))) & (labels == 0)
        part = np.where((inside | edge)[..., None], pixels, ground)
        still, centre = procedural.read_placed_still(part)
        if still.colour is not None and centre is not None:
            found.append((still.colour, still.shape, centre))
    return Seen(tuple(found), background)


def right(wanted: Arrangement, seen: Seen) -> dict[str, bool]:
    """Which of `ATTRIBUTES` a picture shows.

    `count` is the number of all shapes, `things` how many there are of each colour and shape. `order` of a row holds if
    all shapes are right and follow each other as wanted; without an order it is what `things` is.
    """
    shown = [(colour, shape) for colour, shape, _ in seen.shapes]
    things = collections.Counter(shown) == collections.Counter(wanted.shapes)
    order = things
    if wanted.order is not None and things:
        axis = ORDERS[wanted.order].index(1)
        centres = np.array([centre for _, _, centre in seen.shapes])
        spread = np.ptp(centres, axis=0)
        in_order = [shown[index] for index in np.argsort(centres[:, axis])]
        order = bool(in_order == wanted.shapes and spread[axis] > 2 * spread[1 - axis])
    return {
        "count": len(shown) == len(wanted.shapes),
        "things": things,
        "order": order,
        "background": seen.background == wanted.background,
    }


def _places(scene: Arrangement, rng: np.random.Generator) -> list[tuple[float, float]]:
    if scene.order is None:
        cells = list(itertools.product(_LINES, _LINES))
        return [cells[index] for index in rng.choice(len(cells), len(scene.shapes), replace=False)]
    across = 0.5 + rng.uniform(-_ASIDE, _ASIDE)
    return [(line, across) if ORDERS[scene.order][0] else (across, line) for line in _LINES]


def _subject(rng: np.random.Generator) -> tuple[str, str]:
    return _choose(rng, COLOURS), _choose(rng, SHAPES)


def _choose(rng: np.random.Generator, names) -> str:
    return str(rng.choice(list(names)))

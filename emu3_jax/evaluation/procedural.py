"""Coloured shapes on plain backgrounds: rasterising them, captioning them, and recognising them in pixels.

Such pictures and clips can be scored exactly, without a trained judge. The reader takes the background colour from the
border. Pixels that differ from it give the colour and the place of the shape. The silhouette is then compared with
every shape, rasterised at the same place and size. The reader therefore tolerates blur, noise and small shifts of
generated pictures. It returns None for what it cannot recognise. It needs only NumPy.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 220, 50),
    "green": (60, 170, 75),
    "blue": (50, 90, 220),
    "purple": (140, 60, 190),
    "pink": (245, 140, 190),
    "brown": (130, 80, 45),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
SIZES = {"small": 0.17, "large": 0.28}  # radius as a share of the picture's side
BACKGROUNDS = {"white": (255, 255, 255), "gray": (150, 150, 150), "black": (15, 15, 15)}
POSITIONS = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "center": (0, 0)}
MOTIONS = ("moves left", "moves right", "moves up", "moves down", "grows", "blinks")
FRAMES = 8

_PLACES = {"left": "on the left of", "right": "on the right of", "top": "at the top of", "bottom": "at the bottom of"}
_DIRECTIONS = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}
# Encoders of animated pictures merge equal frames. The first and the last frame differ from their neighbours, so that
# the merged frames can still be counted.
_BLINK = (True, False, False, True, True, False, False, True)
_GROWTH = 1.65
_MARGIN = 0.03
_REACH = 1.2  # every shape of radius 1 lies within this distance of its centre
_SAMPLES = 8  # samples per pixel along each axis
_BLURS = (0.0, 0.02, 0.035)  # standard deviations of blur to try for a silhouette, as shares of the side

_FAINTEST = 45.0  # smallest RGB distance from the background that counts as a shape
_UNCLEAR = 0.45  # a shape is recognised if it disagrees on at most this share of the silhouette's area
_COMPARED = 4  # number of a clip's frames whose silhouettes are compared with the shapes
_MOVED = 0.09  # smallest offset that counts, as a share of the side; a large shape at an edge is 0.2 off the centre
_GROWN = 1.25  # smallest growth of the radius that counts over a whole clip; `rasterise_clip` uses _GROWTH


@dataclasses.dataclass(frozen=True)
class Still:
    """The content of a picture. A field is None if it could not be recognised."""

    colour: str | None
    shape: str | None
    size: str | None
    background: str | None
    position: str | None

    @property
    def caption(self) -> str:
        """For example "a small red circle on the left of a gray background"."""
        place = _PLACES.get(self.position, "in the center of")
        return f"a {self.size} {self.colour} {self.shape} {place} a {self.background} background"


@dataclasses.dataclass(frozen=True)
class Motion:
    """The content of a clip. A field is None if it could not be recognised."""

    colour: str | None
    shape: str | None
    size: str | None
    background: str | None
    motion: str | None

    @property
    def caption(self) -> str:
        """For example "a small red circle moves right on a gray background"."""
        return f"a {self.size} {self.colour} {self.shape} {self.motion} on a {self.background} background"


def all_stills() -> Iterator[Still]:
    """All 1,440 possible stills."""
    return itertools.starmap(Still, itertools.product(COLOURS, SHAPES, SIZES, BACKGROUNDS, POSITIONS))


def all_clips() -> Iterator[Motion]:
    """All 1,728 possible clips."""
    return itertools.starmap(Motion, itertools.product(COLOURS, SHAPES, SIZES, BACKGROUNDS, MOTIONS))


@dataclasses.dataclass(frozen=True)
class Variation:
    """How a drawing differs from the exact one, so little that `read_still` and `read_clip` read the same.

    Attributes:
        shift: (right, down), as shares of the side.
        scale: factor of the radius.
        tint, ground_tint: added to the RGB of the shape and of the background.
    """

    shift: tuple[float, float] = (0.0, 0.0)
    scale: float = 1.0
    tint: tuple[int, int, int] = (0, 0, 0)
    ground_tint: tuple[int, int, int] = (0, 0, 0)

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Variation":
        """Draws a variation."""
        right, down = rng.uniform(-0.02, 0.02, 2)
        tints = rng.integers(-18, 19, 3), rng.integers(-12, 13, 3)
        tint, ground = (tuple(map(int, values)) for values in tints)
        return cls((float(right), float(down)), float(rng.uniform(0.92, 1.1)), tint, ground)


def rasterise_still(still: Still, side: int, variation: Variation = Variation()) -> np.ndarray:
    """Rasterises a still to uint8 [side, side, 3]."""
    radius = SIZES[still.size]
    x, y = np.add(_place(POSITIONS[still.position], radius), variation.shift)
    mask = _mask(still.shape, side, float(x), float(y), radius * variation.scale)
    return _paint(still, mask, variation.tint, variation.ground_tint)


def rasterise_clip(clip: Motion, side: int, variation: Variation = Variation()) -> np.ndarray:
    """Rasterises a clip to uint8 [FRAMES, side, side, 3]. A growing shape has its named size in the first frame."""
    radius = SIZES[clip.size]
    frames = []
    for number in range(FRAMES):
        share = number / (FRAMES - 1)
        x, y = _place(_DIRECTIONS.get(clip.motion, (0, 0)), radius)
        x, y = (0.5 + (2 * share - 1) * (x - 0.5), 0.5 + (2 * share - 1) * (y - 0.5))
        scale = 1 + (_GROWTH - 1) * share if clip.motion == "grows" else 1.0
        x, y = x + variation.shift[0], y + variation.shift[1]
        mask = _mask(clip.shape, side, x, y, radius * scale * variation.scale)
        hidden = clip.motion == "blinks" and not _BLINK[number]
        frames.append(_paint(clip, np.zeros_like(mask) if hidden else mask, variation.tint, variation.ground_tint))
    return np.stack(frames)


def read_still(pixels: np.ndarray) -> Still:
    """Recognises the content of a picture.

    Args:
        pixels: uint8, or float in 0..255, [side, side, 3].

    Returns:
        The content. Without a visible shape, all fields but `background` are None.
    """
    return read_placed_still(pixels)[0]


def read_placed_still(pixels: np.ndarray) -> tuple[Still, tuple[float, float] | None]:
    """`read_still`, and the centre of mass (x, y) of the shape as shares of the side; None without a visible shape."""
    frames = np.asarray(pixels, np.float64)[None]
    seen = _see(frames)
    if seen is None:
        return Still(None, None, None, _background(frames), None), None
    shape, size = _shape_and_size(seen, [0])
    offset = seen.centres[0] - 0.5
    position = None
    if shape is not None:
        position = _direction(offset, _MOVED, tuple(POSITIONS.items())) or (
            "center" if np.abs(offset).max() < _MOVED else None
        )
    centre = (float(seen.centres[0, 0]), float(seen.centres[0, 1]))
    return Still(seen.colour, shape, size, seen.background, position), centre


def background_of(pixels: np.ndarray) -> str:
    """The name of a picture's background colour. `pixels`: uint8, or float in 0..255, [side, side, 3]."""
    return _background(pixels[None])


def strength_of(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """How much each pixel of a picture differs from the background, whatever its colour.

    Args:
        pixels: uint8, or float in 0..255, [side, side, 3].

    Returns:
        The background's RGB, and values [side, side] from 0 to 1. None if nothing stands out.
    """
    pixels = np.asarray(pixels, np.float64)
    ground = np.median(_border(pixels[None]), axis=0)
    distance = np.linalg.norm(pixels - ground, axis=-1)
    if np.percentile(distance, 99.5) < _FAINTEST:
        return None
    # Faint colours must not be lost beside strong ones.
    return ground, np.clip((distance - 0.3 * _FAINTEST) / _FAINTEST, 0, 1)


def read_clip(frames: np.ndarray, span: float = 1.0) -> Motion:
    """Recognises the content of a clip.

    Args:
        frames: uint8, or float in 0..255, [T, side, side, 3], T >= 3.
        span: share of a whole clip that the frames cover. Thresholds for motion and growth are scaled by it.

    Returns:
        The content. Without a visible shape, all fields but `background` are None.
    """
    frames = np.asarray(frames, np.float64)
    seen = _see(frames)
    if seen is None:
        return Motion(None, None, None, _background(frames), None)
    visible = np.flatnonzero(seen.visible)
    motion = _motion(seen, visible, span)
    # A growing shape has the size of its caption only in the first frame.
    compared = visible[:: -(-len(visible) // _COMPARED)]
    shape, size = _shape_and_size(seen, compared, visible[:1] if motion == "grows" else visible)
    return Motion(seen.colour, shape, size, seen.background, motion)


def read_extension(frames: np.ndarray, given: int) -> Motion:
    """Recognises the content of the generated part of an extended clip.

    Colour, shape, size and background are read from the new frames only. Motion is read from the last given frame on:
    the new frames must continue from there, and motion within the given frames does not count.

    Args:
        frames: uint8, or float in 0..255, [FRAMES, side, side, 3].
        given: number of given frames at the start.

    Returns:
        The content of the new frames.
    """
    new = read_clip(frames[given:], (FRAMES - given - 1) / (FRAMES - 1))
    seen = _see(np.asarray(frames[given - 1 :], np.float64))
    if new.colour is None or seen is None:
        return dataclasses.replace(new, motion=None)
    motion = _motion(seen, np.flatnonzero(seen.visible), (FRAMES - given) / (FRAMES - 1))
    return dataclasses.replace(new, motion=motion)


@dataclasses.dataclass(frozen=True)
class _Seen:
    """The shape that stands out from the background.

    Attributes:
        background: name of the background colour.
        colour: name of the shape's colour.
        masks: soft silhouettes [T, H, W], from 0 to 1.
        centres: centres of mass (x, y) [T, 2], as shares of the side.
        areas: areas [T], as shares of the picture.
    """

    background: str
    colour: str
    masks: np.ndarray
    centres: np.ndarray
    areas: np.ndarray

    @property
    def visible(self) -> np.ndarray:
        """bool [T]: whether the shape is visible in a frame."""
        return self.areas > 0.35 * np.median(self.areas[self.areas > 0.35 * self.areas.max()])


def _see(frames: np.ndarray) -> _Seen | None:
    """Separates the shape from the background. Returns None if no shape stands out."""
    ground = np.median(_border(frames), axis=0)
    distance = np.linalg.norm(frames - ground, axis=-1)
    peak = np.percentile(distance, 99.5)
    if peak < _FAINTEST:
        return None
    colour = np.median(frames[distance > 0.8 * peak], axis=0)
    axis = colour - ground
    masks = _sharpen((frames - ground) @ axis / (axis @ axis))
    side = masks.shape[-1]
    areas = masks.mean((1, 2))
    if not areas.any():
        return None
    steps = (np.arange(side) + 0.5) / side
    weight = np.maximum(areas, 1e-9)
    x, y = (masks.mean(1) * steps).mean(1) / weight, (masks.mean(2) * steps).mean(1) / weight
    return _Seen(_nearest(ground, BACKGROUNDS), _nearest(colour, COLOURS), masks, np.stack([x, y], -1), areas)


def _shape_and_size(seen: _Seen, frames, sized=None) -> tuple[str | None, str | None]:
    """The shape that fits the silhouettes of `frames` best, and its size in the frames `sized`; None if none fits."""
    side = seen.masks.shape[-1]
    errors = {}
    for shape in SHAPES:
        unit_area, unit_centre = _unit(shape)
        wrong = np.zeros(len(_BLURS))
        for i in frames:
            radius = float(np.sqrt(seen.areas[i] / unit_area))
            expected = _rasterise(shape, side, *(seen.centres[i] - radius * unit_centre), radius, samples=4)
            for number, blur in enumerate(_BLURS):
                difference = np.abs(_sharpen(_blurred(expected, blur)) - seen.masks[i]).sum()
                wrong[number] += difference / max(seen.masks[i].sum(), 1e-9)
        errors[shape] = wrong.min() / len(frames)
    best = min(errors, key=errors.get)
    if errors[best] > _UNCLEAR:
        return None, None
    radius = np.median(np.sqrt(seen.areas[list(frames if sized is None else sized)] / _unit(best)[0]))
    return best, min(SIZES, key=lambda size: abs(np.log(radius / SIZES[size])))


def _motion(seen: _Seen, visible: np.ndarray, span: float) -> str | None:
    first, last = visible[0], visible[-1]
    if len(visible) < last - first + 1:  # the shape is hidden in a frame in between
        return "blinks"
    if len(visible) < 3:
        return None
    moved = _direction(seen.centres[last] - seen.centres[first], 2 * _MOVED * span, tuple(_DIRECTIONS.items()))
    if moved:
        return moved
    return "grows" if np.sqrt(seen.areas[last] / seen.areas[first]) > _GROWN**span else None


def _direction(offset: np.ndarray, least: float, directions: tuple) -> str | None:
    """The name of the direction of `offset` (x, y). None if it is shorter than `least` or not clearly along an axis."""
    along = int(np.abs(offset).argmax())
    if abs(offset[along]) < least or abs(offset[1 - along]) > abs(offset[along]) / 2:
        return None
    unit = [0, 0]
    unit[along] = int(np.sign(offset[along]))
    return next(name for name, direction in directions if direction == tuple(unit))


def _background(frames: np.ndarray) -> str:
    return _nearest(np.median(_border(np.asarray(frames, np.float64)), axis=0), BACKGROUNDS)


def _border(frames: np.ndarray) -> np.ndarray:
    """The outermost pixels of all frames, [N, 3]. Shapes never reach them."""
    edges = (frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1])
    return np.concatenate([edge.reshape(-1, 3) for edge in edges])


def _nearest(colour: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str:
    return min(names, key=lambda name: np.linalg.norm(colour - np.array(names[name])))


def _place(direction: tuple[int, int], radius: float) -> tuple[float, float]:
    """The centre (x, y) of a shape that is moved in `direction` as far as the margin allows."""
    reach = 0.5 - _MARGIN - radius
    return 0.5 + reach * direction[0], 0.5 + reach * direction[1]


def _paint(
    scene: Still | Motion, mask: np.ndarray, tint: Sequence[int] = (0,), ground_tint: Sequence[int] = (0,)
) -> np.ndarray:
    colour = np.clip(np.add(COLOURS[scene.colour], tint), 0, 255)
    ground = np.clip(np.add(BACKGROUNDS[scene.background], ground_tint), 0, 255)
    return np.rint(ground + mask[..., None] * (colour - ground)).astype(np.uint8)


def plain(caption: str) -> str:
    """A caption as it is compared: in lower case, with single blanks, without a final full stop."""
    return " ".join(caption.lower().split()).rstrip(".")


def with_article(words: str) -> str:
    """For example "an orange square"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def rasterise_shapes(
    background: str, shapes: Iterable[tuple[str, str, np.ndarray, float]], side: int, variations: Sequence[Variation]
) -> np.ndarray:
    """Rasterises several shapes to uint8 [side, side, 3].

    Args:
        background: of `BACKGROUNDS`. Its tint is that of the first variation.
        shapes: colour, shape, centre (x, y) and radius of each; centre and radius as shares of the side.
        side: side of the picture in pixels.
        variations: one for each shape. Their shifts are part of the centres already.
    """
    ground = np.clip(np.add(BACKGROUNDS[background], variations[0].ground_tint), 0, 255)
    pixels = np.broadcast_to(ground, (side, side, 3)).astype(np.float64)
    for (colour, shape, (x, y), radius), variation in zip(shapes, variations, strict=True):
        mask = _mask(shape, side, float(x), float(y), radius * variation.scale)[..., None]
        pixels += mask * (np.clip(np.add(COLOURS[colour], variation.tint), 0, 255) - pixels)
    return np.rint(pixels).astype(np.uint8)


@functools.lru_cache(maxsize=1024)
def _mask(shape: str, side: int, x: float, y: float, radius: float) -> np.ndarray:
    """A shape's silhouette. The cache holds the few hundred silhouettes that all colours and backgrounds share."""
    return _rasterise(shape, side, x, y, radius)


def _rasterise(shape: str, side: int, x: float, y: float, radius: float, *, samples: int = _SAMPLES) -> np.ndarray:
    """The share of each pixel that the shape covers, [side, side], from 0 to 1."""
    mask = np.zeros((side, side))
    rows, columns = (_span(centre, _REACH * radius, side) for centre in (y, x))
    ys, xs = (_points(span, samples) / side for span in (rows, columns))
    inside = _inside(shape, (xs[None, :] - x) / radius, (ys[:, None] - y) / radius)
    inside = inside.reshape(len(ys) // samples, samples, len(xs) // samples, samples)
    mask[rows, columns] = inside.sum((1, 3), dtype=np.int64) / samples**2
    return mask


def _span(centre: float, reach: float, side: int) -> slice:
    """The pixels along one axis that a shape can cover."""
    low, high = np.floor((centre - reach) * side), np.ceil((centre + reach) * side)
    return slice(int(np.clip(low, 0, side)), int(np.clip(high, 0, side)))


def _points(span: slice, samples: int) -> np.ndarray:
    """Coordinates, in pixels, of the sample points in a span."""
    return span.start + (np.arange((span.stop - span.start) * samples) + 0.5) / samples


def _sharpen(strength: np.ndarray) -> np.ndarray:
    """Removes weak noise and steepens edges. The function is symmetric about 1/2, so a blurred edge does not move."""
    return np.clip((strength - 0.2) / 0.6, 0, 1)


def _blurred(mask: np.ndarray, deviation: float) -> np.ndarray:
    """Blurs `mask` [side, side] with a Gaussian of standard deviation `deviation`, a share of the side."""
    if not deviation:
        return mask
    kernel = _kernel(len(mask), deviation)
    return kernel @ mask @ kernel.T


@functools.cache
def _kernel(side: int, deviation: float) -> np.ndarray:
    steps = np.arange(side) / side
    kernel = np.exp(-(((steps[:, None] - steps) / deviation) ** 2) / 2)
    return kernel / kernel.sum(1, keepdims=True)


@functools.cache
def _unit(shape: str) -> tuple[float, np.ndarray]:
    """Area and centre of mass (x, y) of the shape of radius 1 around the origin."""
    mask = _rasterise(shape, 256, 0.5, 0.5, 0.25, samples=2)
    steps = (np.arange(256) + 0.5) / 256 - 0.5
    centre = np.array([(mask.sum(0) * steps).sum(), (mask.sum(1) * steps).sum()]) / mask.sum()
    return float(mask.mean()) * 16, centre * 4


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points (x, y) lie inside the shape of radius 1. The y axis points down."""
    if shape == "circle":
        return x**2 + y**2 <= 1
    if shape == "square":
        return (np.abs(x) <= 0.85) & (np.abs(y) <= 0.85)
    if shape == "cross":
        wide, narrow = 0.95, 0.33
        return ((np.abs(x) <= wide) & (np.abs(y) <= narrow)) | ((np.abs(x) <= narrow) & (np.abs(y) <= wide))
    if shape == "triangle":
        return (y <= 0.8) & (y >= -0.95 + 1.8 * np.abs(x))
    if shape == "heart":
        u, v = 1.2 * x, -1.2 * y + 0.1
        ring = u**2 + v**2 - 1
        return ring * ring * ring - u**2 * v**3 <= 0  # `** 3` takes ten times as long
    angle = np.mod(np.arctan2(x, -y), 0.4 * np.pi)  # star: one of five equal points
    angle = np.minimum(angle, 0.4 * np.pi - angle)
    tip, notch = 1.0, 0.42
    # The edge runs from the tip (angle 0) to the notch (angle pi / 5).
    edge = tip * notch * np.sin(0.2 * np.pi) / (notch * np.sin(0.2 * np.pi - angle) + tip * np.sin(angle))
    return np.hypot(x, y) <= edge

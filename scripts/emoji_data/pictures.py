"""Pictures and clips of the packages as small RGB arrays on white.

Pictures come as V views: the first fills its square as the package has it, the next ones are smaller and off-centre,
the last ones are close-ups of a part, half of them mirrored.
"""

import io
import json
import pathlib
import random
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from emoji_data.concepts import is_skin_variant, normalise
from emoji_data.packages import read_members
from emu3_jax.errors import Emu3Error

FRAMES = 8
STILL = 4.0  # a clip in which no frame differs from the first by this much on average, of 255, does not move
_BLANK = 1.0  # spread of the pixel values, of 255, below which a picture shows nothing
_OVERSAMPLING = 4
_SMALLER = (0.78, 1.0)  # size of a smaller view, as a share of the first's
_CLOSEUP = (1.15, 2.0)  # likewise of a close-up
_SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{body}</svg>'
)

# What becomes of a file or drawing: its codepoint, and pixels [V, H, W, 3] or, as text, why it is not used.
Picture = tuple[str, np.ndarray | str]


def load_pictures(
    tarball: pathlib.Path, labelled: set[str], size: int, smaller: int, closeups: int
) -> Iterator[Picture]:
    """The pictures in a package of WebP files that are named by codepoint, each with so many further views."""
    seen = set()
    for name, data in read_members(tarball, ".webp"):
        codepoint, reason = _judge(pathlib.PurePath(name).stem, labelled, seen)
        if reason:
            yield codepoint, reason
            continue
        with Image.open(io.BytesIO(data)) as picture:
            yield codepoint, unless_blank(views_of(picture, size, smaller, closeups, codepoint))


def load_drawings(
    tarball: pathlib.Path, characters: dict[str, str], labelled: set[str], size: int, *, smaller: int, closeups: int
) -> Iterator[Picture]:
    """The drawings in an Iconify package.

    Args:
        tarball: of the package.
        characters: names of drawings by codepoint.
        labelled: codepoints that have labels.
        size: side of the pictures.
        smaller: further views of each that are smaller.
        closeups: further views of each that are close-ups.
    """
    icons = read_json(tarball, "package/icons.json")
    seen = set()
    for hexcode, name in sorted(characters.items()):
        icon = resolve_icon(icons, name)
        if icon is None:
            continue  # another package's character list may name more than this one draws
        codepoint, reason = _judge(hexcode, labelled, seen)
        yield (
            codepoint,
            reason
            or _unless_broken(
                lambda icon=icon, codepoint=codepoint: views_of(
                    render_icon(icon, size), size, smaller, closeups, codepoint
                )
            ),
        )


def load_characters(tarball: pathlib.Path) -> dict[str, str]:
    """Names of drawings by codepoint, as an Iconify package lists them."""
    return read_json(tarball, "package/chars.json")


def load_clips(tarball: pathlib.Path, labelled: set[str], size: int) -> Iterator[tuple[str, np.ndarray | str, float]]:
    """The clips in a package: codepoint, `FRAMES` frames or why there are none, and frames per second."""
    seen = set()
    for name, data in read_members(tarball, ".webp"):
        codepoint, reason = _judge(pathlib.PurePath(name).stem, labelled, seen)
        if reason:
            yield codepoint, reason, 0.0
            continue
        with Image.open(io.BytesIO(data)) as animation:
            if getattr(animation, "n_frames", 1) == 1:
                yield codepoint, "only one frame", 0.0
                continue
            frames, seconds = _sample(animation, size)
        moved = max(np.abs(frame.astype(int) - frames[0]).mean() for frame in frames)
        yield codepoint, (frames if moved >= STILL else "does not move"), FRAMES / seconds


def _judge(hexcode: str, labelled: set[str], seen: set[str]) -> tuple[str, str | None]:
    """The codepoint of a file, and why it is not used, if so."""
    codepoint = normalise(hexcode)
    if codepoint in labelled and codepoint not in seen:
        seen.add(codepoint)
        return codepoint, None
    if codepoint in seen:
        return codepoint, "second picture of its codepoint"
    return codepoint, "skin tone" if is_skin_variant(codepoint) else "no label"


def _sample(animation: Image.Image, size: int) -> tuple[np.ndarray, float]:
    """Frames evenly spaced over the loop, and the loop's length in seconds."""
    pictures, durations = [], []
    for number in range(animation.n_frames):
        animation.seek(number)
        pictures.append(animation.convert("RGBA"))
        durations.append(animation.info.get("duration") or 0)
    ends = np.cumsum(durations)
    times = np.arange(FRAMES) * ends[-1] / FRAMES
    shown = np.minimum(np.searchsorted(ends, times, side="right"), len(pictures) - 1)
    small = {number: on_white(pictures[number], size) for number in set(shown.tolist())}
    return np.stack([small[number] for number in shown.tolist()]), ends[-1] / 1000


def resolve_icon(icons: dict, name: str) -> dict | None:
    """A drawing under its own name or an alias, with sizes filled in; None if the package has none."""
    flip = False
    while name not in icons["icons"]:
        alias = icons.get("aliases", {}).get(name)
        if alias is None:
            return None
        flip ^= alias.get("hFlip", False)
        name = alias["parent"]
    defaults = {"left": 0, "top": 0, "width": icons.get("width", 16), "height": icons.get("height", 16)}
    icon = defaults | icons["icons"][name]
    if flip:
        axis = 2 * icon["left"] + icon["width"]
        icon["body"] = f'<g transform="translate({axis} 0) scale(-1 1)">{icon["body"]}</g>'
    return icon


def render_icon(icon: dict, size: int) -> Image.Image:
    """The drawing at some times the `size` that it is for."""
    import resvg_py

    longest = max(icon["width"], icon["height"])
    width = max(1, round(_OVERSAMPLING * size * icon["width"] / longest))
    # Fonts of the machine would make the pictures depend on it.
    png = resvg_py.svg_to_bytes(svg_string=_SVG.format(**icon), width=width, skip_system_fonts=True)
    with Image.open(io.BytesIO(bytes(png))) as picture:
        return picture.convert("RGBA")


def views_of(picture: Image.Image, size: int, smaller: int, closeups: int, codepoint: str) -> np.ndarray:
    """The first is the whole picture; sizes and places of the others follow from the codepoint."""
    chance = random.Random(codepoint)

    def draw(shares: tuple[float, float]) -> np.ndarray:
        return on_white(picture, size, chance.uniform(*shares), (chance.random(), chance.random()))

    views = [on_white(picture, size), *(draw(_SMALLER) for _ in range(smaller))]
    for _ in range(closeups):
        view = draw(_CLOSEUP)
        views.append(view[:, ::-1] if chance.random() < 0.5 else view)
    return np.stack(views)


def on_white(
    picture: Image.Image, size: int, share: float = 1.0, place: tuple[float, float] = (0.5, 0.5)
) -> np.ndarray:
    """The picture on a white square, at size x size, whose longer side is `share` of the square's. It lies, or is cut
    where it is larger, `place` of the way from left and top."""
    picture = picture.convert("RGBA")
    side = round(max(picture.size) / share)
    left, top = round((side - picture.width) * place[0]), round((side - picture.height) * place[1])
    shown = picture.crop((-left, -top, side - left, side - top))  # transparent beyond the picture
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(shown)
    return np.asarray(square.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))


def _unless_broken(draw: Callable[[], np.ndarray]) -> np.ndarray | str:
    try:
        return unless_blank(draw())
    except ValueError as error:  # the renderer's, on a drawing that it cannot read
        return f"broken drawing: {str(error).splitlines()[0]}"


def unless_blank(pixels: np.ndarray) -> np.ndarray | str:
    return pixels if pixels[0].std() >= _BLANK else "blank"


def read_json(tarball: pathlib.Path, member: str) -> dict:
    for name, data in read_members(tarball, member):
        if name == member:
            return json.loads(data)
    raise Emu3Error(f"{tarball} has no {member}: delete it and run again")

"""Picture sizes, computed as in the reference. Python's `round`, which rounds half to even, affects the results."""

import math
import re

from emu3_jax.errors import Emu3Error
from emu3_jax.printable import shown

MAX_ELONGATION = 5  # longer side divided by shorter side
# Pixels of a generated picture, and of a picture that the vision tokenizer processes at once. Published limit: 1 << 20.
MAX_AREA = 1 << 22
MAX_PIXELS = 1 << 24  # pixels of a picture that the vision tokenizer processes in tiles
_LEAST_TOKENS = 2  # along each side of a picture


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Computes the size to which a picture is resized before tokenizing (upstream's `smart_resize`).

    Both sides become multiples of `factor`, and the area is between `min_pixels` and `max_pixels`. Within these limits
    the aspect ratio changes as little as possible.

    Args:
        height: of the picture, in pixels.
        width: of the picture, in pixels.
        factor: pixels per code along each side.
        min_pixels: smallest area, in pixels.
        max_pixels: largest area, in pixels.

    Returns:
        Height and width in pixels.

    Raises:
        Emu3Error: a side is shorter than `factor`, the longer side is more than five times the shorter one, or
            `max_pixels` is too small for this picture.
    """
    size = f"a picture of {width}x{height} pixels"
    if min(height, width) < factor:
        raise Emu3Error(f"{size} is too small: each side must have at least {factor} pixels; enlarge it")
    if max(height, width) > MAX_ELONGATION * min(height, width):
        raise Emu3Error(f"{size} is too elongated: at most {MAX_ELONGATION}:1 is legal; crop it")
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = math.floor(height / shrink / factor), math.floor(width / shrink / factor)
    elif rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
    if not rows or not columns:
        raise Emu3Error(f"max_pixels {max_pixels} is too small for {size}: raise it to at least {5 * factor**2}")
    return rows * factor, columns * factor


def area_resize(height: int, width: int, factor: int, area: int) -> tuple[int, int]:
    """Computes the size to which Emu3.5 resizes a picture before tokenizing (upstream's `smart_resize`).

    The area becomes about `area`, so small pictures grow. Then each side is rounded to a multiple of `factor`, half
    up. There is no limit to the aspect ratio.

    Args:
        height: of the picture, in pixels.
        width: of the picture, in pixels.
        factor: pixels per code along each side.
        area: wanted area, in pixels.

    Returns:
        Height and width in pixels.

    Raises:
        Emu3Error: the picture has no pixels, or a side is less than half a code.
    """
    rows = columns = 0
    if height and width:
        ratio = width / height
        tall = int((area / ratio) ** 0.5)
        # Upstream rounds down twice, and takes the width from the height that is rounded down already.
        rows, columns = ((side + factor // 2) // factor for side in (tall, int(tall * ratio)))
    if not rows or not columns:
        raise Emu3Error(
            f"a picture of {width}x{height} pixels has no code at an area of {area} pixels, because a code covers "
            f"{factor}x{factor}: raise the area, or crop the picture"
        )
    return rows * factor, columns * factor


def generate_size(ratio: str, area: int, factor: int = 8, *, name: str = "area") -> tuple[int, int]:
    """Computes rows and columns of tokens for a generated picture (upstream's `calculate_generate_size`).

    Args:
        ratio: width to height, such as "16:9".
        area: of the picture, in pixels.
        factor: pixels per token along each side.
        name: how errors call the area.

    Returns:
        Rows and columns, in tokens.

    Raises:
        Emu3Error: the ratio is malformed or more elongated than 5:1, or the area is not legal or below `least_area`.
    """
    width, height = _sides(ratio)
    check_generated_area(area, name)
    size = _rounded(width, height, area, factor)
    if min(size) < _LEAST_TOKENS:
        raise Emu3Error(
            f"{name} is {area}: at ratio {ratio} it must be at least {least_area(factor, width, height)} pixels, "
            f"because each side needs {_LEAST_TOKENS} tokens of {factor}x{factor} pixels"
        )
    return size


def least_area(factor: int, width: int = 1, height: int = 1) -> int:
    """The least area in pixels that can be asked for: the shorter side is then rounded to two tokens.

    With fewer tokens, the picture could have less than half of the area that was asked for, or four times as much.

    Args:
        factor: pixels per token along each side.
        width: width of the ratio.
        height: height of the ratio.
    """
    shorter, longer = min(width, height), max(width, height)
    # Half of the last token may be missing. The division of whole numbers rounds up.
    least = -(-((2 * _LEAST_TOKENS - 1) ** 2 * factor**2 * longer) // (4 * shorter))
    while min(_rounded(width, height, least, factor)) < _LEAST_TOKENS:  # by an error of rounding
        least += 1
    return least


def _rounded(width: int, height: int, area: int, factor: int) -> tuple[int, int]:
    """Rows and columns, in whole tokens, of a picture with a ratio and an area."""
    scale = (area / (height * width)) ** 0.5
    return round(height * scale / factor), round(width * scale / factor)


def check_ratio(ratio: str) -> None:
    """Raises an `Emu3Error` if `ratio` is not width:height in whole numbers, or more elongated than 5:1."""
    _sides(ratio)


def check_generated_area(area: int, name: str = "area") -> None:
    """Raises an `Emu3Error` if no generated picture has this area. `name` is how it calls the area.

    The least area depends on the vision tokenizer and on the ratio, see `least_area`.
    """
    if not isinstance(area, int) or not 0 < area <= MAX_AREA:
        raise Emu3Error(
            f"{name} is {shown(area)}: it must be a whole number of pixels > 0 and <= {MAX_AREA}, for example 518400"
        )


def _sides(ratio: str) -> tuple[int, int]:
    """Width and height of a ratio, without a unit."""
    match = re.fullmatch(r"([0-9]{1,5}):([0-9]{1,5})", ratio) if isinstance(ratio, str) else None
    width, height = map(int, match.groups()) if match else (0, 0)
    if not width or not height:
        raise Emu3Error(f"ratio {shown(ratio)} is not width:height in whole numbers: give for example 1:1, 16:9 or 3:4")
    if max(height, width) > MAX_ELONGATION * min(height, width):
        raise Emu3Error(f"ratio {ratio} is too elongated: at most {MAX_ELONGATION}:1 or 1:{MAX_ELONGATION} is legal")
    return width, height

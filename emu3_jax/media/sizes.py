"""Picture sizes as the reference computes them; Python's `round` (half to even) decides."""

import math
import re

from emu3_jax.errors import Emu3Error
from emu3_jax.printable import shown

MAX_ELONGATION = 5  # the longer side over the shorter one
MAX_AREA = 1 << 22  # pixels of a picture that is generated, or passes the vision tokenizer whole; published: 1 << 20
MAX_PIXELS = 1 << 24  # of a picture that passes it in tiles


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size in pixels that a picture is resized to before tokenizing (upstream's `smart_resize`).

    Both sides become multiples of `factor`, the area moves into `min_pixels`..`max_pixels`, and the shape changes
    as little as that allows.

    Raises:
        Emu3Error: a side is shorter than `factor`, the longer is more than five times the shorter, or `max_pixels`
            leaves nothing.
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
        raise Emu3Error(f"max_pixels {max_pixels} leaves nothing of {size}: raise it to at least {5 * factor**2}")
    return rows * factor, columns * factor


def generate_size(ratio: str, area: int, factor: int = 8) -> tuple[int, int]:
    """Rows and columns of tokens for a picture of `area` pixels with the width-to-height `ratio`, like "16:9".

    Upstream's `calculate_generate_size`; `factor` is the pixels per token along each side.

    Raises:
        Emu3Error: the ratio is malformed or past 5:1, or the area leaves no tokens.
    """
    match = re.fullmatch(r"([0-9]{1,5}):([0-9]{1,5})", ratio)
    width, height = map(int, match.groups()) if match else (0, 0)
    if not width or not height:
        raise Emu3Error(
            f"ratio {shown(ratio)} is not width:height in whole numbers: write for example 1:1, 16:9 or 3:4"
        )
    if max(height, width) > MAX_ELONGATION * min(height, width):
        raise Emu3Error(f"ratio {ratio} is too elongated: at most {MAX_ELONGATION}:1 or 1:{MAX_ELONGATION} is legal")
    if not isinstance(area, int) or not 0 < area <= MAX_AREA:
        raise Emu3Error(
            f"area is {shown(area)}: it must be a whole number of pixels > 0 and <= {MAX_AREA}, for example 518400"
        )
    scale = (area / (height * width)) ** 0.5
    rows, columns = round(height * scale / factor), round(width * scale / factor)
    if not rows or not columns:
        raise Emu3Error(
            f"area {area} leaves no tokens at ratio {ratio}: one token covers {factor}x{factor} pixels; raise the area"
        )
    return rows, columns

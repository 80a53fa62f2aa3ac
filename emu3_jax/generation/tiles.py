"""Encodes and decodes large frames in overlapping tiles. That needs memory for one tile, but changes the result.

The tokenizer's group norms and attention span a whole frame. A tile lacks the rest of the frame, so codes and pixels
differ from those of the whole frame.
"""

import collections
import itertools
from collections.abc import Callable

import jax
import numpy as np

from emu3_jax.errors import Emu3Error

# A function from pixels to codes, or from codes to pixels.
Step = Callable[[np.ndarray], np.ndarray | jax.Array]

_LEAST_CODES = 4  # least codes along a tile's side; one fourth of them overlaps


def check_tile(tile: int | None, factor: int) -> None:
    """Raises `Emu3Error` unless `tile` is a legal side of a tile in pixels, or None. `factor` is in pixels per code."""
    least = _LEAST_CODES * factor
    if tile is not None and not (isinstance(tile, int) and tile >= least and tile % factor == 0):
        raise Emu3Error(f"tile is {tile!r}: it must be a multiple of {factor} pixels, and at least {least}")


def tiled_encoder(new_step: Callable[[], Step], tile: int, factor: int) -> Step:
    """Encodes each tile by its own step. For each code, the tile whose middle is nearest counts.

    Args:
        new_step: makes a tile's function from pixels [..., N, N, C] to codes [..., n, n]. It may remember earlier parts
            of a clip.
        tile: the side of a tile in pixels. A frame with shorter sides is a single tile.
        factor: pixels per code along a side.

    Returns:
        The function from pixels [..., H, W, C] to codes [..., h, w].
    """
    steps: dict[tuple[int, int], Step] = collections.defaultdict(new_step)

    def encode(pixels: np.ndarray) -> np.ndarray:
        rows, columns = (_spans(side // factor, tile // factor) for side in pixels.shape[-3:-1])

        def kept_of(row: tuple[int, ...], column: tuple[int, ...]) -> np.ndarray:
            (top, bottom, first_row, last_row), (left, right, first, last) = row, column
            window = pixels[..., top * factor : bottom * factor, left * factor : right * factor, :]
            codes = np.asarray(steps[top, left](window))
            return codes[..., first_row - top : last_row - top, first - left : last - left]

        lines = [np.concatenate([kept_of(row, column) for column in columns], axis=-1) for row in rows]
        return np.concatenate(lines, axis=-2)

    return encode


def tiled_decoder(new_step: Callable[[], Step], tile: int, factor: int) -> Step:
    """Decodes each tile by its own step. In the overlap, one tile fades into the other.

    The arguments are like those of `tiled_encoder`, but the steps and the returned function go from codes to pixels.
    """
    steps: dict[tuple[int, int], Step] = collections.defaultdict(new_step)

    def decode(codes: np.ndarray) -> np.ndarray:
        rows, columns = (_spans(side, tile // factor) for side in codes.shape[-2:])
        if len(rows) == len(columns) == 1:
            return np.asarray(steps[0, 0](codes))
        total = np.zeros(0, np.float32)
        for (top, bottom, *_), (left, right, *_) in itertools.product(rows, columns):
            pixels = np.asarray(steps[top, left](codes[..., top:bottom, left:right]))
            if not total.size:
                height, width = (side * factor for side in codes.shape[-2:])
                total = np.zeros((*pixels.shape[:-3], height, width, pixels.shape[-1]), np.float32)
                weights = np.zeros((height, width, 1), np.float32)
            weight = np.multiply.outer(*(_fade(side, tile // 4) for side in pixels.shape[-3:-1]))[..., None]
            place = (slice(top * factor, bottom * factor), slice(left * factor, right * factor))
            total[(..., *place, slice(None))] += pixels * weight
            weights[place] += weight
        return total / weights

    return decode


def _spans(length: int, tile: int) -> list[tuple[int, int, int, int]]:
    """Tiles along a side, in codes: begin and end of each tile, and begin and end of the part that is kept.

    All tiles have one length, so that one compiled program serves all. Neighbours overlap by at least a fourth of a
    tile. Kept parts meet halfway between the middles of two tiles.
    """
    tile = min(tile, length)
    overlap = tile // 4
    count = 1 if tile == length else -(-(length - overlap) // (tile - overlap))
    starts = [round(index * (length - tile) / max(count - 1, 1)) for index in range(count)]
    meetings = [0, *((a + b + tile) // 2 for a, b in itertools.pairwise(starts)), length]
    return [
        (start, start + tile, first, last)
        for start, (first, last) in zip(starts, itertools.pairwise(meetings), strict=True)
    ]


def _fade(length: int, overlap: int) -> np.ndarray:
    """Weights of a tile's pixels along a side: they rise over `overlap` pixels from each end."""
    place = np.arange(length, dtype=np.float32) + 0.5
    return np.minimum(np.minimum(place, place[::-1]), max(overlap, 1)) / max(overlap, 1)

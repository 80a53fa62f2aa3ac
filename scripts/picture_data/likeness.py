"""Which pictures are nearly the same drawing, whatever set they come from."""

import collections
from collections.abc import Iterable, Sequence

import numpy as np

# Two pictures are the same drawing if they differ by less than this share of what they show (see `difference`). At
# 0.12 there are faces with other mouths, and flags with other emblems; so pictures of different things must be closer.
SAME = 0.10
SAME_OF_ONE_THING = 0.30
_SIDE = 16  # pixels at which pictures are compared: small shifts and other outlines should not count
_COARSE = 4  # of the first, quick comparison
_ROWS = 128  # pictures compared with all others at a time


def features(pixels: np.ndarray) -> np.ndarray:
    """What small pictures show on white, to compare: float32 [N, 16, 16, 3].

    Args:
        pixels: uint8 [N, side, side, 3], where side is a multiple of 16.
    """
    return 255 - _blocks(pixels, pixels.shape[1] // _SIDE)


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """How much two pictures differ, as they are or mirrored: 0 if they are equal, 2 if they have nothing in common.

    The difference is divided by the mean of what the two pictures show on white, or small things would all be alike.

    Args:
        one, other: features [16, 16, 3].
    """
    apart = min(float(np.abs(one - there).sum()) for there in (other, other[:, ::-1]))
    return apart / max(float(one.sum() + other.sum()) / 2, 1e-6)


def pairs(pictures: np.ndarray, concepts: Sequence[str], new: int) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j and i < `new`, of pictures that are the same drawing.

    Args:
        pictures: features [N, 16, 16, 3].
        concepts: what each picture shows.
        new: number of pictures at the start that are compared; pairs of later ones do not matter.
    """
    members = collections.defaultdict(list)
    for index, concept in enumerate(concepts):
        members[concept].append(index)
    close = {(i, j) for i in range(new) for j in members[concepts[i]] if i < j}
    found = {(i, j) for i, j in close if difference(pictures[i], pictures[j]) < SAME_OF_ONE_THING}
    found |= {(i, j) for i, j in _candidates(pictures, new) if difference(pictures[i], pictures[j]) < SAME}
    return sorted(found)


def groups(count: int, alike: Iterable[tuple[int, int]]) -> list[int]:
    """For each of `count` pictures, the lowest index of a picture that pairs connect it with."""
    lowest = list(range(count))

    def root(index: int) -> int:
        while lowest[index] != index:
            lowest[index] = index = lowest[lowest[index]]
        return index

    for one, other in alike:
        low, high = sorted((root(one), root(other)))
        lowest[high] = low
    return [root(index) for index in range(count)]


def _candidates(pictures: np.ndarray, new: int) -> Iterable[tuple[int, int]]:
    """All pairs that can differ by less than `SAME`: means of larger blocks never differ by more than the pictures."""
    coarse = _blocks(pictures, _SIDE // _COARSE)
    mirrored = coarse[:, :, ::-1].reshape(len(coarse), -1)
    coarse = coarse.reshape(len(coarse), -1)
    shown = coarse.sum(1)
    for start in range(0, new, _ROWS):
        rows = coarse[start : min(start + _ROWS, new)]
        mean = (shown[start : start + len(rows), None] + shown) / 2
        for there in (coarse, mirrored):
            apart = np.stack([np.abs(there - row).sum(1) for row in rows])
            for i, j in np.argwhere(apart < SAME * np.maximum(mean, 1e-6)):
                if start + i < j:
                    yield start + int(i), int(j)


def _blocks(pixels: np.ndarray, size: int) -> np.ndarray:
    """The means of blocks of `size` x `size` pixels: float32 [N, side / size, side / size, 3]."""
    count, side = pixels.shape[:2]
    return pixels.reshape(count, side // size, size, side // size, size, 3).mean((2, 4), dtype=np.float32)

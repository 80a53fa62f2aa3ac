"""Preference pairs that are easy to learn: chosen pictures have low codes, rejected ones high codes."""

import numpy as np
from tiny_bundle import CODES

from emu3_jax.data.pairs import Pair


def picture_pairs(count: int = 12, codes: int = CODES) -> list[Pair]:
    """Pairs of pictures of some sizes."""
    rng, pairs = np.random.default_rng(0), []
    for number in range(count):
        shape = (2 + number % 2, 3 - number % 2)
        chosen, rejected = rng.integers(0, codes // 2, (2, *shape)).astype(np.int32)
        pairs.append(Pair(f"n{number}", f"text {number}", chosen, rejected + codes // 2, 1.0))
    return pairs

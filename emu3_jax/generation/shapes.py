"""The shapes that the programs of a decode session are compiled for.

B rows; T steps of the longest schedule.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from emu3_jax.generation import engine
from emu3_jax.models.attention import TPU_SLOTS
from emu3_jax.sharding.rules import batch_shards

# XLA's attention reads all slots of the cache. So the cache grows in stages of this many slots. For long pictures, this
# halves the slots that are read on average. Each size needs its own program, so more stages would cost more compile
# time than they save. A clip's cache of 100,000 slots grows by an eighth of the next power of two, through 20 sizes.
CACHE_GROWTH = 2048


def bucket(length: int) -> int:
    """Rounds `length` up to a length that programs are compiled for. This gives few shapes and little padding."""
    size = 64 if length <= 512 else 512
    return -(-length // size) * size


def cache_slots(needed: int, final: int, kernels: str) -> int:
    """The size of the cache in slots.

    XLA's attention reads unused slots too, so its cache grows in stages. The cache of other kernels has its final size
    from the start.

    Args:
        needed: number of slots in use.
        final: number of slots at the end of the session.
        kernels: implementation of attention, from `attention.KERNELS`, but not "auto".
    """
    if kernels != "xla":
        return final
    step = max(CACHE_GROWTH, (1 << (int(needed) - 1).bit_length()) // 8)
    return min(-(-needed // step) * step, final)


def spare_slots(window: int) -> int:
    """The number of slots after the last step, for guesses of the last passes of `window` tokens."""
    return bucket(window - 1) if window > 1 else 0


def roomy_slots(needed: int) -> int:
    """Rounds a number of slots up, so that a cache seldom grows between turns: each size needs its own programs."""
    return -(-needed // CACHE_GROWTH) * CACHE_GROWTH


def align_right(prompts: Sequence[Sequence[int]], width: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """The prompts, aligned to the right and filled up with `pad`, int32 [R, width], and the first slot of each, [R]."""
    aligned = np.full((len(prompts), width), pad, np.int32)
    start = np.asarray([width - len(ids) for ids in prompts], np.int32)
    for padded, first, ids in zip(aligned, start, prompts, strict=True):
        padded[first:] = ids
    return aligned, start


def fill_rows(count: int, mesh: Mesh | None, guided: bool) -> int:
    """The smallest number of rows, at least `count`, such that the mesh divides the computed rows."""
    multiple = batch_shards(mesh)
    if guided:
        multiple //= math.gcd(2, multiple)  # guidance computes two rows per row
    return -(-count // multiple) * multiple


def sizes_while_growing(first: int, slots: Callable[[int], int]) -> list[int]:
    """The sizes of a cache, from the first one on. `slots` gives the size while so many slots are in use."""
    sizes = [first]
    while (larger := slots(sizes[-1] + 1)) > sizes[-1]:
        sizes.append(larger)
    return sizes


def sizes_read(sizes: Sequence[int], width: int, kernels: str) -> Sequence[int]:
    """The numbers of slots that passes read on TPUs, in the passes' order, for `passes_by_size`.

    XLA's attention reads the whole cache. The kernel reads only blocks of slots that are in use.

    Args:
        sizes: the sizes of the cache in slots, as it grows.
        width: number of slots of the prompt.
        kernels: implementation of attention, from `attention.KERNELS`, but not "auto".
    """
    if kernels == "xla":
        return sizes
    return [*range((width // TPU_SLOTS + 1) * TPU_SLOTS, sizes[-1], TPU_SLOTS), sizes[-1]]


def passes_by_size(sizes: Sequence[int], width: int, steps: int, window: int = 1) -> tuple[tuple[int, int], ...]:
    """Each size of the cache and the number of passes with it, if all guesses of a pass are right.

    Args:
        sizes: the sizes in slots, as the cache grows, from `sizes_read` if only what is read matters.
        width: number of slots of the prompt.
        steps: number of tokens that each row writes.
        window: number of tokens of a pass.
    """
    ends = [*(min(size - width, steps) for size in sizes[:-1]), steps]
    return tuple(
        (size, -(-max(end - begin, 0) // window)) for size, begin, end in zip(sizes, [0, *ends], ends, strict=False)
    )


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The shapes and options that a session's programs are compiled for.

    Attributes:
        rows: B, padded so that the mesh divides the computed rows.
        width: number of slots of the prompts.
        steps: T, padded.
        variant: see `engine.Variant`.
        kept: whether a later turn goes on from the cache. Its size is then a multiple of `CACHE_GROWTH`, so that few
            turns need programs of their own.
        fixed: size of the cache in slots, if it never grows.
    """

    rows: int
    width: int
    steps: int
    variant: engine.Variant
    kept: bool = False
    fixed: int | None = None

    @property
    def computed_rows(self) -> int:
        """The number of rows that the decoder computes: with guidance, two per row."""
        return self.rows * (2 if self.variant.guided else 1)

    def slots(self, needed: int) -> int:
        """The size of the cache in slots while `needed` slots are in use."""
        if self.fixed is not None:
            return self.fixed
        final = self.width + self.steps + self.spare
        return cache_slots(needed, roomy_slots(final) if self.kept else final, self.variant.kernels)

    @property
    def spare(self) -> int:
        """Number of slots after the last step. Guesses of the last passes are written there."""
        return spare_slots(self.variant.window)

    @property
    def first_slots(self) -> int:
        """The size of the cache in slots during prefill."""
        return self.slots(self.width + self.variant.window)

    def cache_sizes(self) -> list[int]:
        """The sizes of the cache in slots, as it grows."""
        return sizes_while_growing(self.first_slots, self.slots)

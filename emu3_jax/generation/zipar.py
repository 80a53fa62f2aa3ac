"""ZipAR: a pass of the decoder computes tokens of several rows of the grid at once. It is lossy.

The source is "ZipAR: parallel auto-regressive image generation through spatial locality" (arXiv 2412.04062). Row r + 1
of the grid begins when row r is S tokens ahead, so a token does not see the end of the row above. Pictures change: the
smaller S, the more. If S is the number of columns or more, every token sees all tokens before it, and the tokens are
those of sequential decoding.

The order is a function of the schedule and S. Forced tokens (the end of a line, for example) are known beforehand. The
first token of a row is computed when the end of the line before it is fed. A frame of a clip begins when the frame
before it is complete. Keys keep the slots and positions of the sequence, and a token keeps the noise of its step.

B rows of a session, T steps of the schedule, P passes after prefill (padded), N tokens of a pass.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import numpy as np

from emu3_jax.errors import Emu3Error
from emu3_jax.fields import is_count
from emu3_jax.generation import defaults
from emu3_jax.generation.sampling import Array
from emu3_jax.generation.schedule import TokenClass, sampled_steps
from emu3_jax.printable import shown

_PASSES = 64  # P is a multiple of this, so that few shapes are compiled
NEVER = np.int32(2**30)  # a pass that no loop reaches


class Order(flax.struct.PyTreeNode):
    """Which steps each pass feeds to the decoder. Prefill is pass 0; index p - 1 of `steps` is pass p.

    Attributes:
        steps: int32 [B, P, N], the steps whose tokens a pass feeds, in rising order. T stands for none.
        fed: int32 [B, T], the pass that feeds the token of each step, or `NEVER`.
        certain: int32 [B, P + 1], after each pass, the number of steps before the first unknown token.
        passes: int32 [B], the number of passes that a row takes part in. Passes after the largest one feed nothing.
    """

    steps: Array
    fed: Array
    certain: Array
    passes: Array

    @property
    def reach(self) -> np.ndarray:
        """int [P + 1]: the step after the last one that has been fed after each pass, or 0."""
        steps, count = np.asarray(self.steps), self.fed.shape[1]
        last = np.where(steps < count, steps + 1, 0).max(axis=(0, 2), initial=0)
        return np.maximum.accumulate(np.append(0, last))


def is_zipar(zipar: Any) -> bool:
    """Whether `zipar` is legal: None, or a whole number from 1 to `defaults.MOST_ZIPAR`."""
    return zipar is None or (is_count(zipar) and zipar <= defaults.MOST_ZIPAR)


def check_zipar(zipar: Any, parallel: Any = "off") -> None:
    """Raises `Emu3Error` if `zipar` is not legal (see `is_zipar`), or is given with a number as `parallel`."""
    if not is_zipar(zipar):
        raise Emu3Error(f"zipar is {shown(zipar)}: it must be None, or {defaults.LEGAL_ZIPAR}")
    if zipar is not None and parallel not in ("auto", "off"):
        raise Emu3Error(
            f"zipar is {zipar} and parallel is {shown(parallel)}: a pass either computes tokens of several rows of the "
            "picture or checks guesses; leave one of the two out"
        )


def order(schedules: Sequence[np.ndarray], steps: int, ahead: int) -> Order:
    """The order of rows that are decoded together.

    Args:
        schedules: token classes of each row, int [T] or shorter.
        steps: T, the number of steps that the session is compiled for.
        ahead: S, the number of tokens that a row of the grid is ahead of the next one.

    Raises:
        Emu3Error: a schedule has no rows of visual tokens that end with EOL.
    """
    found = [_passes(schedule, ahead) for schedule in schedules]
    passes = np.asarray([computed.max() for computed, _ in found], np.int32)
    total = -(-max(int(passes.max()), 1) // _PASSES) * _PASSES
    # How many steps each pass feeds. Passes beyond `total` do not exist.
    counts = [np.bincount(fed[fed <= total], minlength=total + 1) for _, fed in found]
    width = max(1, *(int(count.max()) for count in counts))
    together = np.full((len(found), total, width), steps, np.int32)
    every = np.full((len(found), steps), NEVER, np.int32)
    certain = np.zeros((len(found), total + 1), np.int32)
    for row, (computed, fed) in enumerate(found):
        every[row, : len(fed)] = fed
        known = np.maximum.accumulate(computed)
        certain[row] = np.searchsorted(known, np.arange(total + 1), side="right")
        by_pass = np.argsort(fed, kind="stable")[: counts[row].sum()]
        firsts = np.cumsum(counts[row]) - counts[row]
        of = fed[by_pass]
        together[row, of - 1, np.arange(len(of)) - firsts[of]] = by_pass
    return Order(together, every, certain, passes)


def _passes(schedule: np.ndarray, ahead: int) -> tuple[np.ndarray, np.ndarray]:
    """The pass that computes each step's token, and the pass that feeds it, int [steps up to the last sampled one].

    Forced tokens count as computed with the token before them.
    """
    goal = int(sampled_steps(schedule[None])[0])
    schedule = schedule[:goal]
    visual = schedule == TokenClass.VISUAL
    lines = (schedule == TokenClass.EOL).any() or not (schedule == TokenClass.EOF).any()
    if not goal or not visual[0] or (schedule == TokenClass.FREE).any() or not lines:
        raise Emu3Error(
            "zipar needs rows of visual tokens that end with EOL: texts have none, and neither have clips of "
            'clip_layout "flat"; leave zipar out'
        )
    computed, fed = np.zeros(goal, np.int64), np.full(goal, NEVER, np.int64)
    begins = np.flatnonzero(visual & ~np.append(False, visual[:-1]))  # first tokens of the rows of the grid
    begin = 0
    for first, following in zip(begins, [*begins[1:], goal], strict=True):
        length = int(visual[first:following].sum())
        forced = slice(first + length, following)
        computed[first : first + length] = begin + np.arange(length)
        fed[first : first + length] = computed[first : first + length] + 1
        computed[forced] = begin + length - 1
        whole = (schedule[forced] == TokenClass.EOF).any()  # the next row belongs to the next frame
        begin += length if whole else min(ahead, length)
        fed[forced] = begin
    fed[-1] = NEVER  # no later token needs the last one
    return computed, fed

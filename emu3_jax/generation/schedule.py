"""The static token schedule: which kind of token is legal at each step of a generated sequence.

It replaces the reference's stateful logits processor (upstream `Emu3PrefixConstrainedLogitsHelper`): the grid is known
before the first step, so the decode loop only looks a step up.
"""

import enum

import numpy as np

from emu3_jax.config import SpecialTokens


class TokenClass(enum.IntEnum):
    """What a step may emit. Every class but `VISUAL` and `FREE` stands for exactly one id."""

    PAD = 0
    VISUAL = 1  # any of the visual ids
    FREE = 2  # any id of the vocabulary; the row ends with EOS
    EOL = 3
    EOF = 4
    EOI = 5
    EOS = 6


# In an array of ids: a step that samples instead of emitting one legal id.
SAMPLED = -1


# What ends a picture or a clip.
_END = (TokenClass.EOI, TokenClass.EOS)


def frame_length(rows: int, columns: int, layout: str) -> int:
    """Tokens of a latent frame, its EOF included; see `frame_schedule`."""
    return rows * (columns + (layout == "lines")) + 1


def frame_schedule(rows: int, columns: int, layout: str = "lines") -> np.ndarray:
    """Token classes, int8, of a picture or of one latent frame of a clip, up to its EOF.

    Args:
        rows: of visual tokens.
        columns: of visual tokens.
        layout: of `config.CLIP_LAYOUTS`: "lines" ends each row with EOL, as pictures do; "flat" does not.
    """
    frame = np.full((rows, columns + (layout == "lines")), TokenClass.VISUAL, np.int8)
    frame[:, columns:] = TokenClass.EOL
    return np.append(frame, np.int8(TokenClass.EOF))


def image_schedule(rows: int, columns: int) -> np.ndarray:
    """Token classes, int8 [rows * (columns + 1) + 3], of a picture of `rows` x `columns` visual tokens.

    Each row of visual tokens is followed by EOL; after the last one come EOF, EOI and EOS.
    """
    return clip_schedule(1, rows, columns)


def clip_schedule(frames: int, rows: int, columns: int, layout: str = "lines", *, given: int = 0) -> np.ndarray:
    """Token classes, int8, of a clip: each latent frame as `frame_schedule` says, then EOI and EOS.

    Args:
        frames: latent frames, a quarter of the clip's frames in published tokenizers.
        rows: of visual tokens.
        columns: of visual tokens.
        layout: see `frame_schedule`.
        given: latent frames that the prompt holds already; the schedule is that of the others.
    """
    tokens = np.tile(frame_schedule(rows, columns, layout), frames - given)
    return np.append(tokens, np.asarray(_END, np.int8))


def grid_schedule(size: tuple[int, ...], layout: str, *, given: int = 0) -> np.ndarray:
    """The schedule of a picture of `size` (rows, columns), or of a clip of (latent frames, rows, columns)."""
    if len(size) == 2:
        return image_schedule(*size)
    frames, rows, columns = size
    return clip_schedule(frames, rows, columns, layout, given=given)


def grid_length(size: tuple[int, ...], layout: str) -> int:
    """Tokens of the whole `grid_schedule`, computed without making it: `size` may be of any size."""
    if len(size) == 2:
        return frame_length(*size, layout="lines") + len(_END)
    frames, rows, columns = size
    return frames * frame_length(rows, columns, layout) + len(_END)


def frames_that_fit(tokens: int, rows: int, columns: int, layout: str) -> int:
    """How many latent frames a clip of at most `tokens` tokens has, its end included; below 0 where none would."""
    return (tokens - len(_END)) // frame_length(rows, columns, layout)


def text_schedule(count: int) -> np.ndarray:
    """Token classes, int8 [count], of at most `count` tokens of an answer."""
    return np.full(count, TokenClass.FREE, np.int8)


def stack_schedules(schedules: list[np.ndarray], length: int) -> np.ndarray:
    """One int8 [B, length] array; rows that end earlier emit padding."""
    stacked = np.full((len(schedules), length), TokenClass.PAD, np.int8)
    for row, schedule in zip(stacked, schedules, strict=True):
        row[: len(schedule)] = schedule
    return stacked


def forced_ids(schedule: np.ndarray, special: SpecialTokens) -> np.ndarray:
    """int32 ids of the schedule's steps, `SAMPLED` where the step has a choice."""
    table = np.full(len(TokenClass), SAMPLED, np.int32)
    for token_class in (TokenClass.PAD, TokenClass.EOL, TokenClass.EOF, TokenClass.EOI, TokenClass.EOS):
        table[token_class] = getattr(special, token_class.name.lower())
    return table[schedule]


def sampled_steps(schedule: np.ndarray) -> int:
    """Steps up to and including the last one with a choice: no forward pass is needed past it."""
    choice = np.isin(schedule, (TokenClass.VISUAL, TokenClass.FREE)).any(axis=0)
    return int(np.flatnonzero(choice)[-1]) + 1 if choice.any() else 0

"""The static token schedule: the class of tokens that is legal at each step of a generated sequence.

It replaces the reference's stateful logits processor (upstream `Emu3PrefixConstrainedLogitsHelper`). The grid is known
before the first step, so the decode loop only indexes the schedule.
"""

import enum

import numpy as np

from emu3_jax.config import SpecialTokens


class TokenClass(enum.IntEnum):
    """The tokens that a step may emit. Each class except `VISUAL` and `FREE` stands for exactly one id."""

    PAD = 0
    VISUAL = 1  # any of the visual ids
    FREE = 2  # any id of the vocabulary; the row ends with EOS
    EOL = 3
    EOF = 4
    EOI = 5
    EOS = 6


# These mark a step, in an array of forced ids, that samples its token: a visual one, or any one.
SAMPLED_VISUAL, SAMPLED_FREE = -1, -2


# The tokens that end a picture or a clip.
_END = (TokenClass.EOI, TokenClass.EOS)


def frame_length(rows: int, columns: int, layout: str) -> int:
    """The number of tokens of a latent frame, including EOF; see `frame_schedule`."""
    return rows * (columns + (layout == "lines")) + 1


def frame_schedule(rows: int, columns: int, layout: str = "lines") -> np.ndarray:
    """Token classes, int8, of a picture or of one latent frame of a clip, including its EOF.

    Args:
        rows: number of rows of visual tokens.
        columns: number of visual tokens per row.
        layout: layout from `config.CLIP_LAYOUTS`. "lines" ends each row with EOL, as in pictures; "flat" does not.
    """
    frame = np.full((rows, columns + (layout == "lines")), TokenClass.VISUAL, np.int8)
    frame[:, columns:] = TokenClass.EOL
    return np.append(frame, np.int8(TokenClass.EOF))


def image_schedule(rows: int, columns: int) -> np.ndarray:
    """Token classes, int8 [rows * (columns + 1) + 3], of a picture of `rows` x `columns` visual tokens.

    EOL follows each row of visual tokens. EOF, EOI and EOS follow the last row.
    """
    return clip_schedule(1, rows, columns)


def clip_schedule(frames: int, rows: int, columns: int, layout: str = "lines", *, given: int = 0) -> np.ndarray:
    """Token classes, int8, of a clip: the `frame_schedule` of each latent frame, then EOI and EOS.

    Args:
        frames: number of latent frames. The published tokenizer makes one of four frames.
        rows: number of rows of visual tokens.
        columns: number of visual tokens per row.
        layout: see `frame_schedule`.
        given: number of latent frames that the prompt already holds. The schedule leaves them out.
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
    """The length of `grid_schedule`, computed without making it, so that `size` may be huge."""
    if len(size) == 2:
        return frame_length(*size, layout="lines") + len(_END)
    frames, rows, columns = size
    return frames * frame_length(rows, columns, layout) + len(_END)


def frames_that_fit(tokens: int, rows: int, columns: int, layout: str) -> int:
    """The number of latent frames of a clip that fits into `tokens` tokens. Negative if not even its end fits."""
    return (tokens - len(_END)) // frame_length(rows, columns, layout)


def text_schedule(count: int) -> np.ndarray:
    """Token classes, int8 [count], of an answer of at most `count` tokens."""
    return np.full(count, TokenClass.FREE, np.int8)


def stack_schedules(schedules: list[np.ndarray], length: int) -> np.ndarray:
    """Stacks schedules to int8 [B, length]. Shorter rows are padded with PAD."""
    stacked = np.full((len(schedules), length), TokenClass.PAD, np.int8)
    for row, schedule in zip(stacked, schedules, strict=True):
        row[: len(schedule)] = schedule
    return stacked


def forced_ids(schedule: np.ndarray, special: SpecialTokens) -> np.ndarray:
    """int32 ids of the schedule's steps: the forced id, or `SAMPLED_VISUAL` or `SAMPLED_FREE`."""
    table = np.full(len(TokenClass), SAMPLED_VISUAL, np.int32)
    table[TokenClass.FREE] = SAMPLED_FREE
    for token_class in (TokenClass.PAD, TokenClass.EOL, TokenClass.EOF, TokenClass.EOI, TokenClass.EOS):
        table[token_class] = getattr(special, token_class.name.lower())
    return table[schedule]


def sampled_steps(schedule: np.ndarray) -> np.ndarray:
    """The number of steps up to the last sampled one, inclusive, int32 [B]. Later steps need no forward pass.

    `schedule`: token classes [B, T].
    """
    choice = np.isin(schedule, (TokenClass.VISUAL, TokenClass.FREE))
    last = choice.shape[1] - choice[:, ::-1].argmax(axis=1)
    return np.where(choice.any(axis=1), last, 0).astype(np.int32)

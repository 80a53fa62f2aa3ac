"""The rows of a decode session: what each must generate, what it has after a call, and whether it fits the model."""

import dataclasses
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from emu3_jax.config import DecoderConfig
from emu3_jax.errors import RowError


@dataclasses.dataclass(frozen=True)
class Row:
    """What one row must generate.

    Attributes:
        prompt: ids of the prompt.
        schedule: `TokenClass` of each token after the prompt. Pictures, clips and texts may share a session.
        negative: ids of the unconditional prompt for guidance, or None for no guidance. In a session with guided rows,
            a row without guidance is computed twice, which does not change its distribution.
    """

    prompt: Sequence[int]
    schedule: np.ndarray
    negative: Sequence[int] | None = None


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The device's result of one call. `DecodeSession.read` waits for it and brings it to the host.

    Attributes:
        rows: the rows of the call, with those that fill the session.
        goal: see `engine.Plan`.
        tokens, step, passes, ended: see `engine.DecodeState`.
    """

    rows: tuple[Row, ...]
    goal: np.ndarray
    tokens: jax.Array
    step: jax.Array
    passes: jax.Array
    ended: jax.Array


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the rows have after a call.

    Attributes:
        tokens: the ids of each row so far, int32 [steps of the row].
        step: int32 [B], steps taken. A row that is done may have taken steps after its schedule.
        passes: int32 [B], passes of the decoder that each row took part in, with prefill.
        ended: bool [B], whether a row has emitted the end of its text.
        taken: number of steps taken, as a mean over the rows: from 0 to the session's `steps`.
        done: bool [B], whether a row has all its sampled tokens. Only forced ones may follow.
    """

    tokens: list[np.ndarray]
    step: np.ndarray
    passes: np.ndarray
    ended: np.ndarray
    taken: int
    done: np.ndarray


@dataclasses.dataclass(frozen=True)
class Made:
    """The result of `session.run`.

    Attributes:
        ids: the generated ids, int32 [B, longest schedule]. Rows that end earlier are padded.
        passes: int32 [B], passes of the decoder that each row took part in, with prefill.
    """

    ids: np.ndarray
    passes: np.ndarray


def computed_prompts(rows: Sequence[Row], guided: bool) -> list[Sequence[int]]:
    """The prompts of all computed rows: the conditional ones, then with guidance the unconditional ones."""
    prompts = [row.prompt for row in rows]
    return prompts + [row.prompt if row.negative is None else row.negative for row in rows] if guided else prompts


def check_positions(config: DecoderConfig, rows: Iterable[tuple[int, int]]) -> None:
    """Raises `Emu3Error` if a row does not fit into the positions that the model was trained for.

    Args:
        config: config of the decoder.
        rows: per row, the length of its longer prompt and the number of tokens to generate.
    """
    for index, (prompt, steps) in enumerate(rows):
        if prompt + steps > config.max_positions:
            raise RowError(
                index,
                f"a prompt of {prompt} tokens and {steps} tokens to generate exceed the model's "
                f"{config.max_positions} positions: shorten the prompt, or ask for a smaller picture or answer",
            )

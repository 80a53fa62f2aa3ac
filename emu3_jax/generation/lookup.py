"""Guesses for free text by prompt lookup: what followed the last tokens where they occurred before.

Text repeats itself and its prompt: names, quotes, lists. So the row's last tokens are looked up in its prompt and in
its own output (Saxena, "Prompt Lookup Decoding", 2023). The guesses are only guesses: `parallel` checks them.

B rows, N tokens.
"""

import jax
import jax.numpy as jnp

MOST_MATCHED = 3  # length of the longest sequence of last tokens that is looked up


def look_up(history: jax.Array, length: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Guesses the tokens after each row's last one.

    It finds the earlier token before which the most of the row's last `MOST_MATCHED` tokens occurred, and of several
    such places the latest. The guesses are the tokens from there on. If they reach the row's end, they start again, as
    in a text that repeats itself.

    Args:
        history: int32 [B, N], each row's prompt and output; what follows `length` is not read.
        length: int32 [B], the number of tokens of `history` that are certain, at least 1.
        count: number of guesses.

    Returns:
        The guesses, int32 [B, count]; and bool [B], whether the row's last token occurred before.
    """
    size = history.shape[1]
    at = jnp.arange(size)[None]
    matched, grade = at < length[:, None] - 1, jnp.zeros(history.shape, jnp.int32)
    for back in range(MOST_MATCHED):
        token = jnp.take_along_axis(history, jnp.maximum(length - 1 - back, 0)[:, None], axis=1)
        matched = matched & (at >= back) & (jnp.roll(history, back, axis=1) == token)
        grade = grade + matched
    place = jnp.argmax(jnp.where(grade > 0, grade * size + at, 0), axis=1).astype(jnp.int32)
    found = jnp.take_along_axis(grade, place[:, None], axis=1)[:, 0] > 0
    distance = jnp.where(found, length - 1 - place, 1)
    indices = place[:, None] + 1 + jnp.arange(count)[None] % distance[:, None]
    return jnp.take_along_axis(history, indices, axis=1), found

"""Samplers: from logits and one random key per row to token ids. Every row has its own settings.

B rows, V candidate tokens.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

# An array in the host's memory, or on devices.
Array = jax.Array | np.ndarray

# Number of bits that one pass of the threshold search determines.
_DIGIT = 4


class RowSettings(flax.struct.PyTreeNode):
    """Sampling settings of each row. Every leaf has one entry per row.

    Attributes:
        temperature: float32 [B]; 0 takes the likeliest token (greedy).
        top_k: int32 [B], number of candidates to keep; ties with the last one are kept too. V or more keeps all.
        top_p: float32 [B] in (0, 1]; keeps the smallest set of likeliest candidates with at least this probability.
        guidance: float32 [B], guidance scale; 1 does not change the conditional distribution.
        seed: uint32 [B]; step i of row b samples with the key fold_in(key(seed[b]), i).
    """

    temperature: Array
    top_k: Array
    top_p: Array
    guidance: Array
    seed: Array

    DTYPES: ClassVar[dict[str, Any]] = {
        "temperature": np.float32, "top_k": np.int32, "top_p": np.float32, "guidance": np.float32, "seed": np.uint32,
    }  # fmt: skip

    @classmethod
    def of(cls, count: int, **columns: Any) -> "RowSettings":
        """Settings of `count` rows in the host's memory. A column is one value for all rows, or one value per row."""
        return cls(
            **{
                name: np.broadcast_to(np.asarray(columns[name], dtype), (count,)).copy()
                for name, dtype in cls.DTYPES.items()
            }
        )

    def take(self, rows: Any) -> "RowSettings":
        """The settings of some rows, given as a slice or an array of indices."""
        return jax.tree.map(lambda column: column[rows], self)


def guide(conditional: jax.Array, unconditional: jax.Array, scale: Array) -> jax.Array:
    """Classifier-free guidance on log-probabilities, as the reference computes it.

    Args:
        conditional: float32 [B, V] logits.
        unconditional: float32 [B, V] logits.
        scale: float32 [B].

    Returns:
        u + scale * (c - u) of the log-probabilities. Rows of scale 1 equal the conditional rows bit for bit.
    """
    c, u = jax.nn.log_softmax(conditional, axis=-1), jax.nn.log_softmax(unconditional, axis=-1)
    scale = scale[:, None]
    return jnp.where(scale == 1.0, c, u + scale * (c - u))


def sample(
    logits: jax.Array,
    steps: jax.Array,
    settings: RowSettings,
    *,
    use_top_k: bool,
    use_top_p: bool,
    asked: jax.Array | None = None,
) -> jax.Array:
    """Samples one candidate per row: temperature, then top-k, then top-p, in the reference's order.

    The result is a function of a row's logits, step and settings alone: argmax(logits + noise(seed, step)).

    Args:
        logits: float32 [B, V].
        steps: int32 [B], the step of each row, which is folded into its key.
        settings: sampling settings of each row.
        use_top_k: whether any row's `top_k` is below V; False skips the search.
        use_top_p: whether any row's `top_p` is below 1.
        asked: bool [B], the rows whose results matter, or None for all. With it, the program also looks at the settings
            of these rows, and skips a search that none of them needs. The results of the others may be any.

    Returns:
        int32 [B].
    """
    greedy = settings.temperature == 0.0
    scaled = logits / jnp.where(greedy, 1.0, settings.temperature)[:, None]
    if use_top_k:
        scaled = _if_any(asked, settings.top_k < logits.shape[-1], keep_top_k, scaled, settings.top_k)
    if use_top_p:
        scaled = _if_any(asked, settings.top_p < 1, keep_top_p, scaled, settings.top_p)
    keys = jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))(settings.seed, steps)
    sampled = jax.vmap(jax.random.categorical)(keys, scaled)
    return jnp.where(greedy, jnp.argmax(logits, axis=-1), sampled).astype(jnp.int32)


def _if_any(asked: jax.Array | None, effective: Array, keep: Callable, logits: jax.Array, setting: Array) -> jax.Array:
    """`keep(logits, setting)`, skipped if it has no effect on the rows that are asked for."""
    if asked is None:
        return keep(logits, setting)
    return jax.lax.cond((asked & effective).any(), keep, lambda logits, _: logits, logits, jnp.asarray(setting))


def keep_top_k(logits: jax.Array, top_k: Array) -> jax.Array:
    """Sets all but the `top_k` (int32 [B]) largest logits of float32 [B, V] to -inf. Ties with the last one stay."""
    keys = _sortable(logits)
    target = jnp.minimum(top_k, logits.shape[-1]).astype(jnp.float32)
    threshold = _largest_threshold(keys, jnp.ones_like(logits), target)
    return jnp.where(keys >= threshold[:, None], logits, -jnp.inf)


def keep_top_p(logits: jax.Array, top_p: Array) -> jax.Array:
    """Sets logits of float32 [B, V] to -inf if the larger ones already have the probability `top_p` (float32 [B])."""
    keys = _sortable(logits)
    kept = keys >= _largest_threshold(keys, jax.nn.softmax(logits, axis=-1), top_p)[:, None]
    return jnp.where(kept | (top_p[:, None] >= 1.0), logits, -jnp.inf)


def _sortable(x: jax.Array) -> jax.Array:
    """Maps float32 to uint32 keys of the same order. Both zeros get the same key."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest_threshold(keys: jax.Array, weights: jax.Array, target: Array) -> jax.Array:
    """uint32 [B]: the largest t for which the weights of the candidates with key >= t sum to at least `target`.

    It searches the digits of t, most significant first. This is exact, needs no sorting, and allows a target per row.
    """
    digits = jnp.arange(1, 2**_DIGIT, dtype=jnp.uint32)[None]

    def settle(prefix: jax.Array, shift: np.uint32) -> jax.Array:
        candidates = prefix[:, None] | (digits << shift)  # [B, 15], rising: their weights fall
        above = jnp.sum(jnp.where(keys[:, None] >= candidates[..., None], weights[:, None], 0.0), axis=-1)
        digit = jnp.sum(above >= target[:, None], axis=-1, dtype=jnp.uint32)
        return prefix | (digit << shift)

    prefix = jnp.zeros(keys.shape[:1], jnp.uint32)
    for shift in np.arange(32 - _DIGIT, -1, -_DIGIT, dtype=np.uint32):
        prefix = settle(prefix, shift)
    return prefix

"""Parallel decoding: a pass of the decoder checks several guessed tokens per row at once.

Sampling is a function of (logits, seed, step), see `sampling.sample`. So a pass of W tokens (the last certain token and
W - 1 guesses) computes the W next tokens with the noise of their own steps. The first computed token is certain. Each
further one is certain if the guess before it is right, that is, if it equals the computed token. So a pass settles 1 to
W tokens, and they are those that sequential sampling draws (up to the rounding of products, which depends on W). This
is Jacobi decoding with coupled noise: see docs/performance.md.

Guesses are never trusted. The next guesses are the computed tokens that are not certain yet; steps that no pass has
seen repeat the last of them. Forced tokens (the end of a line, for example) are guesses that are always right. In free
text, `lookup` replaces guesses by what followed the row's last tokens where they occurred before.

B rows, W tokens of a pass, T steps of the schedule.
"""

from typing import Any

import jax
import jax.numpy as jnp

from emu3_jax.errors import Emu3Error
from emu3_jax.fields import is_count
from emu3_jax.generation import defaults
from emu3_jax.generation.schedule import SAMPLED_FREE
from emu3_jax.models.capability import AMPERE, cuda_at_least, target_platform
from emu3_jax.printable import shown


def is_window(parallel: Any) -> bool:
    """Whether `parallel` is legal: "auto", "off", or a whole number from 2 to `defaults.MOST_PARALLEL`."""
    if isinstance(parallel, str):
        return parallel in ("auto", "off")
    return is_count(parallel) and 2 <= parallel <= defaults.MOST_PARALLEL


def check_window(parallel: int | str) -> None:
    """Raises `Emu3Error` if `parallel` is not legal; see `is_window`."""
    if not is_window(parallel):
        raise Emu3Error(f"parallel is {shown(parallel)}: it must be {defaults.LEGAL_PARALLEL}")


# Limits of "auto" on NVIDIA GPUs: the most tokens of a pass per row, and the most rows times tokens. Measured on one
# H200 (docs/performance.md). With more tokens than this, a pass costs more than the passes that it saves.
_HOPPER_LIMITS = (32, 256)
_XLA_LIMITS = (16, 64)
_LEAST_WINDOW = 8
# Limits of "auto" on CPUs: tokens of a pass, rows, and widths of the decoder. Measured with the embedded model, of
# width 448, on two cores (docs/performance.md). With four rows a pass already costs more than the passes that it saves.
_CPU_WINDOW, _CPU_ROWS, _CPU_WIDTHS = 8, 2, range(256, 513)


def choose_window(
    parallel: int | str, rows: int = 1, kernels: str = "xla", visual: bool = True, hidden_size: int = 0
) -> int:
    """The number of tokens W of a pass per row. 1 means that rows are decoded sequentially.

    "auto" is a power of two on NVIDIA GPUs from Ampere on, and smaller for more rows, because products of many rows
    wait for the matrix units and not for the memory. On CPUs it is 8 for small decoders and one or two rows: with
    more rows, a pass of several tokens costs about as much as the passes that it saves, and larger decoders have not
    been measured. It is 1 elsewhere. TPUs have not been measured.

    Args:
        parallel: "auto", "off" or W, see `is_window`.
        rows: the number of rows that a device computes; with guidance, two per picture.
        kernels: implementation of attention over the cache for several tokens per row, from `attention.KERNELS`.
        visual: whether there are visual steps. "auto" is 1 without them: guesses of free text are rarely right.
        hidden_size: the decoder's width; only CPUs ask for it.
    """
    if parallel not in ("auto", "off"):
        return int(parallel)
    if parallel == "off" or not visual:
        return 1
    if (platform := target_platform()) == "cpu":
        return _CPU_WINDOW if rows <= _CPU_ROWS and hidden_size in _CPU_WIDTHS else 1
    if platform != "gpu" or not cuda_at_least(AMPERE):
        return 1
    most, budget = _HOPPER_LIMITS if kernels == "pallas-hopper" else _XLA_LIMITS
    largest = min(most, budget // rows)
    return 1 << (largest.bit_length() - 1) if largest >= _LEAST_WINDOW else 1


def window(array: jax.Array, first: jax.Array, size: int) -> jax.Array:
    """Columns first[b] .. first[b] + size - 1 of each row b of `array` [B, T]; `first` is int32 [B]."""
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (at,), (size,)))(array, first)


def with_window(array: jax.Array, new: jax.Array, first: jax.Array) -> jax.Array:
    """`array` with `new` [B, N] from column first[b] of each row b on."""
    return jax.vmap(lambda row, part, at: jax.lax.dynamic_update_slice(row, part, (at,)))(array, new, first)


def first_guesses(forced: Any, token: jax.Array) -> jax.Array:
    """int32 [B, T]: the forced ids, and the row's first token (`token`, int32 [B]) at all sampled steps."""
    return jnp.where(forced < 0, token[:, None], forced)


def count_settled(fed: jax.Array, computed: jax.Array) -> jax.Array:
    """The number of certain tokens, int32 [B], from 1 to W.

    Args:
        fed: int32 [B, W], the last certain token and the guesses that were fed.
        computed: int32 [B, W], the token of the step after each of them.
    """
    right = fed[:, 1:] == computed[:, :-1]
    return 1 + jnp.cumprod(right, axis=1).sum(axis=1, dtype=jnp.int32)


def end_of_text(computed: jax.Array, forced: jax.Array, settled: jax.Array, eos: int) -> tuple[jax.Array, jax.Array]:
    """Lets rows end at the first certain EOS of free text.

    Args:
        computed: int32 [B, W].
        forced: int32 [B, W], see `schedule.forced_ids`.
        settled: int32 [B], from `count_settled`.
        eos: id of EOS.

    Returns:
        The number of tokens up to that EOS, or `settled`; and bool [B], whether there is one.
    """
    width = computed.shape[1]
    found = (computed == eos) & (forced == SAMPLED_FREE)
    first = jnp.where(found.any(axis=1), jnp.argmax(found, axis=1).astype(jnp.int32), width)
    return jnp.minimum(settled, first + 1), first < settled


def next_guesses(computed: jax.Array, forced: jax.Array) -> jax.Array:
    """The tokens of the window's steps and guesses of the W - 1 steps after them, int32 [B, 2W - 1].

    Args:
        computed: int32 [B, W].
        forced: int32 [B, 2W - 1], the forced ids of these steps, see `schedule.forced_ids`.
    """
    width = computed.shape[1]
    if width == 1:
        return computed
    sampled = jnp.where(forced[:, :width] < 0, jnp.arange(width), -1).max(axis=1)  # the last sampled step, or -1
    last = jnp.take_along_axis(computed, jnp.maximum(sampled, 0)[:, None], axis=1)
    later = jnp.where(forced[:, width:] < 0, last, forced[:, width:])
    return jnp.concatenate([computed, later], axis=1)

"""Losses of GRPO as pure functions: advantages of groups, clipped ratios of tokens or sequences, KL to a reference.

The policy drew N samples for each prompt, and each got a reward. `advantages` compares the samples of a prompt.
`token_losses` raises the probability of samples with a positive advantage, within a clip range. `token_weights` and
`divisor` say how the losses of tokens become one number. `tests/golden/preference.json` holds TRL's losses and
gradients on the same numbers.

G groups (prompts), N samples of a group, B = G * N samples, T tokens of a sample.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from emu3_jax.training.grpo_config import LEVELS

_SPREAD = 1e-4  # added to the standard deviation of a group's rewards, as in TRL


def advantages(rewards_gn: jax.Array, *, normalise: bool = True) -> jax.Array:
    """Compares the rewards of each group with the group's mean.

    Args:
        rewards_gn: float [G, N], finite rewards of the samples of each prompt.
        normalise: divide by the group's standard deviation (arXiv 2402.03300), with N - 1 in its denominator.
            Otherwise only the mean is subtracted (arXiv 2503.20783), so that prompts with little spread count less.

    Returns:
        float32 [G, N]. A group without spread gets zeros.
    """
    rewards = rewards_gn.astype(jnp.float32)
    # A rounded mean of equal rewards would leave small differences, which normalising makes large.
    level = (rewards == rewards[:, :1]).all(axis=1, keepdims=True)
    centred = jnp.where(level, 0.0, rewards - rewards.mean(axis=1, keepdims=True))
    if not normalise or rewards.shape[1] == 1:
        return centred
    return centred / (rewards.std(axis=1, ddof=1, keepdims=True) + _SPREAD)


class TokenLosses(NamedTuple):
    """What `token_losses` computes for each token, all float32 [B, T]. Values outside the mask have no meaning.

    Attributes:
        loss: the loss, with the KL term.
        kl: the estimate of the KL divergence, without its weight; zeros without a reference.
        low: 1 where the ratio is below the clip range and the advantage is negative, so that the token has no gradient.
        high: 1 where the ratio is above the clip range and the advantage is positive.
    """

    loss: jax.Array
    kl: jax.Array
    low: jax.Array
    high: jax.Array


def token_losses(
    log_probs_bt: jax.Array,
    old_bt: jax.Array,
    mask_bt: jax.Array,
    advantages_b: jax.Array,
    *,
    level: str = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    reference_bt: jax.Array | None = None,
    kl_weight: float = 0.0,
) -> TokenLosses:
    """The clipped loss of each token, plus `kl_weight` times its KL divergence.

    Args:
        log_probs_bt: float32 [B, T], log-probabilities of the sampled tokens under the policy that is trained.
        old_bt: float32 [B, T], under the policy that drew them.
        mask_bt: bool [B, T], which tokens the policy drew.
        advantages_b: float32 [B].
        level: "token": each token has its own ratio to the old policy (GRPO). "sequence": all tokens of a sample share
            the geometric mean of their ratios (GSPO, arXiv 2507.18071).
        clip_low: ratios below 1 - clip_low have no gradient where the advantage is negative.
        clip_high: ratios above 1 + clip_high have no gradient where the advantage is positive.
        reference_bt: float32 [B, T], log-probabilities under the reference, or None.
        kl_weight: weight of the KL divergence; needs a reference.

    Raises:
        ValueError: an unknown `level`, or a `kl_weight` without a reference.
    """
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}: it must be one of {', '.join(LEVELS)}")
    if kl_weight and reference_bt is None:
        raise ValueError("kl_weight needs the reference's log-probabilities")
    log_ratio = log_probs_bt - jax.lax.stop_gradient(old_bt)
    if level == "sequence":
        counts = jnp.maximum(mask_bt.sum(axis=1, keepdims=True), 1)
        log_ratio = jnp.where(mask_bt, log_ratio, 0.0).sum(axis=1, keepdims=True) / counts
    ratio = jnp.broadcast_to(jnp.exp(log_ratio), log_probs_bt.shape)
    advantage = jax.lax.stop_gradient(advantages_b)[:, None]
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    loss = -jnp.minimum(ratio * advantage, clipped * advantage)
    kl = jnp.zeros_like(loss)
    if reference_bt is not None:
        kl = kl_estimate(log_probs_bt, reference_bt)
        loss += kl_weight * kl
    low = (ratio < 1 - clip_low) & (advantage < 0)
    high = (ratio > 1 + clip_high) & (advantage > 0)
    return TokenLosses(loss, kl, low.astype(jnp.float32), high.astype(jnp.float32))


def kl_estimate(log_probs_bt: jax.Array, reference_bt: jax.Array) -> jax.Array:
    """Estimates KL(policy || reference) at each sampled token by q/p - log(q/p) - 1: unbiased, and never negative.

    Args:
        log_probs_bt: log p, float32 [B, T], log-probabilities of the sampled tokens under the policy.
        reference_bt: log q, float32 [B, T], under the reference.

    Returns:
        float32 [B, T]. It is Schulman's estimator k3 (joschu.net/blog/kl-approx.html).
    """
    log_ratio = jax.lax.stop_gradient(reference_bt) - log_probs_bt
    return jnp.exp(log_ratio) - log_ratio - 1


def token_weights(mask_bt: jax.Array, average: str) -> jax.Array:
    """The weight of each token's loss. The loss of a batch is the weighted sum of its tokens, divided by `divisor`.

    So a batch can be computed in parts, whose weighted sums add up.

    Args:
        mask_bt: bool [B, T], the tokens that count.
        average: "sequence": the mean over samples of the mean over their tokens (GRPO). "token": the mean over all
            tokens (DAPO). "length": the sum over tokens, divided by B and by the largest number of tokens (Dr. GRPO).

    Returns:
        float32 [B, T], 0 outside the mask.
    """
    mask = mask_bt.astype(jnp.float32)
    return mask / jnp.maximum(mask.sum(axis=1, keepdims=True), 1.0) if average == "sequence" else mask


def divisor(mask_bt: jax.Array, average: str, length: jax.Array | int) -> jax.Array:
    """What the weighted sum of a whole batch is divided by, a float32 scalar >= 1. Samples without tokens do not count.

    Args:
        mask_bt: bool [B, T], the tokens of the whole batch.
        average: see `token_weights`.
        length: the largest number of tokens that a sample can have, for "length".
    """
    counts = mask_bt.sum(axis=1, dtype=jnp.float32)
    samples = (counts > 0).sum(dtype=jnp.float32)
    return jnp.maximum({"sequence": samples, "token": counts.sum(), "length": samples * length}[average], 1.0)


def masked_sum(values_bt: jax.Array, mask_bt: jax.Array) -> jax.Array:
    """The sum over the tokens of a mask, a float32 scalar. Values outside the mask may be any."""
    return jnp.where(mask_bt, values_bt, 0.0).sum()

"""Losses of preference pairs, from the log-probabilities of both sides: DPO, IPO and SimPO, each with cross-entropy.

A side's log-probability is the sum over the tokens that the model drew. `tests/golden/preference.json` holds the losses
and gradients of TRL on the same numbers.

P pairs. In arrays [P, 2], column 0 is the chosen side and column 1 the rejected one.
"""

import flax.struct
import jax
import jax.numpy as jnp

from emu3_jax.training.preference_config import PreferenceConfig


@flax.struct.dataclass
class PairLosses:
    """What `pair_losses` computes.

    Attributes:
        loss: float32 [P], without cross-entropy.
        rewards: float32 [P, 2], implicit rewards, without gradient. DPO and IPO: beta times the log-ratio of the model
            to the reference. SimPO: beta times the mean log-probability of a token.
    """

    loss: jax.Array
    rewards: jax.Array


def pair_losses(
    config: PreferenceConfig, log_probs_p2: jax.Array, counts_p2: jax.Array, reference_p2: jax.Array | None = None
) -> PairLosses:
    """The loss of each pair.

    With r the log-ratio of a side, log p(side) - log p_reference(side), n its number of tokens, and s the label
    smoothing:

        dpo    -(1 - s) log sigmoid(beta d) - s log sigmoid(-beta d), d = r_chosen - r_rejected
        ipo    (r_chosen / n_chosen - r_rejected / n_rejected - 1 / (2 beta))^2, with means over tokens as in TRL
        simpo  like dpo with d = log p(chosen) / n_chosen - log p(rejected) / n_rejected - gamma / beta

    Args:
        config: which loss, and its constants.
        log_probs_p2: float32 [P, 2], log-probabilities of both sides under the model that is trained.
        counts_p2: [P, 2], number of tokens that each log-probability sums over.
        reference_p2: float32 [P, 2], the same log-probabilities under the reference. Simpo ignores it.

    Raises:
        ValueError: the loss needs a reference, and there is none.
    """
    counts = jnp.maximum(counts_p2.astype(jnp.float32), 1.0)
    if config.compares:
        if reference_p2 is None:
            raise ValueError(f"the loss {config.loss} needs the reference's log-probabilities")
        scores = log_probs_p2 - jax.lax.stop_gradient(reference_p2)
    else:
        scores = log_probs_p2 / counts
    rewards = jax.lax.stop_gradient(config.beta * scores)
    if config.loss == "ipo":
        means = scores / counts
        return PairLosses(jnp.square(means[:, 0] - means[:, 1] - 1 / (2 * config.beta)), rewards)
    logits = config.beta * (scores[:, 0] - scores[:, 1])
    if config.loss == "simpo":
        logits -= config.gamma
    smoothing = config.label_smoothing
    loss = -(1 - smoothing) * jax.nn.log_sigmoid(logits) - smoothing * jax.nn.log_sigmoid(-logits)
    return PairLosses(loss, rewards)


@flax.struct.dataclass
class PairSums:
    """Sums over pairs, all float32 scalars. Add the sums of several batches with `jax.tree.map`.

    Attributes:
        pairs: number of pairs.
        loss: summed losses, without cross-entropy.
        right: number of pairs whose chosen side has the higher reward.
        chosen_reward: summed rewards of the chosen sides.
        rejected_reward: summed rewards of the rejected sides.
        chosen: summed log-probabilities of the chosen sides.
        rejected: summed log-probabilities of the rejected sides.
        chosen_tokens: number of tokens of the chosen sides.
        rejected_tokens: number of tokens of the rejected sides.
    """

    pairs: jax.Array
    loss: jax.Array
    right: jax.Array
    chosen_reward: jax.Array
    rejected_reward: jax.Array
    chosen: jax.Array
    rejected: jax.Array
    chosen_tokens: jax.Array
    rejected_tokens: jax.Array


def pair_sums(
    config: PreferenceConfig, log_probs_p2: jax.Array, counts_p2: jax.Array, reference_p2: jax.Array | None = None
) -> PairSums:
    """Sums over the pairs of a batch. Arguments and errors are those of `pair_losses`.

    A pair without tokens on one side is left out: evaluation fills its last batch with empty rows. The loss of training
    is `loss / pairs - cross_entropy * chosen / chosen_tokens`.
    """
    found = pair_losses(config, log_probs_p2, counts_p2, reference_p2)
    real = counts_p2.min(axis=1) > 0

    def total(values_p: jax.Array) -> jax.Array:
        return jnp.where(real, values_p, 0.0).sum(dtype=jnp.float32)

    return PairSums(
        pairs=total(jnp.ones(real.shape)),
        loss=total(found.loss),
        right=total(found.rewards[:, 0] > found.rewards[:, 1]),
        chosen_reward=total(found.rewards[:, 0]),
        rejected_reward=total(found.rewards[:, 1]),
        chosen=total(log_probs_p2[:, 0]),
        rejected=total(log_probs_p2[:, 1]),
        chosen_tokens=total(counts_p2[:, 0]),
        rejected_tokens=total(counts_p2[:, 1]),
    )

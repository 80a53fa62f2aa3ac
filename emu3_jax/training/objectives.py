"""What a step minimises: next-token cross-entropy, or a loss of preference pairs.

An objective is a sum of terms, each divided by a count over the whole batch. So a batch can be computed in parts, whose
terms, sums and gradients add up.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from emu3_jax.config import SpecialTokens
from emu3_jax.training.config import TrainConfig
from emu3_jax.training.log_probs import sequence_log_probs, token_log_probs
from emu3_jax.training.losses import LossSums, chunked_cross_entropy, next_tokens
from emu3_jax.training.preference import PairSums, pair_sums
from emu3_jax.training.preference_config import PreferenceConfig

Batch = Mapping[str, jax.Array]


class Forward(Protocol):
    """Runs the decoder on a batch."""

    def __call__(self, *, adapters: bool = True) -> tuple[jax.Array, jax.Array]:
        """The hidden states [B, S, D], and the head's kernel [V, D].

        Without `adapters`, the frozen weights alone run, and nothing has a gradient.
        """


class Objective(Protocol):
    """What a step minimises.

    Attributes:
        arrays: arrays of a batch that the objective reads beside those of `data.pipeline`: by name, the number of axes
            (1 for [B], 2 for [B, S]) and the dtype.
        together: number of consecutive rows that belong together: a device or part of a batch gets all of them.
    """

    arrays: Mapping[str, tuple[int, Any]]
    together: int

    def totals(self, batch: Batch) -> tuple[jax.Array, ...]:
        """The counts of a whole batch by which its terms are divided, float32 scalars >= 1."""

    def terms(self, forward: Forward, batch: Batch) -> tuple[tuple[jax.Array, ...], Any]:
        """The terms of a batch or part, and sums for `figures`: a pytree of float32 scalars without gradients."""

    def figures(self, sums: Any) -> dict[str, Any]:
        """Metrics from the sums of a batch, or of several batches. Scalars may be arrays or numbers."""

    def loss(self, sums: Any) -> Any:
        """The loss that an evaluation reports, from the sums of all its batches."""

    def note(self, figures: Mapping[str, float]) -> str:
        """The metrics as text for people: the loss first."""


def objective(config: TrainConfig, special: SpecialTokens) -> Objective:
    """The objective of a config. `special` are the decoder's control tokens."""
    if config.preference is not None:
        return Pairs(config.preference)
    return NextTokens(config.vision_weight, (special.visual_start, special.visual_end))


class NextTokens:
    """Next-token cross-entropy: the mean over all targets, visual ones weighted."""

    arrays: Mapping[str, tuple[int, Any]] = {}
    together = 1

    def __init__(self, vision_weight: float, visual: tuple[int, int]):
        self._weight, self._visual = vision_weight, visual

    def totals(self, batch: Batch) -> tuple[jax.Array, ...]:
        return (jnp.maximum(next_tokens(batch["tokens"], batch["loss_mask"])[1].sum(dtype=jnp.float32), 1.0),)

    def terms(self, forward: Forward, batch: Batch) -> tuple[tuple[jax.Array, ...], LossSums]:
        labels, mask = next_tokens(batch["tokens"], batch["loss_mask"])
        hidden, head = forward()
        total, sums = chunked_cross_entropy(hidden, head, labels, mask, self._visual, vision_weight=self._weight)
        return (total,), sums

    def figures(self, sums: LossSums) -> dict[str, Any]:
        return {
            "loss_text": _mean(sums.text, sums.text_count),
            "loss_vision": _mean(sums.vision, sums.vision_count),
            "targets": sums.count,
        }

    def loss(self, sums: LossSums) -> Any:
        return _mean(sums.text + sums.vision, sums.count)

    def note(self, figures: Mapping[str, float]) -> str:
        """The loss, then in brackets the mean losses of text and visual targets. A kind without targets is left out."""
        kinds = [f"{kind} {figures[f'loss_{kind}']:.4f}" for kind in ("text", "vision") if figures[f"loss_{kind}"]]
        return f"loss {figures['loss']:.4f}" + (f" ({', '.join(kinds)})" if kinds else "")


class Pairs:
    """A loss of preference pairs, plus weighted cross-entropy of the chosen sides. See `training.preference`."""

    together = 2

    def __init__(self, config: PreferenceConfig):
        self._config = config
        self._stored = config.compares and config.reference == "stored"
        self.arrays: Mapping[str, tuple[int, Any]] = {"reference": (1, jnp.float32)} if self._stored else {}

    def totals(self, batch: Batch) -> tuple[jax.Array, ...]:
        _, mask = next_tokens(batch["tokens"], batch["loss_mask"])
        counts = mask.sum(axis=1, dtype=jnp.float32).reshape(-1, 2)
        real = counts.min(axis=1) > 0
        chosen = jnp.where(real, counts[:, 0], 0.0).sum()
        return jnp.maximum(real.sum(dtype=jnp.float32), 1.0), jnp.maximum(chosen, 1.0)

    def terms(self, forward: Forward, batch: Batch) -> tuple[tuple[jax.Array, ...], PairSums]:
        reference = None
        if self._stored:
            reference = batch["reference"].reshape(-1, 2)
        elif self._config.compares:
            reference = row_log_probs(*forward(adapters=False), batch)[0].reshape(-1, 2)
        log_probs, counts = (x.reshape(-1, 2) for x in row_log_probs(*forward(), batch))
        sums = pair_sums(self._config, log_probs, counts, reference)
        return (sums.loss, -self._config.cross_entropy * sums.chosen), jax.lax.stop_gradient(sums)

    def figures(self, sums: PairSums) -> dict[str, Any]:
        chosen, rejected = (_mean(x, sums.pairs) for x in (sums.chosen_reward, sums.rejected_reward))
        return {
            "accuracy": _mean(sums.right, sums.pairs),
            "margin": chosen - rejected,
            "reward_chosen": chosen,
            "reward_rejected": rejected,
            "log_prob_chosen": _mean(sums.chosen, sums.pairs),
            "log_prob_rejected": _mean(sums.rejected, sums.pairs),
            "cross_entropy": -_mean(sums.chosen, sums.chosen_tokens),
            "pairs": sums.pairs,
            "targets": sums.chosen_tokens + sums.rejected_tokens,
        }

    def loss(self, sums: PairSums) -> Any:
        cross_entropy = -_mean(sums.chosen, sums.chosen_tokens)
        return _mean(sums.loss, sums.pairs) + self._config.cross_entropy * cross_entropy

    def note(self, figures: Mapping[str, float]) -> str:
        return (
            f"loss {figures['loss']:.4f}, accuracy {figures['accuracy']:.1%}, margin {figures['margin']:.4f}, "
            f"cross-entropy {figures['cross_entropy']:.4f}"
        )


def row_log_probs(hidden_bsd: jax.Array, head_vd: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The summed log-probabilities of each row's targets, and their numbers, both float32 [B]."""
    labels, mask = next_tokens(batch["tokens"], batch["loss_mask"])
    log_probs, _ = token_log_probs(hidden_bsd, head_vd, labels)
    return sequence_log_probs(log_probs, mask)


def _mean(total: Any, count: Any) -> Any:
    """`total / count`, or 0 where both are 0."""
    return total / (count + (count == 0))

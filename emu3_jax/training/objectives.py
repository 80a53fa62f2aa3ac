"""What a step minimises: next-token cross-entropy, a loss of preference pairs, or GRPO's loss of drawn samples.

An objective is a sum of terms, each divided by a count over the whole batch. So a batch can be computed in parts, whose
terms, sums and gradients add up.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp

from emu3_jax.config import SpecialTokens
from emu3_jax.training import grpo
from emu3_jax.training.config import TrainConfig
from emu3_jax.training.grpo_config import GrpoConfig
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
    if config.grpo is not None:
        answers = config.grpo.max_new_tokens is not None
        return Groups(config.grpo, None if answers else (special.visual_start, special.visual_end))
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


@flax.struct.dataclass
class GroupSums:
    """Sums over the drawn tokens of a batch, float32 scalars. Divide by `tokens` or `samples`.

    Attributes:
        loss: sum of the losses, as `GrpoConfig.average` weighs them.
        tokens: number of drawn tokens.
        samples: number of pictures or answers that count.
        entropy: sum of the policy's entropies, in nats.
        kl: sum of the estimates of the KL divergence to the reference, in nats.
        low, high: number of tokens below and above the clip range, see `grpo.TokenLosses`.
    """

    loss: jax.Array
    tokens: jax.Array
    samples: jax.Array
    entropy: jax.Array
    kl: jax.Array
    low: jax.Array
    high: jax.Array


class Groups:
    """GRPO's loss of pictures or answers that the policy drew, see `training.grpo`.

    An answer takes one row. A picture takes `together` rows. If two, the first has the prompt and the second has none,
    and the policy is the mixture of both by guidance. Both hold the picture at the same columns. `loss_mask` of the
    first row says which tokens were drawn; samples that do not count have none. Of each array, a picture's value is in
    its first row.
    """

    def __init__(self, config: GrpoConfig, ids: tuple[int, int] | None):
        """`ids`: first id that the policy may draw, and the id after the last one; None for the whole vocabulary."""
        self._config, self._ids = config, ids
        self.together = config.rows
        arrays: dict[str, tuple[int, Any]] = {"advantage": (1, jnp.float32)}
        if config.iterations > 1:
            arrays["old"] = (2, jnp.float32)
        if config.reference:
            arrays["reference"] = (2, jnp.float32)
        self.arrays: Mapping[str, tuple[int, Any]] = arrays

    def totals(self, batch: Batch) -> tuple[jax.Array, ...]:
        mask = self._first(batch["loss_mask"])
        most = self._config.max_new_tokens or mask.sum(axis=1).max()  # all pictures of a run have as many tokens
        return (grpo.divisor(mask, self._config.average, most),)

    def terms(self, forward: Forward, batch: Batch) -> tuple[tuple[jax.Array, ...], GroupSums]:
        config = self._config
        log_probs, entropy, mask = self.policy(*forward(), batch)
        old = self._first(batch["old"]) if "old" in batch else jax.lax.stop_gradient(log_probs)
        found = grpo.token_losses(
            log_probs, old, mask, self._first(batch["advantage"]), level=config.level, clip_low=config.clip_low,
            clip_high=config.clip_high, kl_weight=config.kl_weight,
            reference_bt=self._first(batch["reference"]) if config.reference else None,
        )  # fmt: skip
        loss = grpo.masked_sum(found.loss * grpo.token_weights(mask, config.average), mask)
        sums = GroupSums(
            loss=loss,
            tokens=mask.sum(dtype=jnp.float32),
            samples=mask.any(axis=1).sum(dtype=jnp.float32),
            entropy=grpo.masked_sum(entropy, mask),
            kl=grpo.masked_sum(found.kl, mask),
            low=grpo.masked_sum(found.low, mask),
            high=grpo.masked_sum(found.high, mask),
        )
        return (loss,), jax.lax.stop_gradient(sums)

    def policy(self, hidden_bsd: jax.Array, head_vd: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The policy's log-probabilities and entropies, and which tokens were drawn.

        Returns:
            float32 [P, S] log-probabilities of the next tokens among the ids that the policy may draw; float32 [P, S]
            entropies; and bool [P, S], of which positions the next token was drawn; for P pictures or answers. Where it
            was not, there is no meaning.
        """
        config, (start, end) = self._config, self._ids or (0, len(head_vd))
        labels, mask = next_tokens(batch["tokens"], batch["loss_mask"])
        labels = jnp.clip(labels - start, 0, end - start - 1)
        hidden, head = hidden_bsd, head_vd[start:end]
        if self.together == 2:
            # Guided logits are a weighted sum of both rows' logits, so one product of twice the width gives them.
            # Summing the hidden states first would lose digits in bfloat16: the weights have different signs.
            halves = hidden.reshape(-1, 2, *hidden.shape[1:])
            scales = config.guidance, 1 - config.guidance
            hidden = jnp.concatenate([halves[:, i] * jnp.asarray(s, hidden.dtype) for i, s in enumerate(scales)], -1)
            head = jnp.concatenate([head, head], axis=-1)
        if config.temperature != 1:
            hidden = hidden / jnp.asarray(config.temperature, hidden.dtype)
        return *token_log_probs(hidden, head, self._first(labels)), self._first(mask)

    def _first(self, rows: jax.Array) -> jax.Array:
        """Of [B, ...], the first row of each picture or answer."""
        return rows.reshape(-1, self.together, *rows.shape[1:])[:, 0]

    def figures(self, sums: GroupSums) -> dict[str, Any]:
        figures = {"entropy": _mean(sums.entropy, sums.tokens)}
        if self._config.reference:
            figures["kl"] = _mean(sums.kl, sums.tokens)
        return figures | {
            "clip_low": _mean(sums.low, sums.tokens),
            "clip_high": _mean(sums.high, sums.tokens),
            f"{self._config.noun}s": sums.samples,
            "targets": sums.tokens,
        }

    def loss(self, sums: GroupSums) -> Any:
        most = self._config.max_new_tokens
        length = sums.samples * most if most else sums.tokens
        total = {"sequence": sums.samples, "token": sums.tokens, "length": length}
        return _mean(sums.loss, total[self._config.average])

    def note(self, figures: Mapping[str, float]) -> str:
        kl = f", KL {figures['kl']:.4f}" if "kl" in figures else ""
        return f"reward {figures['reward']:.4f} ± {figures['reward_spread']:.4f}{kl}, entropy {figures['entropy']:.3f}"


def row_log_probs(hidden_bsd: jax.Array, head_vd: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The summed log-probabilities of each row's targets, and their numbers, both float32 [B]."""
    labels, mask = next_tokens(batch["tokens"], batch["loss_mask"])
    log_probs, _ = token_log_probs(hidden_bsd, head_vd, labels)
    return sequence_log_probs(log_probs, mask)


def _mean(total: Any, count: Any) -> Any:
    """`total / count`, or 0 where both are 0."""
    return total / (count + (count == 0))

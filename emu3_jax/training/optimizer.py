"""optax's AdamW with the settings of an `OptimizerConfig`."""

from typing import Any

import jax
import optax

from emu3_jax.training.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The schedule: linear warm-up from 0, then a cosine to the final rate at `steps`.

    It equals transformers' `cosine_with_min_lr`.
    """
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, steps, config.final_learning_rate
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW. All weights decay except the scales of norms, as in the reference."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=_decays,
            mu_dtype=config.first_moment_dtype,
        ),
    )


def _decays(params: Any) -> Any:
    """A tree of bools: which leaves decay. All do but scales."""
    # Leaves in Flax boxes have further path entries after their name, so every entry is compared.
    return jax.tree_util.tree_map_with_path(
        lambda path, _: all(getattr(entry, "key", None) != "scale" for entry in path), params
    )

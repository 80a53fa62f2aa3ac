"""AdamW by optax, from the numbers of `OptimizerConfig`."""

from typing import Any

import jax
import optax

from emu3_jax.training.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine to the final rate at `steps` (transformers' `cosine_with_min_lr`)."""
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, steps, config.final_learning_rate
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW; weights decay except the norms' scales, as in the reference."""
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
    """Which leaves decay: all but scales."""
    # Within boxes that name axes, the name is not the last entry of the path.
    return jax.tree_util.tree_map_with_path(
        lambda path, _: all(getattr(entry, "key", None) != "scale" for entry in path), params
    )

"""optax's AdamW and Muon with the settings of an `OptimizerConfig`."""

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from emu3_jax.training.config import OptimizerConfig

# The matrices of a layer, with the axes that a product sums over and those of its result, counted from the end: other
# axes count matrices. The projections to queries, keys and values of all heads are one matrix, gate and up are two.
_MATRICES = {
    "qkv": MuonDimensionNumbers((-4,), (-3, -2, -1)),
    "out": MuonDimensionNumbers((-4, -3, -2), (-1,)),
    "gate_up": MuonDimensionNumbers((-3,), (-1,)),
    "down": MuonDimensionNumbers((-2,), (-1,)),
}
_RMS = 0.2  # of Muon's updates, as of AdamW's (arXiv 2502.16982, 2.2)


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The schedule: linear warm-up from 0, then a cosine to the final rate at `steps`.

    It equals transformers' `cosine_with_min_lr`.
    """
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, steps, config.final_learning_rate
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW. All weights decay except the scales of norms, as in the reference.

    With `algorithm="muon"`, Muon updates the matrices of the layers, and AdamW the rest.
    """
    rate = learning_rate(config, steps)
    adamw = optax.adamw(
        rate,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_decays,
        mu_dtype=config.first_moment_dtype,
    )
    if config.algorithm == "adamw":
        return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
    orthogonal = muon(
        rate,
        weight_decay=config.weight_decay,
        mu_dtype=config.first_moment_dtype,
        muon_weight_dimension_numbers=_dimension_numbers,
        consistent_rms=_RMS,
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm), optax.partition({"muon": orthogonal, "adamw": adamw}, _algorithms)
    )


def _decays(params: Any) -> Any:
    """A tree of bools: which leaves decay. All do but scales."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "scale" not in _names(path), params)


def _algorithms(params: Any) -> Any:
    """A tree of names: the algorithm that updates each leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "muon" if _MATRICES.keys() & _names(path) else "adamw", params
    )


def _dimension_numbers(matrices: Any) -> Any:
    """A tree with the axes of each leaf. All leaves are in `_MATRICES`."""

    def numbers(path: tuple[Any, ...], _: Any) -> MuonDimensionNumbers:
        (name,) = _MATRICES.keys() & _names(path)
        return _MATRICES[name]

    return jax.tree_util.tree_map_with_path(numbers, matrices)


def _names(path: tuple[Any, ...]) -> set[str]:
    """The names in a leaf's path. Leaves in Flax boxes have further entries after their own name."""
    return {entry.key for entry in path if hasattr(entry, "key")}

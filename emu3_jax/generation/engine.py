"""The jitted programs of generation: prefill and the decode loop. `session` calls them.

B requested rows, padded for the mesh; R computed rows: B, or 2B with guidance (conditional rows, then unconditional
rows); T steps of the schedule; P slots of the prompt.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from emu3_jax.config import DecoderConfig
from emu3_jax.generation import sampling
from emu3_jax.generation.schedule import SAMPLED
from emu3_jax.models.cache import KVCache
from emu3_jax.models.capability import target_platform
from emu3_jax.models.decoder import Decoder, visual_head_params


class Plan(flax.struct.PyTreeNode):
    """The inputs of the decode loop that do not change while it runs."""

    forced: sampling.Array  # int32 [B, T]: the forced id of each step, or SAMPLED
    settings: sampling.RowSettings


class DecodeState(flax.struct.PyTreeNode):
    """The state that the decode loop carries from step to step."""

    cache: KVCache
    tokens: jax.Array  # int32 [B, T], the ids so far
    step: jax.Array  # int32 scalar: the steps taken
    ended: jax.Array  # bool [B]: rows of free text that have emitted EOS


@dataclasses.dataclass(frozen=True)
class Variant:
    """The static options that the programs are compiled for, besides shapes."""

    visual_only: bool
    guided: bool
    use_top_k: bool
    use_top_p: bool
    narrow_cache: bool = False
    kernels: str = "xla"  # from `attention.KERNELS`, but not "auto"


class _Program:
    """A jitted function that is compiled without `xla_allow_excess_precision` on CPUs.

    With this option XLA may keep bfloat16 values in float32 inside a fusion, and on CPUs the number of rows decides
    what is fused. Without the option, bfloat16 results on CPUs do not depend on the number of rows. It costs at most a
    few per cent of time. On other devices the number of rows also chooses the kernels of products, so the option would
    not help.
    """

    def __init__(self, function: Callable, **options: Any):
        functools.update_wrapper(self, function)
        exact = {"xla_allow_excess_precision": False}
        self._elsewhere = jax.jit(function, **options)
        self._on_cpus = jax.jit(function, compiler_options=exact, **options)

    def __call__(self, *arguments: Any, **static: Any) -> Any:
        return self.jitted(*arguments, **static)

    @property
    def jitted(self) -> Any:
        """The jitted function for the platform of the current mesh, or of the default device without a mesh."""
        return self._on_cpus if target_platform() == "cpu" else self._elsewhere

    def lower(self, *arguments: Any, **static: Any) -> jax.stages.Lowered:
        """Lowers the program, as the method of jitted functions does."""
        return self.jitted.lower(*arguments, **static)


@functools.partial(_Program, static_argnames=("config", "variant", "slots"))
def prefill(
    params: Any,
    prompts: jax.Array,
    start: jax.Array,
    plan: Plan,
    *,
    config: DecoderConfig,
    variant: Variant,
    slots: int,
) -> DecodeState:
    """Runs the prompts (int32 [R, P], right-aligned; row r starts at slot start[r]) and takes step 0."""
    forward = _forward(params, config, variant)
    logits, cache = forward(prompts, KVCache.create(config, start, slots, variant.narrow_cache), last_only=True)
    rows = plan.forced.shape[0]
    state = DecodeState(
        cache=cache,
        tokens=jnp.full_like(plan.forced, config.tokens.pad),
        step=jnp.zeros((), jnp.int32),
        ended=jnp.zeros((rows,), bool),
    )
    return _replicated(emit(logits[:, 0], state, plan, config, variant))


@functools.partial(_Program, static_argnames=("config", "variant"), donate_argnames=("state",))
def decode(
    params: Any, state: DecodeState, plan: Plan, until: jax.Array, *, config: DecoderConfig, variant: Variant
) -> DecodeState:
    """Takes steps up to `until` (int32 scalar), or until every row has ended."""
    forward = _forward(params, config, variant)

    def proceed(state: DecodeState) -> jax.Array:
        return (state.step < until) & ~state.ended.all()

    def step(state: DecodeState) -> DecodeState:
        last = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
        rows = jnp.concatenate([last, last]) if variant.guided else last
        logits, cache = forward(rows, state.cache)
        return emit(logits[:, 0], state.replace(cache=cache), plan, config, variant)

    return _replicated(jax.lax.while_loop(proceed, step, state))


def _forward(params: Any, config: DecoderConfig, variant: Variant) -> Callable:
    """The decoder with the head that the variant needs. Call it outside the loop, so that the head is cut only once."""
    if variant.visual_only:
        # The barrier keeps XLA from sinking the slice into the loop, where it would copy 0.27 GB every step.
        params = jax.lax.optimization_barrier(visual_head_params(params, config))
    return functools.partial(
        Decoder(config, visual_head=variant.visual_only, kernels=variant.kernels).apply, {"params": params}
    )


def emit(logits: jax.Array, state: DecodeState, plan: Plan, config: DecoderConfig, variant: Variant) -> DecodeState:
    """Turns logits (float32 [R, V]) into the tokens of this step: guidance, sampling, schedule."""
    if variant.guided:
        rows = plan.forced.shape[0]
        logits = sampling.guide(logits[:rows], logits[rows:], plan.settings.guidance)
    chosen = sampling.sample(
        logits, state.step, plan.settings, use_top_k=variant.use_top_k, use_top_p=variant.use_top_p
    )
    special = config.tokens
    forced = jax.lax.dynamic_slice_in_dim(plan.forced, state.step, 1, axis=1)[:, 0]
    free = forced == SAMPLED
    token = jnp.where(free, chosen + (special.visual_start if variant.visual_only else 0), forced)
    token = jnp.where(state.ended, special.pad, token)
    tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, axis=1)
    return state.replace(tokens=tokens, step=state.step + 1, ended=state.ended | (free & (token == special.eos)))


def _replicated(state: DecodeState) -> DecodeState:
    """Replicates `tokens` and `ended` on a mesh, because every host reads them and the next call expects it."""
    tokens = nn.with_logical_constraint(state.tokens, (None, None))
    return state.replace(tokens=tokens, ended=nn.with_logical_constraint(state.ended, (None,)))

"""The jitted programs of generation: prefill and the decode loop. `session` calls them.

B requested rows, padded for the mesh; R computed rows: B, or 2B with guidance (conditional rows, then unconditional
rows); T steps of the schedule; P slots of the prompt; W tokens of a pass.
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
from emu3_jax.generation import lookup, parallel, sampling, zipar
from emu3_jax.generation.schedule import SAMPLED_FREE, SAMPLED_VISUAL
from emu3_jax.generation.zipar import Order
from emu3_jax.models.cache import KVCache, Placement
from emu3_jax.models.capability import target_platform
from emu3_jax.models.decoder import Decoder, visual_head_params


class Plan(flax.struct.PyTreeNode):
    """The inputs of the decode loop that do not change while it runs."""

    forced: sampling.Array  # int32 [B, T + 2W - 1]: what each step emits, see `schedule.forced_ids`
    goal: sampling.Array  # int32 [B]: the number of steps up to the row's last sampled one
    prompts: sampling.Array  # int32 [B, P]: the right-aligned prompts in which `lookup` searches, or P = 0
    settings: sampling.RowSettings


class DecodeState(flax.struct.PyTreeNode):
    """The state that the decode loop carries from pass to pass. Each row advances on its own."""

    cache: KVCache
    tokens: jax.Array  # int32 [B, T + 2W - 1]: the ids so far, then guesses
    step: jax.Array  # int32 [B]: the steps taken, which is the number of certain ids
    passes: jax.Array  # int32 [B]: the passes that the row took part in, without prefill
    ended: jax.Array  # bool [B]: rows of free text that have emitted EOS


@dataclasses.dataclass(frozen=True)
class Variant:
    """The static options that the programs are compiled for, besides shapes.

    Attributes:
        visual_only: whether all sampled steps are visual, so that only the visual rows of the head are needed.
        mixed: whether there are visual steps and steps of free text.
        guided: whether rows are computed twice for guidance.
        use_top_k: whether any row's `top_k` has an effect.
        use_top_p: whether any row's `top_p` has an effect.
        window: tokens W of a pass per row; see `parallel`.
        lockstep: whether all rows are at the same step. Needs W = 1.
        narrow_cache: whether keys and values are stored as int8.
        kernels: from `attention.KERNELS`, but not "auto".
        replaceable: whether rows that are done are kept until others take their place.
        settled_per_pass: pretend that passes settle this many tokens on average, whatever was guessed; for benchmarks.
    """

    visual_only: bool
    guided: bool
    use_top_k: bool
    use_top_p: bool
    mixed: bool = False
    window: int = 1
    lockstep: bool = True
    narrow_cache: bool = False
    kernels: str = "xla"
    replaceable: bool = False
    settled_per_pass: float | None = None


class Program:
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


@functools.partial(Program, static_argnames=("config", "variant", "slots"))
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
    forward = _forward(params, config, dataclasses.replace(variant, kernels="xla"))
    cache = KVCache.create(config, start, slots, variant.narrow_cache)
    logits, cache = forward(prompts, cache, last_only=True)
    return _begun(logits, cache, plan, config, variant)


@functools.partial(Program, static_argnames=("config", "variant"), donate_argnames=("cache",))
def resume(
    params: Any,
    cache: KVCache,
    tokens: jax.Array,
    counts: jax.Array,
    plan: Plan,
    *,
    config: DecoderConfig,
    variant: Variant,
) -> DecodeState:
    """As `prefill`, with the cache of earlier turns: runs what it lacks of the prompts, and takes step 0.

    Takes `tokens` and `counts` as `append`.
    """
    forward = _forward(params, config, dataclasses.replace(variant, kernels="xla"))
    return _begun(*append(forward, cache, tokens, counts), plan, config, variant)


def append(forward: Callable, cache: KVCache, tokens: jax.Array, counts: jax.Array) -> tuple[jax.Array, KVCache]:
    """Runs further tokens after those of a cache, as many per row as it lacks.

    Args:
        forward: the decoder with its parameters.
        cache: the cache.
        tokens: int32 [R, S], aligned to the left. The padding after a row's tokens goes to slots that later tokens
            overwrite before a query sees them.
        counts: int32 [R], the number of tokens of each row, at least 1.

    Returns:
        Logits after each row's last token, float32 [R, 1, V]; and the cache.
    """
    before = cache.length
    logits, cache = forward(tokens, cache, last_only=counts - 1)
    return logits, cache.replace(length=before + counts)


def _begun(logits: jax.Array, cache: KVCache, plan: Plan, config: DecoderConfig, variant: Variant) -> DecodeState:
    """The state after step 0, with the logits [R, 1, V] of the prompts' last tokens."""
    first = jnp.zeros(plan.goal.shape, jnp.int32)
    token = choose(logits, first, plan, config, variant)[:, 0]
    ended = (plan.forced[:, 0] == SAMPLED_FREE) & (token == config.tokens.eos)
    tokens = parallel.first_guesses(plan.forced, token).at[:, 0].set(token)
    return replicated(
        DecodeState(
            cache=cache.replace(lockstep=variant.lockstep),
            tokens=_with_looked_up(tokens, first + 1, plan, variant),
            step=first + 1,
            passes=first,
            ended=ended,
        )
    )


@functools.partial(Program, static_argnames=("config", "variant"), donate_argnames=("state",))
def decode(
    params: Any, state: DecodeState, plan: Plan, passes: jax.Array, *, config: DecoderConfig, variant: Variant
) -> DecodeState:
    """Takes up to `passes` passes (int32 scalar).

    It takes fewer after a pass in which a row completes a frame or all of its steps, and when the cache has no room for
    another pass.
    """
    forward = _forward_of_classes(params, config, variant) if variant.mixed else _forward(params, config, variant)
    if variant.replaceable:
        state = state.replace(cache=_emptied(state.cache, _active(state, plan), variant))

    def proceed(carry: tuple[DecodeState, jax.Array, jax.Array]) -> jax.Array:
        state, left, paused = carry
        active = _active(state, plan)
        rows = jnp.concatenate([active, active]) if variant.guided else active
        longest = jnp.where(rows, state.cache.length, 0).max()
        return (left > 0) & ~paused & active.any() & (longest + variant.window <= state.cache.slots)

    def take(carry: tuple[DecodeState, jax.Array, jax.Array]) -> tuple[DecodeState, jax.Array, jax.Array]:
        state, left, _ = carry
        fed = parallel.window(state.tokens, state.step - 1, variant.window)
        rows = jnp.concatenate([fed, fed]) if variant.guided else fed
        logits, cache = forward(rows, state.cache)
        computed = choose(logits, state.step, plan, config, variant, _active(state, plan))
        state, paused = _settle(state, cache, fed, computed, plan, config, variant)
        return state, left - 1, paused

    return replicated(jax.lax.while_loop(proceed, take, (state, passes, jnp.zeros((), bool)))[0])


@functools.partial(Program, static_argnames=("config", "variant"), donate_argnames=("state",))
def decode_rows(
    params: Any,
    state: DecodeState,
    plan: Plan,
    order: Order,
    first: jax.Array,
    passes: jax.Array,
    *,
    config: DecoderConfig,
    variant: Variant,
) -> DecodeState:
    """Takes the passes `first` .. `first + passes - 1` (int32 scalars) of an order of `zipar`.

    `state.step` is the number of first steps whose tokens are known; later tokens may be known too. The lengths of the
    cache stay those of the prompts. The cache must have room for what the passes feed.
    """
    forward, cache = _forward(params, config, variant), state.cache
    prompt = cache.length.max()  # all rows of a session have the same
    rows, steps = order.fed.shape

    def doubled(array: jax.Array) -> jax.Array:
        return jnp.concatenate([array, array]) if variant.guided else array

    # The pass that feeds each slot of the cache: prompts before all passes, and slots that hold nothing never.
    slot = jnp.arange(cache.slots, dtype=jnp.int32)[None]
    fed = jnp.take(jnp.asarray(order.fed), jnp.clip(slot[0] - prompt, 0, steps - 1), axis=1)
    fed = jnp.where((slot >= prompt) & (slot < prompt + steps), fed, zipar.NEVER)
    fed = jnp.where((slot < prompt) & (slot >= cache.start[:, None]), 0, doubled(fed))

    def take(index: jax.Array, state: DecodeState) -> DecodeState:
        at = jnp.take(jnp.asarray(order.steps), index - 1, axis=1)  # [B, N]
        tokens = doubled(jnp.take_along_axis(state.tokens, at, axis=1, mode="clip"))
        slots = prompt + doubled(at)
        visible = (fed[:, None] <= index) & (slot[:, None] <= slots[..., None])
        logits, cache = forward(tokens, state.cache.replace(placement=Placement(slots, visible)))
        each = jax.vmap(lambda logits, step: choose(logits[:, None], step, plan, config, variant)[:, 0], 1, 1)
        return state.replace(
            cache=cache.replace(length=state.cache.length, placement=None),
            tokens=state.tokens.at[jnp.arange(rows)[:, None], at + 1].set(each(logits, at + 1), mode="drop"),
            step=jnp.take(jnp.asarray(order.certain), index, axis=1),
            passes=state.passes + (index <= order.passes),
        )

    return replicated(jax.lax.fori_loop(first, first + passes, take, state))


@functools.partial(jax.jit, donate_argnames=("state",))
def insert(state: DecodeState, one: DecodeState, row: jax.Array) -> DecodeState:
    """Puts row 0 of `one` in the place of a row of `state`; both have the same shapes per row.

    If only `one` is computed twice for guidance, its unconditional rows are left out.
    """
    count, singles = state.step.shape[0], one.step.shape[0]

    def per_row(old: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new[:1], row, axis=0)

    def per_computed_row(old: jax.Array, new: jax.Array) -> jax.Array:
        for half in range(old.shape[0] // count):
            part = new[half * singles : half * singles + 1]
            old = jax.lax.dynamic_update_slice_in_dim(old, part, row + half * count, axis=0)
        return old

    rest, given = state.replace(cache=None), one.replace(cache=None)
    cache = jax.tree.map(per_computed_row, state.cache, one.cache)
    return replicated(jax.tree.map(per_row, rest, given).replace(cache=cache))


@jax.jit
def rearrange(state: DecodeState, rows: jax.Array, computed: jax.Array) -> DecodeState:
    """The rows `rows` of `state`, whose computed rows are `computed`. Both are int32, of any length."""
    cache = jax.tree.map(lambda leaf: jnp.take(leaf, computed, axis=0), state.cache)
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0), state.replace(cache=None)).replace(cache=cache)


def _forward(params: Any, config: DecoderConfig, variant: Variant) -> Callable:
    """The decoder with the head that the variant needs. Call it outside the loop, so that the head is cut only once."""
    if variant.visual_only:
        # The barrier keeps XLA from sinking the slice into the loop, where it would copy 0.27 GB every step.
        params = jax.lax.optimization_barrier(visual_head_params(params, config))
    return functools.partial(
        Decoder(config, visual_head=variant.visual_only, kernels=variant.kernels).apply, {"params": params}
    )


def _forward_of_classes(params: Any, config: DecoderConfig, variant: Variant) -> Callable:
    """As `_forward`, for steps of all classes. It returns `Logits`, so that a product with a head may be skipped."""
    cut = jax.lax.optimization_barrier(visual_head_params(params, config))
    whole: Any = functools.partial(Decoder(config, kernels=variant.kernels).apply, {"params": params})
    visual: Any = functools.partial(
        Decoder(config, visual_head=True, kernels=variant.kernels).apply, {"params": cut}, method=Decoder.logits
    )

    def forward(tokens: jax.Array, cache: KVCache) -> tuple[Logits, KVCache]:
        hidden, cache = whole(tokens, cache, method=Decoder.hidden_cached)
        return Logits(lambda: whole(hidden, method=Decoder.logits), lambda: visual(hidden)), cache

    return forward


@dataclasses.dataclass(frozen=True)
class Logits:
    """Logits that are computed when they are asked for, float32 [R, W, V].

    Attributes:
        whole: those of all ids.
        visual: those of the visual ids.
    """

    whole: Callable[[], jax.Array]
    visual: Callable[[], jax.Array]


def choose(
    logits: jax.Array | Logits,
    step: jax.Array,
    plan: Plan,
    config: DecoderConfig,
    variant: Variant,
    active: jax.Array | None = None,
) -> jax.Array:
    """Turns logits into the tokens of the steps from step[b] on, int32 [B, W]: guidance, sampling, schedule.

    Args:
        logits: float32 [R, W, V]; or `Logits`, if the variant is mixed.
        step: int32 [B].
        plan: inputs of the loop.
        config: config of the decoder.
        variant: options of the programs.
        active: bool [B], the rows whose tokens matter; by default all.
    """
    rows, width = plan.goal.shape[0], variant.window if isinstance(logits, Logits) else logits.shape[1]
    steps = (step[:, None] + jnp.arange(width, dtype=jnp.int32)[None]).reshape(-1)
    settings = plan.settings if width == 1 else jax.tree.map(lambda column: jnp.repeat(column, width), plan.settings)
    special = config.tokens
    forced = parallel.window(jnp.asarray(plan.forced), step, width)

    def drawn(logits: jax.Array, asked: jax.Array | None = None) -> jax.Array:
        if variant.guided:
            conditional, unconditional = (x.reshape(rows * width, -1) for x in (logits[:rows], logits[rows:]))
            logits = sampling.guide(conditional, unconditional, settings.guidance)
        else:
            logits = logits.reshape(rows * width, -1)
        asked = None if asked is None else asked.reshape(-1)
        chosen = sampling.sample(
            logits, steps, settings, use_top_k=variant.use_top_k, use_top_p=variant.use_top_p, asked=asked
        )
        return chosen.reshape(rows, width)

    if isinstance(logits, Logits):
        chosen = _drawn_by_class(drawn, logits, forced, config, active)
    elif variant.mixed:
        visual = logits[..., special.visual_start : special.visual_end]
        chosen = _drawn_by_class(drawn, Logits(lambda: logits, lambda: visual), forced, config, active)
    else:
        chosen = drawn(logits) + (special.visual_start if variant.visual_only else 0)
    return nn.with_logical_constraint(jnp.where(forced < 0, chosen, forced), (None, None))


def _drawn_by_class(
    drawn: Callable, logits: Logits, forced: jax.Array, config: DecoderConfig, active: jax.Array | None
) -> jax.Array:
    """Draws free steps from all ids, and visual steps from the visual ids. What no active row needs is skipped.

    Visual steps are drawn as in a session of pictures only: among the visual ids alone, with the same noise.
    """
    free, visual = forced == SAMPLED_FREE, forced == SAMPLED_VISUAL
    if active is not None:
        free, visual = free & active[:, None], visual & active[:, None]

    def drawn_if(asked: jax.Array, logits: Callable[[], jax.Array], first: int) -> jax.Array:
        return jax.lax.cond(
            asked.any(), lambda: drawn(logits(), asked) + first, lambda: jnp.zeros(forced.shape, jnp.int32)
        )

    chosen = drawn_if(free, logits.whole, 0)
    return jnp.where(visual, drawn_if(visual, logits.visual, config.tokens.visual_start), chosen)


def _settle(
    state: DecodeState,
    cache: KVCache,
    fed: jax.Array,
    computed: jax.Array,
    plan: Plan,
    config: DecoderConfig,
    variant: Variant,
) -> tuple[DecodeState, jax.Array]:
    """The state after a pass, and whether a row has just completed a frame, or all of its steps.

    `fed` and `computed` are int32 [B, W], see `parallel.count_settled`. `cache` holds the keys and values of `fed`.
    """
    special, width, step = config.tokens, variant.window, state.step
    active, forced = _active(state, plan), parallel.window(jnp.asarray(plan.forced), step, 2 * width)
    computed = jnp.where(state.ended[:, None], special.pad, computed)
    settled, ended = parallel.count_settled(fed, computed), state.ended
    if variant.settled_per_pass is not None:
        before, after = (jnp.floor(n * variant.settled_per_pass) for n in (state.passes, state.passes + 1))
        settled = jnp.clip((after - before).astype(jnp.int32), 1, width)
    if not variant.visual_only:
        settled, last = parallel.end_of_text(computed, forced[:, :width], settled, special.eos)
        ended = ended | (last & active)
    if not variant.lockstep:
        settled = jnp.where(active, jnp.minimum(settled, plan.goal - step), 0)
    kept = parallel.window(state.tokens, step, 2 * width - 1)
    new = jnp.where((settled > 0)[:, None], parallel.next_guesses(computed, forced[:, :-1]), kept)
    ends = forced[:, 1 : width + 1] == special.eof  # whether a frame ends with the window's tokens
    framed = (ends & (jnp.arange(width)[None] < settled[:, None])).any(axis=1)
    # The decoder has added W to the lengths; uncertain tokens do not count.
    rows = jnp.concatenate([settled, settled]) if variant.guided else settled
    state = state.replace(
        cache=cache.replace(length=cache.length + rows - width),
        tokens=_with_looked_up(parallel.with_window(state.tokens, new, step), step + settled, plan, variant),
        step=step + settled,
        passes=state.passes + active,
        ended=ended,
    )
    return state, (active & (framed | ~_active(state, plan))).any()


def _with_looked_up(tokens: jax.Array, step: jax.Array, plan: Plan, variant: Variant) -> jax.Array:
    """`tokens` with guesses by `lookup` for the next W - 1 steps, from step[b] on, that are free text."""
    if variant.window == 1 or variant.visual_only:
        return tokens
    prompts, count = jnp.asarray(plan.prompts), variant.window - 1
    guesses, found = lookup.look_up(jnp.concatenate([prompts, tokens], axis=1), prompts.shape[1] + step, count)
    free = parallel.window(jnp.asarray(plan.forced), step, count) == SAMPLED_FREE
    kept = parallel.window(tokens, step, count)
    return parallel.with_window(tokens, jnp.where(free & found[:, None], guesses, kept), step)


def _emptied(cache: KVCache, active: jax.Array, variant: Variant) -> KVCache:
    """The cache with no tokens in rows that are done, so that attention reads nothing for them."""
    rows = jnp.concatenate([active, active]) if variant.guided else active
    return cache.replace(length=jnp.where(rows, cache.length, cache.start))


def _active(state: DecodeState, plan: Plan) -> jax.Array:
    """bool [B]: whether a row has steps to take."""
    return (state.step < plan.goal) & ~state.ended


def replicated(state: Any) -> Any:
    """Replicates all but the field `cache` on a mesh, because every host reads it and the next call expects it."""

    def whole(leaf: jax.Array) -> jax.Array:
        return nn.with_logical_constraint(leaf, (None,) * leaf.ndim)

    cache = state.cache.replace(length=whole(state.cache.length))
    return jax.tree.map(whole, state.replace(cache=None)).replace(cache=cache)

"""Prefill and the jitted decode loop: prompts and schedules in, token ids out.

B rows as asked for; R rows as computed: B, or with guidance 2B (conditional rows, then unconditional rows).
T steps of the schedule, P prompt slots.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from emu3_jax.config import DecoderConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.generation import sampling
from emu3_jax.generation.schedule import SAMPLED, TokenClass, forced_ids, sampled_steps, stack_schedules
from emu3_jax.models.attention import choose_kernels
from emu3_jax.models.cache import KVCache
from emu3_jax.models.decoder import Decoder, visual_head_params
from emu3_jax.sharding.rules import use_mesh

# Steps per call of the loop. Between calls the host reports progress and notices that all rows have ended.
STEPS_PER_CALL = 128


@flax.struct.dataclass
class Plan:
    """What the loop obeys: constant while it runs."""

    forced: jax.Array  # int32 [B, T]: the id of each step, SAMPLED where there is a choice
    settings: sampling.RowSettings


@flax.struct.dataclass
class DecodeState:
    """What the loop carries."""

    cache: KVCache
    tokens: jax.Array  # int32 [B, T], the ids so far
    step: jax.Array  # int32 scalar: the steps taken
    ended: jax.Array  # bool [B]: rows of free text that have emitted EOS


@dataclasses.dataclass(frozen=True)
class Variant:
    """What the loop is compiled for, besides shapes."""

    visual_only: bool
    guided: bool
    use_top_k: bool
    use_top_p: bool
    narrow_cache: bool = False
    kernels: str = "xla"  # of `attention.KERNELS`, chosen


# XLA's attention reads all slots of the cache, which therefore grows by this many, so that about half of a long
# picture's are read on average. Each size is a program of its own: more of them cost more compilation than they save.
# A clip's cache of 100,000 slots grows by an eighth of the next power of two, through 20 sizes.
CACHE_GROWTH = 2048


def bucket(length: int) -> int:
    """The padded length that `length` is compiled for: few shapes, and little waste."""
    size = 64 if length <= 512 else 512
    return -(-length // size) * size


def cache_slots(needed: int, final: int, kernels: str) -> int:
    """Slots of the cache while `needed` of them are in use, `final` at the end; all at once where unused ones are free.

    Args:
        needed: slots.
        final: slots.
        kernels: of `attention.KERNELS`, chosen: not "auto".
    """
    if kernels != "xla":
        return final
    step = max(CACHE_GROWTH, (1 << (int(needed) - 1).bit_length()) // 8)
    return min(-(-needed // step) * step, final)


@functools.partial(jax.jit, static_argnames=("config", "variant", "slots"))
def prefill(params, prompts, start, plan: Plan, config: DecoderConfig, variant: Variant, slots: int) -> DecodeState:
    """Runs the prompts (int32 [R, P], right-aligned, row r from slot start[r] on) and takes step 0."""
    forward = _forward(params, config, variant)
    logits, cache = forward(prompts, KVCache.create(config, start, slots, variant.narrow_cache), last_only=True)
    rows = plan.forced.shape[0]
    state = DecodeState(
        cache=cache,
        tokens=jnp.full_like(plan.forced, config.tokens.pad),
        step=jnp.zeros((), jnp.int32),
        ended=jnp.zeros((rows,), bool),
    )
    return _whole(emit(logits[:, 0], state, plan, config, variant))


@functools.partial(jax.jit, static_argnames=("config", "variant"), donate_argnames=("state",))
def decode(params, state: DecodeState, plan: Plan, until, config: DecoderConfig, variant: Variant) -> DecodeState:
    """Takes steps up to `until` (int32 scalar), or until every row has ended."""
    forward = _forward(params, config, variant)

    def proceed(state: DecodeState):
        return (state.step < until) & ~state.ended.all()

    def step(state: DecodeState) -> DecodeState:
        last = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
        rows = jnp.concatenate([last, last]) if variant.guided else last
        logits, cache = forward(rows, state.cache)
        return emit(logits[:, 0], state.replace(cache=cache), plan, config, variant)

    return _whole(jax.lax.while_loop(proceed, step, state))


def _forward(params, config: DecoderConfig, variant: Variant) -> Callable:
    """The decoder with the head that the variant needs; to be made outside the loop, where cutting the head costs."""
    if variant.visual_only:
        # The barrier keeps XLA from sinking the slice into the loop, where it would copy 0.27 GB every step.
        params = jax.lax.optimization_barrier(visual_head_params(params, config))
    return functools.partial(
        Decoder(config, visual_head=variant.visual_only, kernels=variant.kernels).apply, {"params": params}
    )


def emit(logits, state: DecodeState, plan: Plan, config: DecoderConfig, variant: Variant) -> DecodeState:
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


def _whole(state: DecodeState) -> DecodeState:
    """What each host reads, and the next call expects, whole on every device of a mesh."""
    tokens = nn.with_logical_constraint(state.tokens, (None, None))
    return state.replace(tokens=tokens, ended=nn.with_logical_constraint(state.ended, (None,)))


def run(
    params,
    config: DecoderConfig,
    prompts: Sequence[Sequence[int]],
    schedules: Sequence[np.ndarray],
    settings: sampling.RowSettings,
    negatives: Sequence[Sequence[int]] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_tokens: Callable[[np.ndarray], None] | None = None,
    mesh: Mesh | None = None,
    row_multiple: int = 1,
    narrow_cache: bool = False,
    kernels: str = "auto",
) -> np.ndarray:
    """Generates one sequence per row; a row's result does not depend on its batch mates.

    Args:
        params: the decoder's parameters.
        config: the decoder's config.
        prompts: one list of ids per row.
        schedules: one array of `TokenClass` per row; all of pictures, or all of text.
        settings: how each row samples.
        negatives: the unconditional prompt of each row; None for no guidance.
        on_progress: called with (steps taken, steps in all) now and then.
        on_tokens: called as often, with the ids so far, int32 [B, steps taken]; the device goes on meanwhile. The last
            call has every id that is sampled, not what is forced after it.
        mesh: what the parameters are spread over, if anything. The callbacks run outside of it.
        row_multiple: the rows that are computed together are filled up to a multiple of this, the parts into which a
            mesh splits them.
        narrow_cache: keys and values are kept as int8.
        kernels: what computes the steps, of `attention.KERNELS`.

    Returns:
        int32 [B, longest schedule]: the generated ids; rows that end earlier are padded.

    Raises:
        Emu3Error: if a prompt with its schedule is longer than the model's positions.
    """
    check_positions(config, prompts, schedules, negatives)
    count = len(prompts)
    if negatives is not None:
        row_multiple //= math.gcd(2, row_multiple)  # each row is two
    fill = [*range(count), *[count - 1] * (-count % row_multiple)]
    prompts, schedules, negatives = (
        rows and [rows[index] for index in fill] for rows in (prompts, schedules, negatives)
    )
    settings = jax.tree.map(lambda column: column[np.asarray(fill)], settings)
    length = max(len(s) for s in schedules)
    stacked = stack_schedules(list(schedules), bucket(length))
    steps = sampled_steps(stacked)
    ends = (stacked == TokenClass.EOF).all(axis=0)  # of a clip's frames, which can be shown then
    rows = [*prompts, *(negatives or ())]
    width = bucket(max(len(row) for row in rows))
    start = np.asarray([width - len(row) for row in rows], np.int32)
    padded = np.asarray([[config.tokens.pad] * (width - len(row)) + list(row) for row in rows], np.int32)

    visual_only = not (stacked == TokenClass.FREE).any()
    candidates = config.tokens.visual_count if visual_only else config.vocab_size
    variant = Variant(
        visual_only=visual_only,
        guided=negatives is not None,
        use_top_k=bool((np.asarray(settings.top_k) < candidates).any()),
        use_top_p=bool((np.asarray(settings.top_p) < 1).any()),
        narrow_cache=narrow_cache,
        kernels=choose_kernels(kernels, config.head_dim),
    )
    # Arrays of the host: those of one device do not mix with weights that lie on several processes' devices.
    plan = Plan(forced=forced_ids(stacked, config.tokens), settings=settings)
    calls = _calls(params, padded, start, plan, config, variant, steps, np.flatnonzero(ends), mesh)
    # In pairs: the device has its next call before the host looks at what the last one made.
    for (taken, tokens, ended), _ in itertools.pairwise(itertools.chain(calls, [None])):
        tokens = np.array(tokens)[:count, :length]
        if on_progress is not None:
            on_progress(taken, steps)
        if on_tokens is not None:
            on_tokens(tokens[:, :taken])
        if np.asarray(ended).all():
            break
    # What follows the last choice is forced and needs no forward pass.
    tail = forced_ids(stacked[:count, steps:length], config.tokens)
    if visual_only:
        tokens[:, steps:] = tail
    return tokens


def _calls(
    params, prompts, start, plan: Plan, config: DecoderConfig, variant: Variant, steps: int, stops: np.ndarray, mesh
) -> Iterator[tuple[int, jax.Array, jax.Array]]:
    """After each call of a program: the steps taken, `DecodeState.tokens` and `.ended`, none of which need be ready.

    Calls also end at `stops`, in steps, which rise.
    """
    width = prompts.shape[1]
    final = width + plan.forced.shape[1]
    slots, taken = cache_slots(width + 1, final, variant.kernels), 1
    with use_mesh(mesh):
        state = prefill(params, prompts, start, plan, config, variant, slots)
    while True:
        yield taken, jnp.copy(state.tokens), jnp.copy(state.ended)  # the next call takes the state's own memory
        if taken >= steps:
            return
        slots = cache_slots(width + taken + 1, final, variant.kernels)
        taken = min(taken + STEPS_PER_CALL, steps, slots - width, *stops[stops > taken][:1])
        with use_mesh(mesh):
            if slots > state.cache.slots:
                state = state.replace(cache=state.cache.grow(slots))
            state = decode(params, state, plan, np.int32(taken), config, variant)


def check_positions(config: DecoderConfig, prompts, schedules, negatives=None) -> None:
    """Raises `Emu3Error` if a row does not fit the positions that the model was trained for."""
    for index, (prompt, schedule) in enumerate(zip(prompts, schedules, strict=True)):
        longest = max(len(prompt), len(negatives[index]) if negatives else 0)
        if longest + len(schedule) > config.max_positions:
            raise Emu3Error(
                f"row {index}: a prompt of {longest} tokens and {len(schedule)} to generate exceed the model's "
                f"{config.max_positions} positions: shorten the prompt, or ask for a smaller picture or answer"
            )

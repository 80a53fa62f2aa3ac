"""Rows that write text and pictures in turn: prefill, a decode loop that carries the grammar, and its session.

Each row has one context or more: the conditional one, and for guidance of visual tokens an unconditional one, whose
prompt lacks the text. A third one, whose prompt lacks the pictures too, guides towards the given pictures. Tokens of
pictures are appended to all contexts, tokens of text to the conditional one alone. All contexts of all rows are rows of
one batch, and each has its own length in the cache.

B rows; N contexts per row; R = N * B computed rows, context by context; P slots of the prompts; T most new tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from emu3_jax.config import DecoderConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.generation import grammar as rules
from emu3_jax.generation import sampling
from emu3_jax.generation.engine import Program, replicated
from emu3_jax.generation.grammar import Grammar, GrammarState
from emu3_jax.generation.sampling import RowSettings
from emu3_jax.generation.schedule import SAMPLED_FREE, SAMPLED_VISUAL
from emu3_jax.generation.session import check_positions
from emu3_jax.generation.shapes import align_right, bucket, cache_slots, fill_rows
from emu3_jax.models.attention import choose_kernels
from emu3_jax.models.cache import KVCache
from emu3_jax.models.decoder import Decoder
from emu3_jax.sharding.rules import use_mesh

STEPS_PER_CALL = 32  # the host reads the rows after this many steps


@dataclasses.dataclass(frozen=True)
class InterleavedRow:
    """A row's prompts and what it may write.

    Attributes:
        prompt: ids of the conditional prompt.
        unconditional: ids of the prompt without the text, or None for a row without guidance.
        empty: ids of the prompt without text and pictures, for guidance with two scales; else None.
        size: rows and columns of visual tokens of all pictures, or None if the model chooses.
        steps: largest number of new tokens.
    """

    prompt: Sequence[int]
    unconditional: Sequence[int] | None = None
    empty: Sequence[int] | None = None
    size: tuple[int, int] | None = None
    steps: int = 1024

    @property
    def contexts(self) -> list[Sequence[int]]:
        """The prompts of the row's contexts."""
        return [ids for ids in (self.prompt, self.unconditional, self.empty) if ids is not None]


class Plan(flax.struct.PyTreeNode):
    """The inputs of the loop that do not change while it runs."""

    goal: sampling.Array  # int32 [B]: largest number of tokens
    text: RowSettings  # its guidance has no effect
    visual: RowSettings
    image_guidance: sampling.Array  # float32 [B], see `InterleavedRow.empty`


class State(flax.struct.PyTreeNode):
    """The state that the loop carries. Each row advances on its own."""

    cache: KVCache
    tokens: jax.Array  # int32 [B, T]
    step: jax.Array  # int32 [B]: number of tokens so far
    ended: jax.Array  # bool [B]: rows that have emitted EOS
    inside: jax.Array  # bool [B]: whether the last token belongs to a picture, from BOI to EOI
    grammar: GrammarState


@dataclasses.dataclass(frozen=True)
class Options:
    """The static options that the programs are compiled for, besides shapes.

    Attributes:
        grammar: the model's grammar.
        contexts: N.
        width: P.
        kernels: from `attention.KERNELS`, but not "auto".
        use_top_k: whether `top_k` has an effect on any row.
        use_top_p: whether `top_p` has an effect on any row.
        narrow_cache: whether keys and values are stored as int8.
    """

    grammar: Grammar
    contexts: int
    width: int
    use_top_k: bool = True
    use_top_p: bool = True
    kernels: str = "xla"
    narrow_cache: bool = False


@functools.partial(Program, static_argnames=("config", "options", "slots", "steps"))
def prefill(
    params: Any,
    prompts: jax.Array,
    start: jax.Array,
    plan: Plan,
    grammar: GrammarState,
    *,
    config: DecoderConfig,
    options: Options,
    slots: int,
    steps: int,
) -> State:
    """Runs the prompts (int32 [R, P], aligned to the right; row r starts at slot start[r]) and takes the first step."""
    count = plan.goal.shape[0]
    cache = KVCache.create(config, start, slots, options.narrow_cache)
    forward: Callable = Decoder(config, kernels="xla").apply
    logits, cache = forward({"params": params}, prompts, cache, last_only=True)
    none = jnp.zeros(count, jnp.int32)
    state = State(
        cache=cache.replace(lockstep=False),
        tokens=jnp.full((count, steps), config.tokens.pad, jnp.int32),
        step=none,
        ended=none > 0,
        inside=none > 0,
        grammar=jax.tree.map(jnp.asarray, grammar),
    )
    return replicated(_take(state, logits[:, 0], plan, options))


@functools.partial(Program, static_argnames=("config", "options"), donate_argnames=("state",))
def decode(
    params: Any, state: State, plan: Plan, steps: jax.Array, *, config: DecoderConfig, options: Options
) -> State:
    """Takes up to `steps` (int32 scalar) further steps, fewer if all rows end or the cache has no room."""
    forward: Callable = Decoder(config, kernels=options.kernels).apply

    def proceed(carry: tuple[State, jax.Array]) -> jax.Array:
        state, left = carry
        return (left > 0) & _active(state, plan).any() & (state.cache.length.max() < state.cache.slots)

    def take(carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
        state, left = carry
        count, cache = plan.goal.shape[0], state.cache
        fed = jnp.take_along_axis(state.tokens, state.step[:, None] - 1, axis=1)
        if options.contexts > 2:
            # The context without text and pictures restarts at each picture.
            restarts = state.inside & (fed[:, 0] == config.tokens.boi)
            own = jnp.where(restarts, options.width, cache.length[2 * count :])
            cache = cache.replace(length=cache.length.at[2 * count :].set(own))
        before, active = cache.length, _active(state, plan)
        logits, cache = forward({"params": params}, jnp.tile(fed, (options.contexts, 1)), cache)
        appended = jnp.concatenate([active, *[active & state.inside] * (options.contexts - 1)])
        state = state.replace(cache=cache.replace(length=before + appended))
        return _take(state, logits[:, 0], plan, options), left - 1

    return replicated(jax.lax.while_loop(proceed, take, (state, steps))[0])


def _take(state: State, logits: jax.Array, plan: Plan, options: Options) -> State:
    """The state after a step with these logits [R, V]."""
    active = _active(state, plan)
    token = choose(logits, state, plan, options)
    grammar = rules.advance(state.grammar, token, options.grammar)
    inside = (grammar.mode != rules.TEXT) | (state.grammar.mode == rules.PICTURE)
    ends = (state.grammar.mode == rules.TEXT) & (token == options.grammar.tokens.eos)

    def kept(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(active, new, old)

    written = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new[None], (at,)))
    return state.replace(
        tokens=jnp.where(active[:, None], written(state.tokens, token, state.step), state.tokens),
        step=state.step + active,
        ended=state.ended | (active & ends),
        inside=kept(inside, state.inside),
        grammar=jax.tree.map(kept, grammar, state.grammar),
    )


def choose(logits: jax.Array, state: State, plan: Plan, options: Options) -> jax.Array:
    """The next token of each row, int32 [B], from the logits of all contexts, float32 [R, V].

    Text and visual tokens are drawn among their own ids, with their own settings. So masks come before top-k and top-p.
    """
    special, count = options.grammar.tokens, plan.goal.shape[0]
    answers = rules.legal(state.grammar, options.grammar)
    contexts = logits.reshape(options.contexts, count, -1)
    active = _active(state, plan)

    def draw(logits: jax.Array, settings: RowSettings) -> jax.Array:
        filters = {"use_top_k": options.use_top_k, "use_top_p": options.use_top_p}
        return sampling.sample(logits, state.step, settings, **filters)

    def text() -> jax.Array:
        return draw(contexts[0, :, : special.visual_start], plan.text)

    def visual() -> jax.Array:
        parts = contexts[:, :, special.visual_start : special.visual_end]
        return draw(_guided(parts, plan), plan.visual) + special.visual_start

    def size() -> jax.Array:
        digits, times, end = options.grammar.digits, options.grammar.times, special.img
        ids = jnp.asarray([*digits, times, end], jnp.int32)
        first = answers == rules.FIRST_DIGIT
        can_end, side = answers == rules.DIGIT_OR_END, state.grammar.side
        allowed = jnp.ones((count, len(digits) + 2), bool)
        allowed = allowed.at[:, 0].set(~first)
        allowed = allowed.at[:, -2].set(can_end & (side == 0)).at[:, -1].set(can_end & (side == 1))
        scores = jnp.where(allowed, contexts[0][:, ids], -jnp.inf)
        chosen = sampling.sample(scores, state.step, plan.text, use_top_k=False, use_top_p=False)
        return ids[chosen]

    # A kind of token that no row needs is not drawn.
    token = answers
    kinds = ((answers == SAMPLED_FREE, text), (answers == SAMPLED_VISUAL, visual), (answers <= rules.FIRST_DIGIT, size))
    for wanted, drawn in kinds:
        chosen = jax.lax.cond((wanted & active).any(), drawn, lambda: jnp.zeros(count, jnp.int32))
        token = jnp.where(wanted, chosen, token)
    return nn.with_logical_constraint(token, (None,))


def _guided(parts: jax.Array, plan: Plan) -> jax.Array:
    """Guidance of visual logits [N, B, visual ids]: a + s (u - a) + g (c - u) of the log-probabilities, without the
    contexts a and u that a session does not have."""
    if len(parts) == 1:
        return parts[0]
    if len(parts) == 2:
        return sampling.guide(parts[0], parts[1], plan.visual.guidance)
    conditional, unconditional, empty = jax.nn.log_softmax(parts, axis=-1)
    pictures, scale = plan.image_guidance[:, None], plan.visual.guidance[:, None]
    return empty + pictures * (unconditional - empty) + scale * (conditional - unconditional)


def _active(state: State, plan: Plan) -> jax.Array:
    """bool [B]: whether a row has steps to take."""
    return (state.step < plan.goal) & ~state.ended


# ------------------------------------------------------------------------------------------------ the session


def _filters(config: DecoderConfig, text: RowSettings, visual: RowSettings) -> tuple[bool, bool]:
    """Whether `top_k` and `top_p` have an effect on any row. They have none on greedy rows."""
    special = config.tokens
    kinds = ((text, special.visual_start), (visual, special.visual_count))
    drawn = [(settings, np.asarray(settings.temperature) > 0, candidates) for settings, candidates in kinds]
    use_top_k = any((drawing & (np.asarray(of.top_k) < candidates)).any() for of, drawing, candidates in drawn)
    return use_top_k, any((drawing & (np.asarray(of.top_p) < 1)).any() for of, drawing, _ in drawn)


def stream(
    params: Any,
    config: DecoderConfig,
    grammar: Grammar,
    rows: Sequence[InterleavedRow],
    text: RowSettings,
    visual: RowSettings,
    image_guidance: Sequence[float] | None = None,
    *,
    mesh: Mesh | None = None,
    narrow_cache: bool = False,
    kernels: str = "auto",
) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
    """Lets rows write text and pictures until EOS or their number of steps.

    Args:
        params: parameters of the decoder.
        config: config of the decoder.
        grammar: the model's grammar.
        rows: the rows, at least one.
        text: settings of text and sizes, one per row.
        visual: settings of visual tokens, one per row, with the scale of guidance.
        image_guidance: scale of guidance towards the given pictures, one per row, for rows with an empty prompt.
        mesh: mesh over which `params` are spread, or None.
        narrow_cache: store keys and values as int8.
        kernels: implementation of attention in decoding, from `attention.KERNELS`.

    Yields:
        After prefill and after each call of the device: the ids of each row so far, int32, and bool [B], whether each
        row is done.

    Raises:
        RowError: a row's prompt and steps do not fit into the model's positions.
        Emu3Error: rows have unequal numbers of contexts.
    """
    contexts = len(rows[0].contexts)
    if any(len(row.contexts) != contexts for row in rows):
        raise Emu3Error("rows with and without guidance cannot share a batch: give them separately")
    check_positions(config, ((max(map(len, row.contexts)), row.steps) for row in rows))
    filled = [*rows, *[rows[-1]] * (fill_rows(len(rows), mesh, contexts > 1) - len(rows))]
    places = np.minimum(np.arange(len(filled)), len(rows) - 1)
    text, visual = text.take(places), visual.take(places)
    scales = np.ones(len(rows), np.float32) if image_guidance is None else np.asarray(image_guidance, np.float32)
    goal = np.asarray([row.steps for row in filled], np.int32)
    goal[len(rows) :] = 1  # what fills the batch up need not be written
    plan = Plan(goal, text, visual, scales[places])
    prompts = [row.contexts[index] for index in range(contexts) for row in filled]
    width, steps = bucket(max(map(len, prompts))), bucket(int(goal.max()))
    aligned, start = align_right(prompts, width, config.tokens.pad)
    state_of_rows = GrammarState.of([row.size for row in filled])
    with use_mesh(mesh):
        chosen = choose_kernels(kernels, config.head_dim, config.dtype)
    options = Options(grammar, contexts, width, *_filters(config, text, visual), chosen, narrow_cache)

    def slots(used: int) -> int:
        return cache_slots(width + used, width + steps, chosen)

    # The mesh is set around calls of the device alone: between two of them the caller's code runs.
    with use_mesh(mesh):
        state = prefill(
            params, aligned, start, plan, state_of_rows,
            config=config, options=options, slots=slots(STEPS_PER_CALL + 1), steps=steps,
        )  # fmt: skip
    calls = 0
    while True:
        # Copies, because the next call donates the state's memory. That call is queued before the host reads them, so
        # that the device never waits.
        snapshot = tuple(map(jnp.copy, (state.step, state.ended, state.tokens)))
        calls += 1
        needed = slots(min(1 + STEPS_PER_CALL * calls, int(goal.max())))
        with use_mesh(mesh):
            if needed > state.cache.slots:
                state = state.replace(cache=state.cache.grow(needed))
            state = decode(params, state, plan, np.int32(STEPS_PER_CALL), config=config, options=options)
        taken, ended, tokens = map(np.asarray, snapshot)
        done = ended | (taken >= goal)
        yield [ids[:count] for ids, count in zip(tokens, taken, strict=True)][: len(rows)], done[: len(rows)]
        if done.all():
            return


def run(*arguments: Any, **options: Any) -> list[np.ndarray]:
    """The ids of each row at the end; see `stream`."""
    *_, (found, _) = stream(*arguments, **options)
    return found

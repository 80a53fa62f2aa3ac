"""Rows that write text and pictures in turn: prefill, a decode loop that carries the grammar, and its session.

Each row has one context or more: the conditional one, and for guidance of visual tokens an unconditional one, whose
prompt lacks the text. A third one, whose prompt lacks the pictures too, guides towards the given pictures. Tokens of
pictures are appended to all contexts, tokens of text to the conditional one alone. All contexts of all rows are rows of
one batch, and each has its own length in the cache.

A pass computes W tokens of each row that is within a picture or writes a size that is known, as `parallel` describes.
While no row is there, passes compute one token per row.

B rows; N contexts per row; R = N * B computed rows, context by context; P slots of the prompts; T most new tokens; W
tokens of a pass.
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
from emu3_jax.generation import parallel, sampling
from emu3_jax.generation.defaults import MOST_PARALLEL
from emu3_jax.generation.engine import Program, append, replicated
from emu3_jax.generation.grammar import Grammar, GrammarState
from emu3_jax.generation.kept import Kept
from emu3_jax.generation.parallel import check_window, choose_window
from emu3_jax.generation.sampling import RowSettings
from emu3_jax.generation.schedule import SAMPLED_FREE, SAMPLED_VISUAL
from emu3_jax.generation.session_rows import check_positions
from emu3_jax.generation.shapes import align_right, bucket, cache_slots, fill_rows, roomy_slots, spare_slots
from emu3_jax.models.attention import choose_kernels
from emu3_jax.models.cache import KVCache
from emu3_jax.models.decoder import Decoder
from emu3_jax.sharding.rules import batch_shards, use_mesh

PASSES_PER_CALL = 32  # the host reads the rows after this many passes


@dataclasses.dataclass(frozen=True)
class InterleavedRow:
    """A row's prompts and what it may write.

    Attributes:
        prompt: ids of the conditional prompt.
        unconditional: ids of the prompt without the text, or None for a row without guidance.
        empty: ids of the prompt without text and pictures, for guidance with two scales; else None.
        size: rows and columns of visual tokens of all pictures, or None if the model chooses.
        steps: largest number of new tokens. A size that the model chooses lets the picture end within them.
        max_size: largest rows and columns that the model may choose, or None for all that the grammar allows.
    """

    prompt: Sequence[int]
    unconditional: Sequence[int] | None = None
    empty: Sequence[int] | None = None
    size: tuple[int, int] | None = None
    steps: int = 1024
    max_size: tuple[int, int] | None = None

    @property
    def contexts(self) -> list[Sequence[int]]:
        """The prompts of the row's contexts."""
        return [ids for ids in (self.prompt, self.unconditional, self.empty) if ids is not None]


@dataclasses.dataclass(frozen=True)
class Reading:
    """What rows have written.

    Attributes:
        ids: the ids of each row so far, int32.
        done: bool [B], whether a row is done.
        passes: int32 [B], passes of the decoder that each row took part in, with prefill.
    """

    ids: list[np.ndarray]
    done: np.ndarray
    passes: np.ndarray


class Plan(flax.struct.PyTreeNode):
    """The inputs of the loop that do not change while it runs."""

    goal: sampling.Array  # int32 [B]: largest number of tokens
    text: RowSettings  # its guidance has no effect
    visual: RowSettings
    image_guidance: sampling.Array  # float32 [B], see `InterleavedRow.empty`
    width: sampling.Array | np.int32  # scalar: P


class State(flax.struct.PyTreeNode):
    """The state that the loop carries. Each row advances on its own."""

    cache: KVCache
    tokens: jax.Array  # int32 [B, T + 2W - 2]: the tokens so far, then guesses
    step: jax.Array  # int32 [B]: number of tokens so far
    passes: jax.Array  # int32 [B]: passes that the row took part in, with prefill
    ended: jax.Array  # bool [B]: rows that have emitted EOS
    inside: jax.Array  # bool [B]: whether the last token belongs to a picture, from BOI to EOI
    grammar: GrammarState


@dataclasses.dataclass(frozen=True)
class Options:
    """The static options that the programs are compiled for, besides shapes.

    Attributes:
        grammar: the model's grammar.
        contexts: N.
        kernels: from `attention.KERNELS`, but not "auto".
        use_top_k: whether `top_k` has an effect on any row.
        use_top_p: whether `top_p` has an effect on any row.
        narrow_cache: whether keys and values are stored as int8.
        window: W.
    """

    grammar: Grammar
    contexts: int
    use_top_k: bool = True
    use_top_p: bool = True
    kernels: str = "xla"
    narrow_cache: bool = False
    window: int = 1


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
    cache = KVCache.create(config, start, slots, options.narrow_cache)
    forward: Callable = Decoder(config, kernels="xla").apply
    logits, cache = forward({"params": params}, prompts, cache, last_only=True)
    return _begun(cache, logits, plan, grammar, config, options, steps)


@functools.partial(Program, static_argnames=("config", "options", "steps"), donate_argnames=("cache",))
def resume(
    params: Any,
    cache: KVCache,
    tokens: jax.Array,
    counts: jax.Array,
    plan: Plan,
    grammar: GrammarState,
    *,
    config: DecoderConfig,
    options: Options,
    steps: int,
) -> State:
    """As `prefill`, with a cache of earlier turns: runs what it lacks of the prompts, and takes the first step.

    Takes `tokens` and `counts` as `engine.append`.
    """
    forward = functools.partial(Decoder(config, kernels="xla").apply, {"params": params})
    logits, cache = append(forward, cache, tokens, counts)
    return _begun(cache, logits, plan, grammar, config, options, steps)


def _begun(
    cache: KVCache,
    logits: jax.Array,
    plan: Plan,
    grammar: GrammarState,
    config: DecoderConfig,
    options: Options,
    steps: int,
) -> State:
    """The state after the first step, with the logits [R, 1, V] of the prompts' last tokens."""
    none = jnp.zeros(plan.goal.shape, jnp.int32)
    state = State(
        cache=cache.replace(lockstep=False),
        tokens=jnp.full((len(none), steps + 2 * options.window - 2), config.tokens.pad, jnp.int32),
        step=none,
        passes=none,
        ended=none > 0,
        inside=none > 0,
        grammar=jax.tree.map(jnp.asarray, grammar),
    )
    answers = rules.upcoming(state.grammar, options.grammar, 1)
    computed = choose(logits, answers, state, plan, options, [rules.TEXT])  # all rows begin in text
    return replicated(_settle(state, None, computed, answers, plan, options))


@functools.partial(Program, static_argnames=("config", "options"), donate_argnames=("state",))
def decode(
    params: Any, state: State, plan: Plan, passes: jax.Array, *, config: DecoderConfig, options: Options
) -> State:
    """Takes up to `passes` (int32 scalar) passes, fewer if all rows end or the cache has no room for another pass."""
    forward: Callable = Decoder(config, kernels=options.kernels).apply

    def proceed(carry: tuple[State, jax.Array], width: int) -> jax.Array:
        state, left = carry
        room = state.cache.length.max() + width <= state.cache.slots
        return (left > 0) & _active(state, plan).any() & room

    def take(carry: tuple[State, jax.Array], width: int) -> tuple[State, jax.Array]:
        state, left = carry
        count, cache = plan.goal.shape[0], state.cache
        # Where there are passes of two widths, the narrow ones are only for rows outside of pictures.
        modes = rules.MODES if width == options.window else [rules.TEXT, rules.SIZE]
        if width > 1 and count == 1:
            modes = [rules.PICTURE]
        fed = parallel.window(state.tokens, state.step - 1, width)
        answers = rules.upcoming(state.grammar, options.grammar, 2 * width - 1)
        forced = answers[:, : width - 1]  # guesses that are always right
        fed = fed.at[:, 1:].set(jnp.where(forced >= 0, forced, fed[:, 1:]))
        if options.contexts > 2:
            # The context without text and pictures restarts at each picture.
            restarts = state.inside & (fed[:, 0] == config.tokens.boi)
            own = jnp.where(restarts, plan.width, cache.length[2 * count :])
            cache = cache.replace(length=cache.length.at[2 * count :].set(own))
        before, inside, step = cache.length, state.inside, state.step
        logits, cache = forward({"params": params}, jnp.tile(fed, (options.contexts, 1)), cache)
        computed = choose(logits, answers[:, :width], state, plan, options, modes)
        state = _settle(state, fed, computed, answers, plan, options)
        settled = state.step - step
        # The tokens that were fed up to the last certain one. Of text, only the first context has them.
        appended = jnp.concatenate([settled, *[settled * inside] * (options.contexts - 1)])
        return state.replace(cache=cache.replace(length=before + appended)), left - 1

    def loop(carry: tuple[State, jax.Array], width: int, wanted: Callable) -> tuple[State, jax.Array]:
        return jax.lax.while_loop(
            lambda carry: proceed(carry, width) & wanted(carry[0]), functools.partial(take, width=width), carry
        )

    def drawing(state: State) -> jax.Array:
        several = (state.grammar.mode == rules.PICTURE) | rules.in_known_size(state.grammar)
        return (_active(state, plan) & several).any()

    def both(carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
        return loop(loop(carry, 1, lambda state: ~drawing(state)), options.window, drawing)

    carry = (state, passes)
    if options.window == 1:
        carry = loop(carry, 1, lambda _: True)
    else:
        carry = jax.lax.while_loop(functools.partial(proceed, width=options.window), both, carry)
    return replicated(carry[0])


def _settle(
    state: State, fed: jax.Array | None, computed: jax.Array, answers: jax.Array, plan: Plan, options: Options
) -> State:
    """The state after a pass, but for its cache.

    Args:
        state: the state before the pass.
        fed: int32 [B, W], the last certain token and the guesses that were fed, or None for a prompt.
        computed: int32 [B, W], the token of the step after each of them.
        answers: int32 [B, 2W - 1], what is legal, from `grammar.upcoming`.
        plan: inputs of the loop.
        options: options of the programs.
    """
    active, grammar, width = _active(state, plan), options.grammar, computed.shape[1]
    settled = jnp.ones_like(state.step)
    if fed is not None:
        # A pass ends with a picture at the latest, because its contexts differ in what they get after it. The size of
        # a picture and the picture do not share a pass.
        settled = jnp.minimum(parallel.count_settled(fed, computed), rules.known(state.grammar, grammar))
    settled = jnp.where(active, jnp.minimum(settled, plan.goal - state.step), 0)
    last = jnp.take_along_axis(computed, jnp.maximum(settled - 1, 0)[:, None], axis=1)[:, 0]
    text = state.grammar.mode == rules.TEXT
    new = rules.advance(rules.skip(state.grammar, jnp.maximum(settled - 1, 0)), last, grammar)
    inside = (new.mode != rules.TEXT) | (state.grammar.mode == rules.PICTURE)

    def kept(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(active, new, old)

    guesses = parallel.next_guesses(jnp.where(computed < 0, last[:, None], computed), answers)
    old = parallel.window(state.tokens, state.step, 2 * width - 1)
    tokens = parallel.with_window(state.tokens, jnp.where(active[:, None], guesses, old), state.step)
    return state.replace(
        tokens=tokens,
        step=state.step + settled,
        passes=state.passes + active,
        ended=state.ended | (active & text & (last == grammar.tokens.eos)),
        inside=kept(inside, state.inside),
        grammar=jax.tree.map(kept, new, state.grammar),
    )


def choose(
    logits: jax.Array, answers: jax.Array, state: State, plan: Plan, options: Options, modes: Sequence[int]
) -> jax.Array:
    """The tokens of the steps from step[b] on, int32 [B, W].

    It takes the logits of all contexts, float32 [R, W, V]; what is legal, int32 [B, W], from `grammar.upcoming`; and
    the modes in which active rows may sample. A mode that is left out saves time of compilation. Outside of pictures
    only the first column is chosen; what is not chosen is negative. Text and visual tokens are drawn among their own
    ids, with their own settings. So masks come before top-k and top-p.
    """
    special, count, width = options.grammar.tokens, plan.goal.shape[0], logits.shape[1]
    contexts = logits.reshape(options.contexts, count, width, -1)
    active = _active(state, plan)
    filters: Any = {"use_top_k": options.use_top_k, "use_top_p": options.use_top_p}

    def text() -> jax.Array:
        scores = contexts[0, :, 0, : special.visual_start]
        opening = jnp.where(rules.may_open(state.grammar, options.grammar), scores[:, special.boi], -jnp.inf)
        scores = scores.at[:, special.boi].set(opening)
        return sampling.sample(scores, state.step, plan.text, **filters)[:, None]

    def visual() -> jax.Array:
        parts = contexts[..., special.visual_start : special.visual_end].reshape(options.contexts, count * width, -1)
        steps = (state.step[:, None] + jnp.arange(width, dtype=jnp.int32)[None]).reshape(-1)
        settings, scale = jax.tree.map(lambda column: jnp.repeat(column, width), (plan.visual, plan.image_guidance))
        drawn = sampling.sample(_guided(parts, settings.guidance, scale), steps, settings, **filters)
        return drawn.reshape(count, width) + special.visual_start

    def size() -> jax.Array:
        digits, times, end = options.grammar.digits, options.grammar.times, special.img
        ids = jnp.asarray([*digits, times, end], jnp.int32)
        allowed = rules.legal_in_size(state.grammar, options.grammar)
        scores = jnp.where(allowed, contexts[0, :, 0][:, ids], -jnp.inf)
        return ids[sampling.sample(scores, state.step, plan.text, use_top_k=False, use_top_p=False)][:, None]

    # A kind of token that no row needs is not drawn.
    token, alone = answers, (jnp.arange(width) == 0)[None]
    kinds = {
        rules.TEXT: ((answers == SAMPLED_FREE) & alone, text, 1),
        rules.SIZE: ((answers <= rules.FIRST_DIGIT) & alone, size, 1),
        rules.PICTURE: (answers == SAMPLED_VISUAL, visual, width),
    }
    for wanted, drawn, columns in (kinds[mode] for mode in modes):
        nothing = functools.partial(jnp.zeros, (count, columns), jnp.int32)
        token = jnp.where(wanted, jax.lax.cond((wanted & active[:, None]).any(), drawn, nothing), token)
    return nn.with_logical_constraint(token, (None, None))


def _guided(parts: jax.Array, guidance: jax.Array, image_guidance: jax.Array) -> jax.Array:
    """Guidance of visual logits [N, B, visual ids]: a + s (u - a) + g (c - u) of the log-probabilities, without the
    contexts a and u that a session does not have."""
    if len(parts) == 1:
        return parts[0]
    if len(parts) == 2:
        return sampling.guide(parts[0], parts[1], guidance)
    conditional, unconditional, empty = jax.nn.log_softmax(parts, axis=-1)
    pictures, scale = image_guidance[:, None], guidance[:, None]
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
    parallel: int | str = "off",
    kept: Kept | None = None,
    call_passes: int | None = None,
) -> Iterator[Reading]:
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
        parallel: "auto", "off" or the number of tokens W of a pass per row; see `parallel.choose_window`.
        kept: the cache of earlier turns of the same number of rows, with the same weights. Only what it lacks of the
            prompts is computed. At the end it has the cache of this turn. New rows begin with an empty `Kept()`.
        call_passes: largest number of passes of a call of the device, by default `PASSES_PER_CALL`.

    Yields:
        What the rows have after prefill and after each call of the device.

    Raises:
        RowError: a row's prompt and steps do not fit into the model's positions.
        Emu3Error: rows have unequal numbers of contexts, or `parallel` is not legal.
    """
    call_passes = call_passes or PASSES_PER_CALL
    check_window(parallel)
    contexts = len(rows[0].contexts)
    if any(len(row.contexts) != contexts for row in rows):
        raise Emu3Error("rows with and without guidance cannot share a batch: give them separately")
    check_positions(config, ((max(map(len, row.contexts)), row.steps) for row in rows))
    filled = [*rows, *[rows[-1]] * (fill_rows(len(rows), mesh, contexts > 1) - len(rows))]
    places = np.minimum(np.arange(len(filled)), len(rows) - 1)
    text, visual = text.take(places), visual.take(places)
    scales = np.ones(len(rows), np.float32) if image_guidance is None else np.asarray(image_guidance, np.float32)
    goal = np.asarray([row.steps for row in filled], np.int32)
    if kept is None:
        goal[len(rows) :] = 1  # what fills the batch up need not be written
    prompts = [row.contexts[index] for index in range(contexts) for row in filled]
    steps = bucket(int(goal.max()))
    tail = None if kept is None else kept.take(prompts, config.tokens.pad)
    width = bucket(max(map(len, prompts))) if tail is None else tail.width
    end = width if tail is None else tail.end  # the slot after all prompts
    plan = Plan(goal, text, visual, scales[places], np.int32(width))
    state_of_rows = GrammarState.of(
        [row.size for row in filled], [row.steps for row in filled], [row.max_size for row in filled]
    )
    with use_mesh(mesh):
        several = choose_kernels(kernels, config.head_dim, config.dtype, window=MOST_PARALLEL)
        window = choose_window(parallel, len(prompts) // batch_shards(mesh), several, hidden_size=config.hidden_size)
        chosen = choose_kernels(kernels, config.head_dim, config.dtype, window=window)
    options = Options(grammar, contexts, *_filters(config, text, visual), chosen, narrow_cache, window)

    def slots(used: int) -> int:
        # Guesses of the last passes are written after the last step.
        final = end + steps + spare_slots(window)
        return cache_slots(end + used + window - 1, final if kept is None else roomy_slots(final), chosen)

    # The mesh is set around calls of the device alone: between two of them the caller's code runs.
    with use_mesh(mesh):
        if tail is None:
            aligned, start = align_right(prompts, width, config.tokens.pad)
            state = prefill(
                params, aligned, start, plan, state_of_rows,
                config=config, options=options, slots=slots(call_passes + 1), steps=steps,
            )  # fmt: skip
        else:
            start = tail.start
            state = resume(
                params, tail.roomy(slots(call_passes + 1)), tail.tokens, tail.counts, plan, state_of_rows,
                config=config, options=options, steps=steps,
            )  # fmt: skip
    longest = 1  # steps that a row has taken at least, as far as the host knows
    while True:
        # Copies, because the next call donates the state's memory. That call is queued before the host reads them, so
        # that the device never waits. If its passes settle more tokens than the cache has room for, it ends early.
        snapshot = tuple(map(jnp.copy, (state.step, state.passes, state.ended, state.tokens)))
        needed = slots(min(longest + 2 * call_passes, int(goal.max())))
        with use_mesh(mesh):
            if needed > state.cache.slots:
                state = state.replace(cache=state.cache.grow(needed))
            state = decode(params, state, plan, np.int32(call_passes), config=config, options=options)
        taken, passes, ended, tokens = map(np.asarray, snapshot)
        longest, done = int(taken.max()), ended | (taken >= goal)
        found = [ids[:count] for ids, count in zip(tokens, taken, strict=True)]
        if done.all() and kept is not None:
            kept.put(state.cache, start, width, _held(prompts, found, grammar, contexts))
        yield Reading(found[: len(rows)], done[: len(rows)], passes[: len(rows)])
        if done.all():
            return


def _held(
    prompts: Sequence[Sequence[int]], written: Sequence[np.ndarray], grammar: Grammar, contexts: int
) -> list[Sequence[int]]:
    """The ids of each computed row: its prompt, and what was appended to it."""
    pictures = [ids[rules.inside_pictures(ids, grammar)] for ids in written]
    appended = [written, pictures, [()] * len(written)][:contexts]  # the third context restarts at each picture
    flat = [ids for context in appended for ids in context]
    return [[*prompt, *map(int, ids)] for prompt, ids in zip(prompts, flat, strict=True)]


def run(*arguments: Any, **options: Any) -> list[np.ndarray]:
    """The ids of each row at the end; see `stream`."""
    *_, last = stream(*arguments, **options)
    return last.ids

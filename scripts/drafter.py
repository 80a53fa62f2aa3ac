"""An experiment: a layer, trained on the embedded model's own pictures, that guesses tokens for parallel decoding.

    python scripts/drafter.py [--seeds 1] [--steps 600] [--windows 8 16 32] [--drafts 1 4] [--cases 8] [--model BUNDLE]

The drafter is one more layer of the decoder. It takes the decoder's hidden state after a token, and the next token. It
guesses the hidden state after that next token (Li et al., "EAGLE", 2024). The decoder's frozen head makes logits of it,
and the step's own noise, guidance and settings make a token of them: the guess. For later steps, the drafter takes its
own hidden states and guesses.

The script generates pictures and trains the drafter on them. Then it decodes prompts that were not in the training, in
float32 and exactly. The first `--drafts` guesses of a pass are the drafter's, the others those of
`emu3_jax.generation.parallel`. With 0 all are the latter. It prints a table of passes for `docs/performance.md`.

B pictures, R rows (two per picture), S tokens, D width, V visual ids, T steps of a picture, W tokens of a pass.
"""

import argparse
import dataclasses
import functools
import itertools
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from parallel_decoding import STYLES, emoji_prompts, shape_prompts

import emu3_jax
from emu3_jax.config import DecoderConfig
from emu3_jax.evaluation.procedural import all_stills
from emu3_jax.generation import engine, parallel, session
from emu3_jax.generation.rows import Sampling
from emu3_jax.generation.sampling import RowSettings, guide
from emu3_jax.generation.schedule import TokenClass, image_schedule
from emu3_jax.models.cache import KVCache
from emu3_jax.models.decoder import Block, Decoder, RMSNorm, rotations, visual_head_params
from emu3_jax.text.prompts import generation_prompt
from emu3_jax.training.config import OptimizerConfig
from emu3_jax.training.optimizer import make_optimizer

# None of these is in the prompts of scripts/parallel_decoding.py.
THINGS = (
    "grinning face", "smiling face with sunglasses", "ghost", "robot", "alien", "thumbs up", "clapping hands", "eyes",
    "monkey face", "wolf", "fox", "lion", "horse face", "cow face", "pig face", "mouse face", "rabbit face", "bear",
    "panda", "frog", "chicken", "penguin", "bird", "duck", "owl", "turtle", "snake", "whale", "dolphin", "octopus",
    "butterfly", "bug", "honeybee", "sunflower", "tulip", "four leaf clover", "maple leaf", "mushroom cloud", "grapes",
    "watermelon", "lemon", "red apple", "cherries", "carrot", "bread", "cheese wedge", "french fries", "doughnut",
    "birthday cake", "hot beverage", "automobile", "bus", "airplane", "umbrella", "gift", "trophy", "soccer ball",
    "key", "light bulb", "book", "scissors", "bell", "blue heart", "star", "full moon", "cloud", "fire", "droplet",
)  # fmt: skip


class Drafter(nn.Module):
    """One layer, with the decoder's shapes."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, hidden_bsd: jax.Array, embedded_bsd: jax.Array, positions_bs: jax.Array, cache: KVCache | None = None
    ) -> tuple[jax.Array, KVCache | None]:
        """Guesses the decoder's hidden states [B, S, D] after tokens.

        Args:
            hidden_bsd: the decoder's hidden states before these tokens, after its last norm.
            embedded_bsd: the embeddings of these tokens.
            positions_bs: int32 [B, S].
            cache: the drafter's cache, of one layer.
        """
        c = self.config
        normed = [RMSNorm(c.rms_norm_eps, name=f"{name}_norm")(x) for name, x in
                  (("hidden", hidden_bsd), ("embedded", embedded_bsd))]  # fmt: skip
        x_bsd = nn.Dense(c.hidden_size, use_bias=False, name="fuse")(jnp.concatenate(normed, axis=-1))
        turn = rotations(positions_bs, c.head_dim, c.rope_theta)
        x_bsd, cache = Block(c, "xla", kernels="xla", name="layer")(x_bsd, turn, None, cache, 0)
        if cache is not None:
            cache = cache.replace(length=cache.length + x_bsd.shape[1])
        return RMSNorm(c.rms_norm_eps, name="norm")(x_bsd), cache


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder and its parameters with the visual head; `one` is the config of a single layer."""

    config: DecoderConfig
    params: Any

    @property
    def one(self) -> DecoderConfig:
        return dataclasses.replace(self.config, num_layers=1)

    @functools.cached_property
    def visual(self) -> Any:
        return visual_head_params(self.params, self.config)

    @property
    def table(self) -> jax.Array:
        """The embeddings of tokens."""
        return self.params["embed"]["embedding"]


# ------------------------------------------------------------------------------------------------ training


@flax.struct.dataclass
class Examples:
    """Pictures and the decoder's hidden states. Rows 2i and 2i + 1 are a picture with its prompt and without.

    Attributes:
        tokens: int32 [R, S], padded on the right.
        hidden: float16 [R, S, D].
        first: int32 [R], the number of tokens of the prompt.
    """

    tokens: np.ndarray
    hidden: np.ndarray
    first: np.ndarray

    def take(self, pictures: np.ndarray) -> "Examples":
        rows = (2 * pictures[:, None] + np.arange(2)).ravel()
        return jax.tree.map(lambda leaf: leaf[rows], self)


def make_examples(model: Model, rows: Sequence[session.Row], settings: RowSettings, batch: int) -> Examples:
    """Generates pictures with the decoder (one per row, with guidance), and runs the decoder over them once more."""
    length = max(max(len(row.prompt), len(row.negative)) + len(row.schedule) for row in rows)

    @jax.jit
    def run(params: Any, tokens: jax.Array) -> jax.Array:
        return Decoder(model.config).apply({"params": params}, tokens, method="hidden").astype(jnp.float16)

    tokens, hidden = np.zeros((2 * len(rows), length), np.int32), []
    for begin in range(0, len(rows), batch):
        part = rows[begin : begin + batch]
        made = session.run(
            model.params, model.config, part, settings.take(slice(begin, begin + batch)), least_rows=batch
        )
        for index, (row, ids) in enumerate(zip(part, made.ids, strict=True)):
            for half, prompt in enumerate((row.prompt, row.negative)):
                full = [*prompt, *ids[: len(row.schedule)]]
                tokens[2 * (begin + index) + half, : len(full)] = full
        hidden.append(np.asarray(run(model.params, tokens[2 * begin : 2 * (begin + len(part))])))
    first = np.asarray([len(prompt) for row in rows for prompt in (row.prompt, row.negative)], np.int32)
    return Examples(tokens, np.concatenate(hidden), first)


def train(
    model: Model, examples: Examples, *, steps: int, batch: int, guidance: float, schedule: np.ndarray, log: bool = True
) -> Any:
    """Trains a drafter to give the decoder's hidden states and guided distributions. Returns its parameters.

    All pictures have the same `schedule`.
    """
    drafter = Drafter(model.one)
    tx = make_optimizer(OptimizerConfig(2e-3, 1e-4, warmup_steps=min(30, steps // 2), clip_norm=1.0), steps)
    empty = jnp.zeros((1, 1, model.config.hidden_size))
    params = nn.unbox(jax.jit(drafter.init)(jax.random.key(0), empty, empty, jnp.zeros((1, 1), jnp.int32)))["params"]
    head, visual = model.visual["head"]["kernel"], jnp.asarray(np.flatnonzero(schedule == TokenClass.VISUAL))

    def guided(hidden_rsd: jax.Array, first: jax.Array) -> jax.Array:
        """Log-probabilities [B * T, V] of the visual steps."""
        chosen = jnp.take_along_axis(hidden_rsd, (first[:, None] - 1 + visual[None])[..., None], axis=1)
        logits = jnp.einsum("rtd,vd->rtv", chosen, head)
        pair = [logits[half::2].reshape(-1, logits.shape[-1]) for half in range(2)]
        return jax.nn.log_softmax(guide(*pair, jnp.full(pair[0].shape[:1], guidance)), axis=-1)

    def loss(params: Any, part: Examples, table: jax.Array) -> tuple[jax.Array, jax.Array]:
        true = part.hidden.astype(jnp.float32)
        before = jnp.pad(true, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        positions = jnp.broadcast_to(jnp.arange(true.shape[1]), true.shape[:2])
        found, _ = drafter.apply({"params": params}, before, table[part.tokens], positions)
        wanted, guessed = guided(true, part.first), guided(found, part.first)
        entropy = -(jnp.exp(wanted) * guessed).sum(-1).mean()
        real = (positions < part.first[:, None] + len(schedule))[..., None]  # the rest of a row is padding
        error = (jnp.square(found - true) * real).sum() / (jnp.square(true) * real).sum()
        return entropy + error, jnp.minimum(jnp.exp(wanted), jnp.exp(guessed)).sum(-1).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, part: Examples, table: jax.Array) -> tuple[Any, Any, jax.Array]:
        (_, share), gradients = jax.value_and_grad(loss, has_aux=True)(params, part, table)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, share

    state, random, pictures = tx.init(params), np.random.default_rng(0), len(examples.first) // 2
    for number in range(steps):
        part = examples.take(random.choice(pictures, min(batch, pictures), replace=False))
        params, state, share = step(params, state, part, model.table)
        if log and (number % 50 == 0 or number == steps - 1):
            print(f"step {number}: the drafter's distributions overlap with the decoder's by {share:.3f}", flush=True)
    return params


# ------------------------------------------------------------------------------------------------ decoding


@flax.struct.dataclass
class State:
    """The decode state, and the drafter's cache, whose rows hold one token more."""

    decode: engine.DecodeState
    cache: KVCache


def _features(model: Model, params: Any, tokens: jax.Array, cache: KVCache, **options: Any) -> tuple[Any, Any, KVCache]:
    """(logits, hidden states after the last norm, cache) of the decoder."""
    (logits, cache), kept = Decoder(model.config, visual_head=True, kernels="xla").apply(
        {"params": params}, tokens, cache, **options,
        capture_intermediates=lambda module, _: module.name == "norm", mutable=["intermediates"],
    )  # fmt: skip
    return logits, kept["intermediates"]["norm"]["__call__"][0], cache


def decode(
    model: Model, drafter: Any, rows: Sequence[session.Row], settings: RowSettings, window: int, drafts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes guided pictures exactly. The drafter guesses the first `drafts` of the W - 1 guessed steps of a pass.

    Returns:
        The ids, int32 [B, T]; and the passes of each row with prefill, int32 [B], as `session.Made.passes`.
    """
    decoding = session.DecodeSession(model.params, model.config, rows, settings, parallel=window, kernels="xla")
    plan, variant, config, shapes = decoding.plan, decoding.shapes.variant, model.config, decoding.shapes
    prompts, start, slots = decoding._prompts, decoding._start, shapes.width + shapes.steps + 2 * window + 64

    def both(array: jax.Array) -> jax.Array:
        return jnp.concatenate([array, array])

    def draft(weights: Any, hidden: jax.Array, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        positions = cache.positions(tokens.shape[1])
        return Drafter(model.one).apply({"params": weights[1]}, hidden, model.table[tokens], positions, cache)

    def with_drafts(weights: Any, hidden: jax.Array, state: State) -> State:
        """Guesses from `hidden` [R, 1, D], the drafter's state after the last certain token."""
        length, step, tokens, cache = state.cache.length, state.decode.step, state.decode.tokens, state.cache
        for index in range(min(drafts, window - 1)):
            logits = jnp.einsum("rsd,vd->rsv", hidden, weights[0]["head"]["kernel"])
            at = step + index
            guess = engine.choose(logits, at, plan, config, variant)
            tokens = parallel.with_window(tokens, guess, at)
            hidden, cache = draft(weights, hidden, both(guess), cache)
        return State(state.decode.replace(tokens=tokens), cache.replace(length=length))

    @jax.jit
    def begin(weights: Any) -> State:
        first = jnp.zeros(plan.goal.shape, jnp.int32)
        cache = KVCache.create(config, jnp.asarray(start), slots)
        logits, hidden, cache = _features(model, weights[0], jnp.asarray(prompts), cache)
        token = engine.choose(logits[:, -1:], first, plan, config, variant)
        tokens = parallel.first_guesses(jnp.asarray(plan.forced), token[:, 0]).at[:, 0].set(token[:, 0])
        state = engine.DecodeState(
            cache.replace(lockstep=False), tokens, step=first + 1, passes=first, ended=jnp.zeros(first.shape, bool)
        )
        own = KVCache.create(model.one, jnp.asarray(start), slots)
        place = jnp.arange(prompts.shape[1] + 1)[None, :, None]
        before = jnp.where(place > start[:, None, None], jnp.pad(hidden, ((0, 0), (1, 0), (0, 0))), 0)
        guessed, own = draft(weights, before, jnp.concatenate([prompts, both(token)], axis=1), own)
        return with_drafts(weights, guessed[:, -1:], State(state, own.replace(lockstep=False)))

    @jax.jit
    def one_pass(weights: Any, state: State) -> State:
        old = state.decode
        fed = parallel.window(old.tokens, old.step - 1, window)
        logits, hidden, cache = _features(model, weights[0], both(fed), old.cache)
        computed = engine.choose(logits, old.step, plan, config, variant)
        new, _ = engine._settle(old, cache, fed, computed, plan, config, variant)
        settled = both(new.step - old.step)
        guessed, own = draft(weights, hidden, both(computed), state.cache)
        own = own.replace(length=own.length + settled - window)
        last = jnp.take_along_axis(guessed, jnp.maximum(settled - 1, 0)[:, None, None], axis=1)
        return with_drafts(weights, last, State(new, own))

    weights = (model.visual, drafter)
    state = begin(weights)
    while (np.asarray(state.decode.step) < plan.goal).any():
        state = one_pass(weights, state)
    ids = np.array(plan.forced)[: len(rows), : max(len(row.schedule) for row in rows)]
    tokens = np.asarray(state.decode.tokens)[: len(rows), : ids.shape[1]]
    certain = np.arange(ids.shape[1])[None] < np.asarray(plan.goal)[: len(rows), None]
    return np.where(certain, tokens, ids), np.asarray(state.decode.passes)[: len(rows)] + 1


# ------------------------------------------------------------------------------------------------ the experiment


def spread(texts: list[str], count: int) -> list[str]:
    """`count` texts from all over the list."""
    return [texts[index * len(texts) // count] for index in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--things", type=int, default=len(THINGS), help="things to train on, in five styles")
    parser.add_argument("--shapes", type=int, default=120, help="pictures of shapes to train on")
    parser.add_argument("--seeds", type=int, default=1, help="pictures per prompt")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=4, help="pictures per step of the training")
    parser.add_argument("--windows", nargs="+", type=int, default=[8, 16, 32], metavar="W")
    parser.add_argument("--drafts", nargs="+", type=int, default=[1, 4], help="steps that the drafter guesses")
    parser.add_argument("--cases", type=int, default=8, help="prompts of emoji, and as many of shapes")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--model", type=pathlib.Path)
    options = parser.parse_args()
    begin = time.monotonic()
    loaded = emu3_jax.load(options.model, dtype="float32")
    language = loaded.language
    model = Model(language.config, language.params)
    side = round(language.config.image_area**0.5) // loaded.vision.config.spatial_factor
    schedule = image_schedule(side, side)

    def rows(prompts: Sequence[str]) -> list[session.Row]:
        pieces = language.tokenizer, language.config.tokens
        negative, *ids = (generation_prompt(*pieces, text, side, side) for text in ("", *prompts))
        return [session.Row(one, schedule, negative) for one in ids]

    def said(words: str) -> None:
        print(f"{time.monotonic() - begin:4.0f} s: {words}", flush=True)

    held_out = {"emoji": spread(emoji_prompts(125), options.cases), "shapes": spread(shape_prompts(256), options.cases)}
    stills = [still.caption for still in all_stills()]
    stills = [text for text in stills if "in the center" not in text]  # the held-out captions name no place
    prompts = [f"{style} emoji of {thing}" for thing, style in itertools.product(THINGS[: options.things], STYLES)]
    prompts = (prompts + spread(stills, options.shapes)) * options.seeds
    sampling = Sampling(guidance=options.guidance, seed=1000)
    examples = make_examples(model, rows(prompts), sampling.settings(len(prompts)), 16)
    said(f"{len(prompts)} pictures to train on")
    drafter = train(
        model, examples, steps=options.steps, batch=options.batch_size, guidance=options.guidance, schedule=schedule
    )
    weights = sum(leaf.size for leaf in jax.tree.leaves(drafter))
    said(f"trained {weights:,} weights for {options.steps} steps of {options.batch_size} pictures")
    print("\n| what | W | guesses | equal | passes | fewer by |\n|---|---|---|---|---|---|")
    for what, prompts in held_out.items():
        cases, settings = rows(prompts), Sampling(guidance=options.guidance).settings(len(prompts))
        truth = session.run(model.params, model.config, cases, settings)
        for window, drafts in itertools.product(options.windows, (0, *options.drafts)):
            ids, passes = decode(model, drafter, cases, settings, window, drafts)
            equal = (ids == truth.ids).all(axis=1).sum()
            name = f"drafter's for {drafts}" if drafts else "computed"
            print(
                f"| {what} | {window} | {name} | {equal} of {len(cases)} | {truth.passes.mean():.0f} to "
                f"{passes.mean():.1f} | {truth.passes.sum() / passes.sum():.2f}x |",
                flush=True,
            )
    said("done")


if __name__ == "__main__":
    main()

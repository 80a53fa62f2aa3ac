"""Log-probabilities of sampled visual tokens and of given texts, by one teacher-forced pass over finished rows.

R computed rows: B, or 2B with guidance (conditional rows, then unconditional rows); S tokens of the longest sequence;
N visual tokens of the longest row; V visual ids.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from emu3_jax.config import DecoderConfig
from emu3_jax.errors import RowError
from emu3_jax.generation.engine import Program
from emu3_jax.generation.language import Language
from emu3_jax.generation.sampling import RowSettings, guide, keep_top_k, keep_top_p
from emu3_jax.generation.schedule import TokenClass
from emu3_jax.generation.session_rows import Row
from emu3_jax.generation.shapes import bucket, fill_rows
from emu3_jax.models.decoder import Decoder, visual_head_params
from emu3_jax.sharding.rules import use_mesh

_TOKENS = 16_384  # most tokens of a pass, over all computed rows, unless a single row has more
_LOGITS = 512  # most positions, over all computed rows, whose logits exist at once
_TEXT_STEPS = 16  # texts are padded to a multiple of this number of tokens, so that few programs serve all


@dataclasses.dataclass(frozen=True)
class LogProbs:
    """Log-probabilities of a row's visual tokens, in nats, in the order of generation.

    Attributes:
        sampled: float32 [N], of the distribution that the token was drawn from: guidance, temperature, top-k and top-p
            included, among the visual ids. 0 where sampling was greedy. A token that was drawn always counts as one of
            the top k and of the top p: in narrow dtypes rounding may leave it out here.
        model: float32 [N], of the model given the prompt, among the visual ids, at temperature 1, without guidance,
            top-k and top-p.
    """

    sampled: np.ndarray
    model: np.ndarray


@dataclasses.dataclass(frozen=True)
class TextLogProb:
    """How likely a model is to continue a prompt with a text.

    Attributes:
        log_prob: sum of the log-probabilities of the text's tokens, in nats, at temperature 1, over the whole
            vocabulary. EOS does not belong to the text.
        greedy: whether each token is the likeliest one, so that a greedy answer begins with the text.
    """

    log_prob: float
    greedy: bool


def text_log_probs(
    language: Language, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], *, batch_size: int
) -> list[TextLogProb]:
    """Computes how likely each prompt is continued with its text.

    Args:
        language: the decoder.
        prompts: ids of each row's prompt, at least one.
        texts: ids of each row's text, at least one.
        batch_size: most rows of a pass; there are fewer where sequences are long.

    Raises:
        RowError: a prompt with its text has more tokens than the model has positions.
    """
    whole = [[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)]
    for index, ids in enumerate(whole):
        if len(ids) > language.config.max_positions:
            raise RowError(
                index,
                f"prompt and continuation take {len(ids)} tokens, but the model has {language.config.max_positions} "
                "positions: shorten the texts, or use fewer or smaller pictures, or fewer frames of a clip",
            )
    found: dict[int, TextLogProb] = {}
    order = sorted(range(len(whole)), key=lambda index: len(whole[index]))  # little padding
    while order:
        length = bucket(len(whole[order[-1]]))  # the longest first: if one does not fit into memory, it shows at once
        most = max(1, min(batch_size, _TOKENS // length, len(order)))
        batch, order = order[-most:], order[:-most]
        found |= _text_batch(language, [whole[i] for i in batch], [texts[i] for i in batch], batch, length)
    return [found[index] for index in range(len(whole))]


def _text_batch(
    language: Language,
    whole: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    indices: Sequence[int],
    length: int,
) -> dict[int, TextLogProb]:
    """The results of one pass over sequences that are padded to `length`, by index."""
    steps = -(-max(map(len, texts)) // _TEXT_STEPS) * _TEXT_STEPS
    rows = fill_rows(len(whole), language.mesh, guided=False)
    tokens = np.full((rows, length), language.config.tokens.pad, np.int32)
    places, targets = (np.zeros((rows, steps), np.int32) for _ in range(2))
    for row, (ids, text) in enumerate(zip(whole, texts, strict=True)):
        tokens[row, : len(ids)] = ids
        places[row, : len(text)] = np.arange(len(ids) - len(text), len(ids)) - 1
        targets[row, : len(text)] = text
    with use_mesh(language.mesh):
        results = _text_log_probs(language.params, tokens, places, targets, config=language.config)
    log_probs, likeliest = map(np.asarray, results)
    return {
        index: TextLogProb(float(log_probs[row, : len(text)].sum()), bool(likeliest[row, : len(text)].all()))
        for row, (index, text) in enumerate(zip(indices, texts, strict=True))
    }


@functools.partial(Program, static_argnames=("config",))
def _text_log_probs(
    params: Any, tokens: jax.Array, places: jax.Array, targets: jax.Array, *, config: DecoderConfig
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target, float32 [R, N], and whether it is the likeliest token, bool [R, N]."""
    decoder, variables = Decoder(config), {"params": params}
    hidden: Any = decoder.apply(variables, tokens, method=Decoder.hidden)
    hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)  # [R, N, D]

    def measure(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, targets = part
        logits: Any = decoder.apply(variables, hidden, method=Decoder.logits)
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), targets[..., None], axis=-1)[..., 0]
        return log_probs, jnp.argmax(logits, axis=-1) == targets

    rows, steps = targets.shape
    chunks = -(-steps // max(1, _LOGITS // rows))
    chunk = -(-steps // chunks)
    results = jax.lax.map(measure, (_chunks(hidden, chunks, chunk), _chunks(targets, chunks, chunk)))
    whole = (jnp.moveaxis(part, 0, 1).reshape(rows, chunks * chunk)[:, :steps] for part in results)
    log_probs, likeliest = (nn.with_logical_constraint(part, (None, None)) for part in whole)
    return log_probs, likeliest


def _chunks(array: jax.Array, chunks: int, chunk: int) -> jax.Array:
    """[R, N, ...] as [chunks, R, positions of a chunk, ...]."""
    padded = jnp.pad(array, ((0, 0), (0, chunks * chunk - array.shape[1]), *((0, 0),) * (array.ndim - 2)))
    return jnp.moveaxis(padded.reshape(len(array), chunks, chunk, *array.shape[2:]), 1, 0)


def visual_log_probs(
    language: Language, rows: Sequence[Row], ids: Sequence[np.ndarray], settings: RowSettings, *, batch_size: int
) -> list[LogProbs]:
    """Computes the log-probabilities of the visual tokens of finished rows.

    It runs whole sequences without a cache. So with an int8 KV cache the results differ a little from the distribution
    that was sampled.

    Args:
        language: the decoder that generated the rows.
        rows: the rows, as `language.grid_rows` makes them.
        ids: the generated ids of each row, int32 [steps of the row].
        settings: sampling settings of each row. Rows of guidance scale 1 need no unconditional prompt.
        batch_size: most rows of a pass; there are fewer where sequences are long.
    """
    guided = bool((settings.guidance != 1.0).any())
    length = bucket(max(max(len(row.prompt), len(row.negative or ())) + len(row.schedule) for row in rows))
    steps = max(int((row.schedule == TokenClass.VISUAL).sum()) for row in rows)
    most = max(1, min(batch_size, _TOKENS // (length * (2 if guided else 1))))
    size = fill_rows(min(most, len(rows)), language.mesh, guided)
    found: list[LogProbs] = []
    for first in range(0, len(rows), size):
        # Copies of the last row fill the last batch, so that one program serves all.
        batch = np.minimum(np.arange(first, first + size), len(rows) - 1)
        inputs = _inputs(language.config, [(rows[i], ids[i]) for i in batch], length, steps, guided=guided)
        with use_mesh(language.mesh):
            results = _log_probs(
                language.params, *inputs, settings.take(batch), config=language.config, guided=guided,
                use_top_k=bool((settings.top_k < language.config.tokens.visual_count).any()),
                use_top_p=bool((settings.top_p < 1).any()),
            )  # fmt: skip
        sampled, model = map(np.asarray, results)
        for place, row in enumerate(rows[first : first + size]):
            count = int((row.schedule == TokenClass.VISUAL).sum())
            found.append(LogProbs(sampled[place, :count], model[place, :count]))
    return found


def _inputs(
    config: DecoderConfig, batch: Sequence[tuple[Row, np.ndarray]], length: int, steps: int, *, guided: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whole sequences [R, S], padded to the right; the position before each visual token [R, N]; codes [B, N]."""
    count, special = len(batch), config.tokens
    tokens = np.full((count * (2 if guided else 1), length), special.pad, np.int32)
    places = np.zeros((len(tokens), steps), np.int32)
    codes = np.zeros((count, steps), np.int32)
    for index, (row, ids) in enumerate(batch):
        visual = np.flatnonzero(row.schedule == TokenClass.VISUAL)
        codes[index, : len(visual)] = ids[visual] - special.visual_start
        # A row without guidance repeats its conditional prompt, which costs nothing more and is not used.
        prompts = [row.prompt, row.prompt if row.negative is None else row.negative][: 1 + guided]
        for half, prompt in enumerate(prompts):
            at = index + half * count
            tokens[at, : len(prompt)] = prompt
            tokens[at, len(prompt) : len(prompt) + len(ids)] = ids
            places[at, : len(visual)] = visual + len(prompt) - 1
    return tokens, places, codes


@functools.partial(Program, static_argnames=("config", "guided", "use_top_k", "use_top_p"))
def _log_probs(
    params: Any,
    tokens: jax.Array,
    places: jax.Array,
    codes: jax.Array,
    settings: RowSettings,
    *,
    config: DecoderConfig,
    guided: bool,
    use_top_k: bool,
    use_top_p: bool,
) -> tuple[jax.Array, jax.Array]:
    """Both kinds of `LogProbs`, float32 [B, N] each, in chunks of positions."""
    decoder = Decoder(config, visual_head=True)
    variables = {"params": visual_head_params(params, config)}
    hidden: Any = decoder.apply(variables, tokens, method=Decoder.hidden)
    hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)  # [R, N, D]
    rows, steps = codes.shape
    chunks = -(-steps // max(1, _LOGITS // len(tokens)))
    chunk = -(-steps // chunks)

    def cut(array: jax.Array) -> jax.Array:
        """[R, N, ...] as [chunks, R, positions of a chunk, ...]."""
        return _chunks(array, chunks, chunk)

    def measure(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, codes = part
        logits: Any = decoder.apply(variables, hidden, method=Decoder.logits)
        conditional, *unconditional = (half.reshape(rows * chunk, -1) for half in jnp.split(logits, 1 + guided))
        each = jax.tree.map(lambda column: jnp.repeat(column, chunk), settings)
        model = jax.nn.log_softmax(conditional, axis=-1)
        guidance = guide(conditional, unconditional[0], each.guidance) if guided else conditional
        code = codes.reshape(-1, 1)
        sampled = sampled_log_probs(guidance, code[:, 0], each, use_top_k=use_top_k, use_top_p=use_top_p)
        return sampled.reshape(rows, chunk), jnp.take_along_axis(model, code, axis=1).reshape(rows, chunk)

    results = jax.lax.map(measure, (cut(hidden), cut(codes)))
    whole = (jnp.moveaxis(part, 0, 1).reshape(rows, chunks * chunk)[:, :steps] for part in results)
    sampled, model = (nn.with_logical_constraint(part, (None, None)) for part in whole)
    return sampled, model


def sampled_log_probs(
    logits: jax.Array, chosen: jax.Array, settings: RowSettings, *, use_top_k: bool, use_top_p: bool
) -> jax.Array:
    """Log-probabilities float32 [B] of candidates under the distribution that `sampling.sample` draws from.

    Args:
        logits: float32 [B, V], after guidance.
        chosen: int32 [B], the candidates. They always count as kept by top-k and top-p.
        settings: sampling settings of each row.
        use_top_k: whether any row's `top_k` is below V.
        use_top_p: whether any row's `top_p` is below 1.

    Returns:
        float32 [B], 0 where the temperature is 0.
    """
    greedy = jnp.asarray(settings.temperature) == 0.0
    scaled = logits / jnp.where(greedy, 1.0, settings.temperature)[:, None]
    kept = scaled
    if use_top_k:
        kept = keep_top_k(kept, settings.top_k)
    if use_top_p:
        kept = keep_top_p(kept, settings.top_p)
    own = jnp.arange(logits.shape[-1])[None] == chosen[:, None]
    picked = jnp.take_along_axis(scaled, chosen[:, None], axis=1)[:, 0]
    total = jax.nn.logsumexp(jnp.where(own, scaled, kept), axis=-1)
    return jnp.where(greedy, 0.0, picked - total)

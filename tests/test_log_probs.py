"""Log-probabilities of sampled tokens: against token-by-token forward passes, and against the noise of the sampler."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from emu3_jax.generation import log_probs, sampling, session
from emu3_jax.generation.language import Language
from emu3_jax.generation.log_probs import text_log_probs, visual_log_probs
from emu3_jax.generation.schedule import TokenClass, image_schedule
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.rules import decoder_shardings

pytestmark = pytest.mark.compiled_quickly

SPECIAL = tiny.TOKENS
VISUAL = slice(SPECIAL.visual_start, SPECIAL.visual_end)
# Rows of two sizes, with and without guidance; each setting has an effect on one row at least.
ROWS = tiny.rows(
    [[17, 3, 4], [17, 5], [17, 1, 2, 9], [17, 8], [17, 2, 2]],
    [image_schedule(*size) for size in ((3, 4), (2, 3), (3, 4), (2, 3), (3, 4))],
    [[17, 6], [17], [17, 7, 7], [17], [17]],
)
SETTINGS = tiny.settings(
    5, guidance=[3.0, 1.0, 1.0, 2.0, 1.5], temperature=[1.0, 0.7, 1.3, 1.0, 0.0], top_k=[8, 3, 8, 5, 8],
    top_p=[1.0, 1.0, 0.8, 0.9, 1.0],
)  # fmt: skip


def language(params=None, mesh=None) -> Language:
    return Language(tiny.CONFIG, tiny.params() if params is None else params, None, None, mesh)


@pytest.fixture(scope="module")
def drawn() -> list[np.ndarray]:
    """The ids that a session draws for `ROWS`."""
    made = session.run(tiny.params(), tiny.CONFIG, ROWS, SETTINGS)
    return [ids[: len(row.schedule)] for ids, row in zip(made.ids, ROWS, strict=True)]


def logits_before(prompt, ids, step: int) -> jax.Array:
    """Visual logits [1, V] of one step, from a forward pass of its own."""
    tokens = np.full((1, 32), SPECIAL.pad, np.int32)
    sequence = [*prompt, *ids[:step]]
    tokens[0, : len(sequence)] = sequence
    return tiny.forward(tiny.params(), tokens)[0][:, len(sequence) - 1, VISUAL]


@pytest.fixture(scope="module")
def expected(drawn) -> list[tuple[np.ndarray, np.ndarray]]:
    """`sampled` and `model` of each row, step by step, with the sampler's own noise checked on the way."""
    found = []
    for index, (row, ids) in enumerate(zip(ROWS, drawn, strict=True)):
        one = SETTINGS.take(np.asarray([index]))
        pairs = []
        for step in np.flatnonzero(row.schedule == TokenClass.VISUAL):
            conditional = logits_before(row.prompt, ids, step)
            guided = sampling.guide(conditional, logits_before(row.negative, ids, step), one.guidance)
            code = int(ids[step]) - SPECIAL.visual_start
            temperature = float(one.temperature[0])
            kept = sampling.keep_top_p(sampling.keep_top_k(guided / (temperature or 1.0), one.top_k), one.top_p)
            key = jax.random.fold_in(jax.random.key(one.seed[0]), step)
            choice = kept[0] + jax.random.gumbel(key, kept[0].shape) if temperature else guided[0]
            assert int(jnp.argmax(choice)) == code  # the distribution that was sampled is this one
            sampled = float(jax.nn.log_softmax(kept[0])[code]) if temperature else 0.0
            pairs.append((sampled, float(jax.nn.log_softmax(conditional[0])[code])))
        found.append(tuple(np.asarray(column) for column in zip(*pairs, strict=True)))
    return found


def assert_equal(found, expected) -> None:
    """Equal up to the order of sums, which guidance of scale 3 makes larger."""
    for one, (sampled, model) in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.sampled, sampled, atol=1e-4)
        np.testing.assert_allclose(one.model, model, atol=1e-4)


def test_they_are_of_the_distribution_that_was_sampled_and_of_the_model(drawn, expected):
    found = visual_log_probs(language(), ROWS, drawn, SETTINGS, batch_size=8)
    assert_equal(found, expected)
    assert not found[4].sampled.any() and (found[4].model < 0).all()  # greedy
    # Another row of the same prompt without guidance, at temperature 1, of all ids: both are the same.
    plain = tiny.settings(1)
    row = types.SimpleNamespace(**{**vars(ROWS[0]), "negative": None})
    (one,) = visual_log_probs(language(), [row], drawn[:1], plain, batch_size=1)
    np.testing.assert_allclose(one.sampled, one.model, atol=1e-6)
    np.testing.assert_allclose(one.model, found[0].model, atol=1e-4)


@pytest.mark.slow
def test_batches_chunks_and_meshes_do_not_change_them(drawn, expected, monkeypatch):
    monkeypatch.setattr(log_probs, "_TOKENS", 300)  # two rows of a pass
    monkeypatch.setattr(log_probs, "_LOGITS", 20)  # of 5 positions each
    assert_equal(visual_log_probs(language(), ROWS, drawn, SETTINGS, batch_size=8), expected)
    mesh = make_mesh("data=2,tensor=2", jax.devices()[:4])
    spread = jax.device_put(tiny.params(), decoder_shardings(tiny.CONFIG, mesh))
    assert_equal(visual_log_probs(language(spread, mesh), ROWS, drawn, SETTINGS, batch_size=8), expected)
    prompts, texts = [[17, 3, 4], [17, 5], [17, 1, 2, 9]], [[4, 4, 2], [6], [8, 1]]
    found, alone = (text_log_probs(one, prompts, texts, batch_size=8) for one in (language(spread, mesh), language()))
    np.testing.assert_allclose([one.log_prob for one in found], [one.log_prob for one in alone], atol=1e-4)
    assert [one.greedy for one in found] == [one.greedy for one in alone]


def test_a_token_that_was_drawn_counts_as_kept():
    """Rounding in bfloat16 may put it one place below the top k."""
    logits = jnp.asarray([[3.0, 2.0, 1.0, 0.0]])
    found = log_probs.sampled_log_probs(
        logits, jnp.asarray([2]), tiny.settings(1, top_k=2), use_top_k=True, use_top_p=False
    )
    np.testing.assert_allclose(found, [1.0 - np.log(np.exp([3.0, 2.0, 1.0]).sum())], rtol=1e-6)

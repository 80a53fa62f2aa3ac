"""Samplers against sorting, and drawn frequencies against exact probabilities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from frequencies import CRITICAL, chi_squared, softmax
from hypothesis import given, settings
from hypothesis import strategies as st

from emu3_jax.generation import sampling

DRAWS = 20_000
keep_top_k, keep_top_p = jax.jit(sampling.keep_top_k), jax.jit(sampling.keep_top_p)
sample = jax.jit(sampling.sample, static_argnames=("use_top_k", "use_top_p"))


def draw(logits: np.ndarray, **columns) -> np.ndarray:
    """How often each candidate comes in `DRAWS` rows of the same logits, each with a seed of its own."""
    columns.setdefault("seed", np.arange(DRAWS))
    rows = tiny.settings(DRAWS, **columns)
    drawn = sample(
        jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (DRAWS, len(logits))),
        jnp.full(DRAWS, 3),
        jax.tree.map(jnp.asarray, rows),
        use_top_k=bool((rows.top_k < len(logits)).any()),
        use_top_p=bool((rows.top_p < 1).any()),
    )
    return np.bincount(np.asarray(drawn), minlength=len(logits))


LOGITS = np.array([2.0, 1.5, 1.5, 0.3, -0.2, -1.0, -1.1, -4.0])


@pytest.mark.parametrize(
    ("columns", "probabilities"),
    [
        ({}, softmax(LOGITS)),
        ({"temperature": 0.5}, softmax(LOGITS / 0.5)),
        ({"temperature": 2.0}, softmax(LOGITS / 2.0)),
        ({"top_k": 4}, softmax(np.where(np.arange(8) < 4, LOGITS, -np.inf))),
        # Candidates 1 and 2 are equal: the second of two kept brings its twin along, as in the reference.
        ({"top_k": 2}, softmax(np.where(np.arange(8) < 3, LOGITS, -np.inf))),
        # Masses .40 .25 .25 ...: .6 needs the twins, which come together.
        ({"top_p": 0.6}, softmax(np.where(np.arange(8) < 3, LOGITS, -np.inf))),
        ({"top_p": 0.3}, np.eye(8)[0]),
        ({"temperature": 0.5, "top_k": 5, "top_p": 0.95}, None),
    ],
)
def test_frequencies_equal_exact_probabilities(columns, probabilities):
    if probabilities is None:  # temperature, then top-k, then top-p
        scaled = np.where(np.arange(8) < 5, LOGITS / 0.5, -np.inf)
        mass_above = np.array([softmax(scaled)[scaled > value].sum() for value in scaled])
        probabilities = softmax(np.where(mass_above < 0.95, scaled, -np.inf))
    counts = draw(LOGITS, **columns)
    freedom = int((probabilities > 0).sum()) - 1
    assert counts.sum() == DRAWS
    if freedom == 0:
        assert counts.max() == DRAWS
    else:
        assert chi_squared(counts, probabilities) < CRITICAL[freedom]


def test_the_chi_squared_check_can_fail():
    assert chi_squared(draw(LOGITS), softmax(LOGITS / 1.1)) > CRITICAL[7]


def test_greedy_takes_the_first_of_the_likeliest():
    assert draw(np.array([0.0, 3.0, 3.0, 1.0]), temperature=0.0).tolist() == [0, DRAWS, 0, 0]


# XLA's CPU code flushes subnormals to zero, which they then tie with.
logits_values = st.floats(-30, 30, width=32, allow_subnormal=False) | st.sampled_from([-np.inf, 0.0, -0.0, 1.0])


@settings(max_examples=60)
@given(
    st.lists(logits_values, min_size=2, max_size=40),
    st.integers(1, 45),
    st.floats(0.01, 0.999),
)
def test_filters_equal_sorting(values, top_k, top_p):
    x = np.full(40, -np.inf, np.float32)
    x[: len(values)] = values
    if not np.isfinite(x).any():
        x[0] = 0.0
    kept = np.isfinite(np.asarray(keep_top_k(x[None], np.asarray([top_k], np.int32))))[0]
    kth = np.sort(x)[::-1][min(top_k, len(x)) - 1]
    np.testing.assert_array_equal(kept, (x >= kth) & np.isfinite(x))

    kept = np.isfinite(np.asarray(keep_top_p(x[None], np.asarray([top_p], np.float32))))[0]
    probabilities = softmax(x.astype(np.float64))
    above = np.array([probabilities[x > value].sum() for value in x])
    clear = np.abs(above - np.float32(top_p)) > 1e-5  # rounding decides the rest
    np.testing.assert_array_equal(kept[clear], ((above < np.float32(top_p)) & np.isfinite(x))[clear])


def test_guidance_is_the_reference_formula_and_scale_one_changes_nothing():
    rng = np.random.default_rng(0)
    c, u = (jnp.asarray(rng.standard_normal((3, 9)), jnp.float32) for _ in range(2))
    guided = sampling.guide(c, u, jnp.asarray([1.0, 3.0, 0.0]))
    log_c, log_u = jax.nn.log_softmax(c), jax.nn.log_softmax(u)
    np.testing.assert_array_equal(guided[0], log_c[0])
    np.testing.assert_allclose(guided[1], log_u[1] + 3 * (log_c[1] - log_u[1]), rtol=1e-6)
    np.testing.assert_allclose(guided[2], log_u[2], rtol=1e-6)


def test_a_row_draws_by_its_seed_and_step_alone():
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((6, 50)), jnp.float32)
    rows = jax.tree.map(jnp.asarray, tiny.settings(6, top_k=[50, 3, 10, 50, 5, 1], seed=[5, 5, 1, 2, 3, 4]))

    def draws(order, step):
        picked = jax.tree.map(lambda leaf: leaf[jnp.asarray(order)], rows)
        return np.asarray(
            sample(logits[jnp.asarray(order)], jnp.full(len(order), step), picked, use_top_k=True, use_top_p=False)
        )

    everyone = draws(range(6), 7)
    for row in range(6):
        assert draws([row], 7)[0] == everyone[row]
    assert (draws([5, 4, 3, 2, 1, 0], 7)[::-1] == everyone).all()
    assert any((draws(range(6), step) != everyone).any() for step in range(8, 12))


@pytest.mark.parametrize("asked", [[True, False, False], [False, True, True], [False] * 3, [True] * 3])
def test_rows_that_are_asked_for_draw_as_if_all_were(asked):
    logits = jnp.asarray(np.random.default_rng(2).standard_normal((3, 50)), jnp.float32)
    settings = tiny.settings(3, top_k=[50, 3, 50], top_p=[1.0, 1.0, 0.4], seed=[1, 2, 3])
    draw = functools.partial(sample, use_top_k=True, use_top_p=True)
    for step in range(20):
        everyone = draw(logits, jnp.full(3, step), settings)
        some = draw(logits, jnp.full(3, step), settings, asked=jnp.asarray(asked))
        np.testing.assert_array_equal(np.asarray(some)[asked], np.asarray(everyone)[asked])

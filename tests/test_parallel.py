"""Parallel decoding: passes of several tokens give what passes of one give, in fewer passes.

Rows of all kinds, compiled as for users, are in `test_golden_sessions.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from session_cases import CASES, GUIDED, MIXED, finish, run, started

from emu3_jax.errors import Emu3Error
from emu3_jax.generation import parallel, session
from emu3_jax.generation.language import Batching
from emu3_jax.generation.parallel import choose_window, count_settled, end_of_text, next_guesses
from emu3_jax.generation.schedule import (
    SAMPLED_FREE,
    SAMPLED_VISUAL,
    TokenClass,
    image_schedule,
)
from emu3_jax.models import capability
from emu3_jax.models.quantization import quantise_params
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.rules import decoder_shardings

pytestmark = pytest.mark.compiled_quickly

SPECIAL = tiny.TOKENS


@pytest.mark.parametrize(("name", "window"), [("guided", 2), ("guided", 16), ("clips", 5), ("texts", 3)])
def test_the_tokens_are_the_sequential_ones(name, window):
    one, several = run(CASES[name]), run(CASES[name], parallel=window)
    np.testing.assert_array_equal(several.ids, one.ids)
    assert (several.passes <= one.passes).all() and several.passes.sum() < one.passes.sum()


def test_a_narrow_cache_gives_the_sequential_tokens_too():
    options = {"params": quantise_params(tiny.params(), "int8"), "narrow_cache": True}
    np.testing.assert_array_equal(run(GUIDED, parallel=5, **options).ids, run(GUIDED, **options).ids)


@pytest.mark.parametrize("name", ["guided", "mixed"])
def test_a_mesh_gives_the_same(name):
    mesh = make_mesh("data=2,tensor=2")
    params = jax.device_put(tiny.params(), decoder_shardings(tiny.CONFIG, mesh))
    spread, alone = run(CASES[name], params=params, mesh=mesh, parallel=5), run(CASES[name], parallel=5)
    np.testing.assert_array_equal(spread.ids, alone.ids)
    np.testing.assert_array_equal(spread.passes, alone.passes)


def test_the_kernel_for_tpus_gives_the_same_tokens():
    options = {"parallel": 4, "kernels": "pallas-tpu-interpreted"}
    np.testing.assert_array_equal(run(GUIDED, [0, 2], **options).ids, run(GUIDED, [0, 2]).ids)


def test_a_window_larger_than_the_whole_schedule():
    """Rows end inside the first window, and the window reaches beyond the model's last position."""
    room = tiny.CONFIG.max_positions - len(image_schedule(1, 2))
    case = {
        "prompts": [[17] * room, [17, 20, 19]],
        "negatives": None,
        "schedules": [image_schedule(1, 2)] * 2,
        "settings": tiny.settings(2),
    }
    found, expected = run(case, parallel=128), run(case)
    np.testing.assert_array_equal(found.ids, expected.ids)
    assert found.passes.max() <= 2


# ------------------------------------------------------------------------------------------------ passes and guesses


def guided_by(decoding, guesses):
    """The last reading, and the ids, if `guesses` [2, T] replace the session's own guesses before every pass."""
    reading = None
    while True:
        state, forced = decoding.state, decoding.plan.forced[:, : guesses.shape[1]]
        guessed = (np.arange(forced.shape[1])[None] >= np.asarray(state.step)[:, None]) & (forced < 0)
        tokens = np.array(state.tokens)
        tokens[:, : forced.shape[1]] = np.where(guessed, guesses, tokens[:, : forced.shape[1]])
        decoding.state = state.replace(tokens=jnp.asarray(tokens))
        if (snapshot := decoding.advance(1)) is None:
            return reading, decoding.results(reading)
        reading = decoding.read(snapshot)


@pytest.mark.parametrize("window", [4, 7])
def test_right_guesses_settle_every_token(window):
    schedule = image_schedule(4, 4)
    _, truth = finish(started("off", schedule))
    decoding = started(window, schedule)
    reading, found = guided_by(decoding, truth)
    np.testing.assert_array_equal(found, truth)
    assert reading.passes.tolist() == [1 + -(-(decoding.steps - 1) // window)] * 2


def test_wrong_guesses_cost_no_more_passes_than_there_are_free_steps():
    schedule = image_schedule(4, 4)
    _, truth = finish(started("off", schedule))
    reading, found = guided_by(started(4, schedule), np.full_like(truth, SPECIAL.bos))  # no step can emit BOS
    np.testing.assert_array_equal(found, truth)
    assert reading.passes.tolist() == [(schedule == TokenClass.VISUAL).sum()] * 2  # forced guesses are always right


def test_the_live_slots_of_the_cache_are_the_sequential_ones():
    schedule = image_schedule(4, 4)
    decoding, other = started(5, schedule), started("off", schedule)
    finish(other)
    theirs = (*other.state.cache.keys, *other.state.cache.values)
    while (snapshot := decoding.advance(1)) is not None:
        steps = decoding.read(snapshot).step
        cache = decoding.state.cache
        assert cache.length.tolist() == [decoding.shapes.width + step - 1 for step in (*steps, *steps)]
        for row, length in enumerate(cache.length.tolist()):
            first = int(cache.start[row])
            for ours, its in zip((*cache.keys, *cache.values), theirs, strict=True):
                np.testing.assert_allclose(ours[row, :, first:length], its[row, :, first:length], atol=1e-5)


def test_a_pretended_acceptance_takes_the_passes_that_it_says():
    decoding = started(8, image_schedule(6, 6), settled_per_pass=2.5)
    reading, _ = finish(decoding)
    assert reading.passes.tolist() == [1 + -(-2 * (decoding.steps - 1) // 5)] * 2


def test_counting_what_is_certain():
    computed = jnp.asarray([[7, 8, 9], [7, 8, 9], [7, 8, 9], [7, 8, 9]])
    fed = jnp.asarray([[1, 7, 8], [1, 7, 0], [1, 0, 8], [7, 8, 9]])
    assert count_settled(fed, computed).tolist() == [3, 2, 1, 1]


def test_texts_end_at_their_first_certain_eos():
    computed = jnp.asarray([[5, 2, 2], [5, 6, 2], [2, 5, 6], [2, 2, 2]])
    forced = jnp.full((4, 3), SAMPLED_FREE).at[3].set(SAMPLED_VISUAL)
    settled, ended = end_of_text(computed, forced, jnp.asarray([3, 2, 2, 3]), 2)
    assert settled.tolist() == [2, 2, 1, 3] and ended.tolist() == [True, False, True, False]


def test_the_next_guesses():
    free, eol = SAMPLED_VISUAL, 90
    forced = jnp.asarray([[free, free, free, eol, free], [free, free, eol, free, 91], [92, eol, 93, free, free]])
    computed = jnp.asarray([[5, 6, 7], [5, 6, 90], [92, 90, 93]])
    assert next_guesses(computed, forced).tolist() == [[5, 6, 7, 90, 7], [5, 6, 90, 6, 91], [92, 90, 93, 92, 92]]


# ------------------------------------------------------------------------------------------------ rows of all ages


@pytest.mark.parametrize("parallel", ["off", 4])
@pytest.mark.parametrize("mesh", [None, "data=2,tensor=2"])
def test_a_row_that_begins_beside_older_ones(parallel, mesh):
    """All rows of MIXED, two at a time: a row takes the place of the first one that is done."""
    mesh = mesh and make_mesh(mesh)
    params = tiny.params() if mesh is None else jax.device_put(tiny.params(), decoder_shardings(tiny.CONFIG, mesh))
    rows = tiny.rows(MIXED["prompts"], MIXED["schedules"], MIXED["negatives"])
    decoding = session.DecodeSession(
        params, tiny.CONFIG, rows[:2], MIXED["settings"].take(slice(2)), parallel=parallel, replaceable=True, mesh=mesh
    )
    at, waiting, made = [0, 1], [2, 3], {}
    snapshot = decoding.start()
    while len(made) < 4:
        reading = decoding.read(snapshot)
        for place in range(2):
            if reading.done[place] and at[place] not in made:
                made[at[place]] = decoding.results(reading)[place]
                if waiting:
                    at[place] = waiting.pop(0)
                    decoding.replace(place, rows[at[place]], MIXED["settings"].take(slice(at[place], at[place] + 1)))
        snapshot = decoding.advance(3) or snapshot
    for row, schedule in enumerate(MIXED["schedules"]):
        np.testing.assert_array_equal(made[row][: len(schedule)], run(MIXED, [row]).ids[0])


def test_a_session_that_is_resized_while_its_rows_go_on():
    """The four rows of MIXED, from the last to the first: the guided row goes on alone, twice computed, then beside
    others, and when it is done, the others go on without guidance."""
    rows, settings = tiny.rows(MIXED["prompts"], MIXED["schedules"], MIXED["negatives"]), MIXED["settings"]
    decoding = session.DecodeSession(tiny.params(), tiny.CONFIG, rows[:1], settings.take(slice(1)), replaceable=True,
                                     slots=192)  # fmt: skip
    reading = decoding.read(decoding.start())
    decoding.read(decoding.advance(2))
    decoding.resize([0], 3, guided=True)
    for place, row in ((2, 3), (1, 2)):
        decoding.replace(place, rows[row], settings.take(slice(row, row + 1)), width=64)
    reading = decoding.read(decoding.advance(2))
    decoding.resize([2, 0, 1], 4, guided=True)  # the rows are now 3, 0, 2 and a free one
    reading = decoding.read(decoding.advance(3))
    while not reading.done[1]:
        reading = decoding.read(decoding.advance(3))
    made = {0: decoding.results(reading)[1]}
    decoding.resize([0, 2], 3, guided=False)
    decoding.replace(2, rows[1], settings.take(slice(1, 2)), width=64)
    with pytest.raises(Emu3Error, match="a session without guidance"):
        decoding.replace(2, rows[0], settings.take(slice(1)), width=64)
    while (snapshot := decoding.advance(5)) is not None:
        reading = decoding.read(snapshot)
    made |= dict(zip((3, 2, 1), decoding.results(reading), strict=True))
    for row, schedule in enumerate(MIXED["schedules"]):
        np.testing.assert_array_equal(made[row][: len(schedule)], run(MIXED, [row]).ids[0])


def test_rows_that_a_session_has_no_room_for():
    rows = tiny.rows([[17]], [image_schedule(3, 4)])
    decoding = session.DecodeSession(tiny.params(), tiny.CONFIG, rows, tiny.settings(1), replaceable=True)
    decoding.start()
    for row, words in (
        (session.Row([17] * 65, image_schedule(1, 2)), "65 tokens and 6 tokens"),
        (session.Row([17], image_schedule(7, 9)), "1 tokens and 73 tokens"),
        (session.Row([17] * 250, image_schedule(3, 4)), "exceed the model's 256 positions"),
        (session.Row([17], image_schedule(1, 2), [17]), "a session without guidance"),
    ):
        with pytest.raises(Emu3Error, match=words):
            decoding.replace(0, row, tiny.settings(1))


# ------------------------------------------------------------------------------------------------ the choice of W


@pytest.mark.parametrize(
    ("choice", "rows", "visual", "width", "expected"),
    [
        ("off", 2, True, 448, 1),
        (2, 2, True, 448, 2),
        (128, 64, False, 4096, 128),
        ("auto", 1, True, 448, 8),
        ("auto", 2, True, 448, 8),
        ("auto", 3, True, 448, 1),
        ("auto", 2, False, 448, 1),
        ("auto", 1, True, 4096, 1),
    ],
)
def test_the_choice_of_the_window_on_a_cpu(choice, rows, visual, width, expected):
    assert choose_window(choice, rows, visual=visual, hidden_size=width) == expected


@pytest.mark.parametrize(
    ("found", "kernels", "rows", "visual", "expected"),
    [
        ((9, 0), "pallas-hopper", 2, True, 32),
        ((9, 0), "pallas-hopper", 1, True, 32),
        ((9, 0), "pallas-hopper", 16, True, 16),
        ((9, 0), "pallas-hopper", 24, True, 8),
        ((9, 0), "pallas-hopper", 33, True, 1),
        ((9, 0), "pallas-hopper", 2, False, 1),
        ((9, 0), "xla", 2, True, 16),
        ((8, 0), "xla", 4, True, 16),
        ((8, 0), "xla", 8, True, 8),
        ((8, 0), "xla", 16, True, 1),
        ((7, 5), "xla", 2, True, 1),
        (None, "xla", 2, True, 1),
    ],
)
def test_the_choice_of_the_window_on_gpus(found, kernels, rows, visual, expected, monkeypatch):
    monkeypatch.setattr(parallel, "target_platform", lambda: "gpu")
    monkeypatch.setattr(capability, "cuda_capability", lambda: found)
    assert choose_window("auto", rows, kernels, visual) == expected
    assert choose_window("off", rows, kernels, visual) == 1


@pytest.mark.parametrize("bad", [1, 0, -4, 129, 2.5, True, "on", None])
def test_a_window_that_is_not_legal(bad):
    with pytest.raises(Emu3Error, match="it must be auto, off, or a whole number from 2 to 128"):
        Batching(parallel=bad)

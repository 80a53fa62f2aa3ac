"""The decode session: exact sampling, calls of the device, one compilation, programs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from frequencies import CRITICAL, chi_squared, softmax
from session_cases import mixed_rows, run_rows

from emu3_jax.errors import Emu3Error
from emu3_jax.generation import engine, session, shapes
from emu3_jax.generation.schedule import TokenClass, clip_schedule, image_schedule, text_schedule
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.rules import decoder_shardings

pytestmark = pytest.mark.compiled_quickly

SPECIAL = tiny.TOKENS


def test_generated_tokens_obey_the_schedule():
    for ids, schedule in zip(run_rows([0, 1, 2, 3]), mixed_rows()[2], strict=True):
        visual = (ids >= SPECIAL.visual_start) & (ids < SPECIAL.visual_end)
        np.testing.assert_array_equal(visual[: len(schedule)], schedule == 1)
        assert ids[len(schedule) - 4 : len(schedule)].tolist() == [
            SPECIAL.eol, SPECIAL.eof, SPECIAL.eoi, SPECIAL.eos,
        ]  # fmt: skip


def test_growing_the_cache_and_short_calls_change_nothing(monkeypatch):
    whole = run_rows([0, 1, 2, 3])
    monkeypatch.setattr(shapes, "CACHE_GROWTH", 72)
    monkeypatch.setattr(session, "PASSES_PER_CALL", 3)
    progress = []
    small = run_rows([0, 1, 2, 3], on_progress=lambda taken, steps: progress.append((taken, steps)))
    np.testing.assert_array_equal(small, whole)
    # 14, 5, 15 and 5 steps. The calls end after 3 passes, where the cache must grow, and where a row is complete.
    steps = [sum(min(taken, goal) for goal in (14, 5, 15, 5)) for taken in (1, 4, 5, 8, 9, 9, 12, 14, 15)]
    assert progress == [(15 * count // 39, 15) for count in steps]


def test_a_cache_grows_through_few_sizes():
    def sizes(final: int) -> list[int]:
        found = [shapes.cache_slots(1, final, "xla")]
        while found[-1] < final:
            found.append(shapes.cache_slots(found[-1] + 1, final, "xla"))
        return found

    assert sizes(8256) == [2048, 4096, 6144, 8192, 8256]  # a picture of 720x720
    long = sizes(124_992)  # a clip of 5 s
    assert len(long) == 20 and long[-1] == 124_992
    assert all(b - a <= max(2048, b // 4) for a, b in itertools.pairwise(long))
    assert shapes.cache_slots(1, 124_992, "pallas") == 124_992


def test_slots_that_passes_read_on_tpus():
    """The kernel reads blocks of 512 slots, from the one behind the prompt on; XLA's attention the whole cache."""
    assert shapes.sizes_read([2048, 2624], 64, "xla") == [2048, 2624]
    read = shapes.sizes_read([2624], 600, "pallas-tpu")
    assert read == [1024, 1536, 2048, 2560, 2624]
    assert shapes.passes_by_size(read, 600, 2000) == ((1024, 424), (1536, 512), (2048, 512), (2560, 512), (2624, 40))


def test_tokens_are_told_while_the_device_has_its_next_call(monkeypatch):
    monkeypatch.setattr(session, "PASSES_PER_CALL", 4)
    asked, told = [0], []  # passes that the device was asked for
    decode = engine.decode

    def watched(params, state, plan, passes, **static):
        asked.append(asked[-1] + int(passes))
        return decode(params, state, plan, passes, **static)

    monkeypatch.setattr(engine, "decode", watched)
    rows = tiny.rows([[17, 1, 20, 19], [17, 20, 19]], [image_schedule(4, 3)] * 2)
    ids = session.run(
        tiny.params(), tiny.CONFIG, rows, tiny.settings(2), on_tokens=lambda tokens: told.append((tokens, asked[-1]))
    ).ids
    assert [[len(row) for row in tokens] for tokens, _ in told] == [[taken] * 2 for taken in (1, 5, 9, 13, 15)]
    assert [ahead for _, ahead in told] == [4, 8, 12, 16, 20]
    for tokens, _ in told:
        for row, whole in zip(tokens, ids, strict=True):
            np.testing.assert_array_equal(row, whole[: len(row)])


def test_calls_end_with_the_frames_of_clips(monkeypatch):
    monkeypatch.setattr(session, "PASSES_PER_CALL", 10)
    told = []
    schedule = clip_schedule(3, 2, 3)  # 9 tokens a frame; each frame's EOF is forced after them
    session.run(
        tiny.params(), tiny.CONFIG, [session.Row([17, 20, 19], schedule)], tiny.settings(1),
        on_tokens=lambda tokens: told.append(len(tokens[0])),
    )  # fmt: skip
    assert told == [1, 8, 17, 25]
    assert (schedule[[8, 17]] == TokenClass.EOF).all() and schedule[24] == TokenClass.VISUAL


@pytest.mark.slow
def test_first_and_second_token_are_drawn_from_the_exact_distribution():
    """4,000 guided rows that differ in nothing but their seeds, against probabilities from full forward passes."""
    count, scale, temperature = 4000, 2.0, 1.5
    prompt, negative = [17, 1, 2, 20, 19], [17, 5, 20, 19]
    ids = session.run(
        tiny.params(),
        tiny.CONFIG,
        [session.Row(prompt, image_schedule(1, 2), negative)] * count,
        tiny.settings(count, guidance=scale, temperature=temperature),
    ).ids

    def guided(extra):
        logits = []
        for row in (prompt, negative):
            tokens = jnp.asarray([row + extra], jnp.int32)
            logits.append(np.asarray(tiny.forward(tiny.params(), tokens)[0])[0, -1, SPECIAL.visual_start :])
        c, u = (np.log(softmax(np.asarray(x, np.float64))) for x in logits)
        return softmax((u + scale * (c - u)) / temperature)

    first = ids[:, 0] - SPECIAL.visual_start
    likeliest = int(np.bincount(first, minlength=8).argmax())
    for drawn, probabilities in (
        (first, guided([])),
        (ids[first == likeliest, 1] - SPECIAL.visual_start, guided([likeliest + SPECIAL.visual_start])),
    ):
        counts = np.bincount(drawn, minlength=8)
        common = probabilities * counts.sum() >= 5  # the test's own condition; the rest is one class
        counts = np.append(counts[common], counts[~common].sum())
        probabilities = np.append(probabilities[common], probabilities[~common].sum())
        assert chi_squared(counts, probabilities) < CRITICAL[len(counts) - 1]


def test_answers_end_at_eos_and_the_loop_ends_with_them():
    params = tiny.params()
    kernel = params["head"]["kernel"]
    eos_only = {**params, "head": {"kernel": jnp.zeros_like(kernel).at[SPECIAL.eos].set(1e3)}}
    # The head is linear: with every other row zero, EOS wins exactly when its logit is positive.
    prompts = [[17, token] for token in range(12)]
    rows = tiny.rows(prompts, [text_schedule(150)] * 12)
    ids = session.run(eos_only, tiny.CONFIG, rows, tiny.settings(12, temperature=0.0)).ids
    for row in ids:
        ends = np.flatnonzero(row == SPECIAL.eos)
        assert len(ends) <= 1
        if len(ends):
            assert (row[ends[0] + 1 :] == SPECIAL.pad).all()
    ended = [row for row in range(12) if SPECIAL.eos in ids[row]]
    assert len(ended) > 0
    progress = []
    alone = session.run(
        eos_only, tiny.CONFIG, [rows[ended[0]]], tiny.settings(1, temperature=0.0),
        on_progress=lambda taken, steps: progress.append((taken, steps)),
    )  # fmt: skip
    np.testing.assert_array_equal(alone.ids[0], ids[ended[0]])
    taken = list(alone.ids[0]).index(SPECIAL.eos) + 1
    assert taken < 129 and alone.passes.tolist() == [taken] and progress[-1] == (150, 150) and len(progress) <= 2


def test_one_compilation_per_shape_bucket():
    engine.prefill.jitted.clear_cache()
    engine.decode.jitted.clear_cache()
    run_rows([0, 1, 2, 3])
    assert (engine.prefill.jitted._cache_size(), engine.decode.jitted._cache_size()) == (1, 1)
    run_rows([3, 2, 1, 0])  # other prompts, grids and settings of the same buckets
    assert (engine.prefill.jitted._cache_size(), engine.decode.jitted._cache_size()) == (1, 1)
    run_rows([0, 1])
    assert (engine.prefill.jitted._cache_size(), engine.decode.jitted._cache_size()) == (2, 2)


def test_a_prompt_past_the_positions_is_refused():
    with pytest.raises(
        Emu3Error, match="row 1: a prompt of 250 tokens and 18 tokens to generate exceed the model's 256"
    ):
        rows = tiny.rows([[17], [17] * 250], [image_schedule(3, 4)] * 2)
        session.run(tiny.params(), tiny.CONFIG, rows, tiny.settings(2))


def test_a_row_without_a_negative_prompt_beside_guided_ones():
    """It is computed twice, and its distribution stays as it is."""
    prompts, negatives, schedules, _ = mixed_rows()
    settings = tiny.settings(4, guidance=2.0)
    rows = tiny.rows(prompts, schedules, [None, *negatives[1:]])
    together = session.run(tiny.params(), tiny.CONFIG, rows, settings).ids
    alone = session.run(tiny.params(), tiny.CONFIG, rows[:1], settings.take(slice(1))).ids
    np.testing.assert_array_equal(together[0, : len(schedules[0])], alone[0])


def test_a_session_by_hand_gives_what_run_gives():
    prompts, negatives, schedules, settings = mixed_rows()
    rows = tiny.rows(prompts, schedules, negatives)
    decoding = session.DecodeSession(tiny.params(), tiny.CONFIG, rows, settings)
    with pytest.raises(RuntimeError, match="call start first"):
        decoding.advance()
    first = decoding.start()
    later = [decoding.advance(passes) for passes in (3, 5, decoding.steps, decoding.steps)]
    whole = run_rows([0, 1, 2, 3])
    for snapshot, step in zip((first, *later), (1, 4, 5, 14, 15), strict=True):  # rows are complete at 5, 14 and 15
        reading = decoding.read(snapshot)
        for row, ids in enumerate(reading.tokens):
            np.testing.assert_array_equal(ids, whole[row, : min(step, len(schedules[row]))])
        assert not reading.ended.any() and reading.done.all() == (step == 15)
        assert reading.passes.tolist() == [min(step, goal) for goal in (14, 5, 15, 5)]
    assert decoding.advance() is None
    np.testing.assert_array_equal(decoding.results(reading), whole)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("mesh", [None, "data=2,tensor=2"])
def test_what_a_session_lowers_is_what_it_runs(mesh, narrow):
    mesh = mesh and make_mesh(mesh)
    params = tiny.params() if mesh is None else jax.device_put(tiny.params(), decoder_shardings(tiny.CONFIG, mesh))
    rows = tiny.rows([[17, 1, 2, 20, 19]] * 3, [image_schedule(3, 4)] * 3, [[17, 20, 19]] * 3)
    decoding = session.DecodeSession(params, tiny.CONFIG, rows, tiny.settings(3), mesh=mesh, narrow_cache=narrow)
    decoding.start()

    def described(tree):
        def place(leaf):
            return None if mesh is None else leaf.sharding.shard_shape(leaf.shape)

        return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype), place(leaf)), tree)

    abstract = decoding.abstract_state(decoding.state.cache.slots)
    assert described(abstract) == described(decoding.state)
    assert decoding.shapes.cache_sizes() == [decoding.state.cache.slots]
    assert "while" in decoding.lower_decode(decoding.state.cache.slots).as_text()
    assert decoding.lower_prefill().as_text() and decoding.lower_growth(64, 128).as_text()

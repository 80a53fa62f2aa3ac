"""ZipAR: rows of the grid in fewer passes. Each token is what its own logits give, of the tokens that it may see."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from commands import OPTIONS
from commands import run as command
from session_cases import CASES, GUIDED, MIXED, finish, run

from emu3_jax.errors import Emu3Error
from emu3_jax.evaluation.config import EvaluateConfig
from emu3_jax.generation import engine, session, shapes, zipar
from emu3_jax.generation.language import Batching
from emu3_jax.generation.schedule import clip_schedule, forced_ids, image_schedule, text_schedule
from emu3_jax.generation.shapes import bucket
from emu3_jax.models import attention, decoder
from emu3_jax.models.cache import KVCache, Placement
from emu3_jax.models.decoder import Decoder
from emu3_jax.models.quantization import quantise_params
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.rules import decoder_shardings

pytestmark = pytest.mark.compiled_quickly

N, NEVER = 64, zipar.NEVER  # steps that stand for no token, and a pass that never comes
choose = jax.jit(engine.choose, static_argnums=(3, 4))


# ------------------------------------------------------------------------------------------------ the order


def passes_of(order, row=0):
    """The steps that each pass feeds, in the passes of the row."""
    return [some[some < N].tolist() for some in order.steps[row, : order.passes[row]]]


def test_the_order_of_a_small_picture():
    """Steps 0 1 2 and 4 5 6 are visual, 3 is EOL. With S = 2, row 1 begins when pass 2 feeds 3."""
    order = zipar.order([image_schedule(2, 3)], N, 2)
    assert passes_of(order) == [[0], [1, 3], [2, 4], [5]]
    assert order.fed[0, :8].tolist() == [1, 2, 3, 2, 3, 4, NEVER, NEVER]
    # Token 4 is known from pass 2 on, but all before it only when token 2 is, which is in pass 2, too.
    assert order.certain[0, :5].tolist() == [1, 2, 5, 6, 7]
    assert order.reach[:5].tolist() == [0, 1, 4, 5, 6]


def test_the_order_with_the_smallest_and_the_largest_distance():
    assert passes_of(zipar.order([image_schedule(3, 3)], N, 1)) == [[0, 3], [1, 4, 7], [2, 5, 8], [6, 9]]
    whole = [[0], [1], [2, 3], [4], [5], [6, 7], [8], [9]]
    for ahead in (3, 4, 1000):
        assert passes_of(zipar.order([image_schedule(3, 3)], N, ahead)) == whole


def test_a_frame_of_a_clip_begins_when_the_one_before_is_complete():
    """Two frames of 2 x 2: 0 1 EOL 3 4 EOL EOF, 7 8 EOL 10 11 EOL EOF. With EOF, both forced tokens are fed at once."""
    order = zipar.order([clip_schedule(2, 2, 2)], N, 1)
    assert passes_of(order) == [[0, 2], [1, 3], [4, 5, 6], [7, 9], [8, 10]]


@pytest.mark.parametrize(("ahead", "passes"), [(7, 120), (5, 90), (3, 60), (1, 30), (16, 255), (17, 255)])
def test_the_passes_of_a_picture_of_the_embedded_model(ahead, passes):
    """Beside 270 of sequential decoding: the last token of each row waits for `ahead` passes per row above."""
    assert zipar.order([image_schedule(16, 16)], 320, ahead).passes.tolist() == [passes]


def test_rows_of_different_sizes_share_an_order():
    schedules = [image_schedule(2, 3), image_schedule(1, 1), image_schedule(4, 2)]
    order = zipar.order(schedules, N, 1)
    assert order.passes.tolist() == [3, 0, 4] and order.steps.shape[0] == 3
    for row, schedule in enumerate(schedules):
        assert passes_of(order, row) == passes_of(zipar.order([schedule], N, 1))


@pytest.mark.parametrize("schedule", [text_schedule(5), clip_schedule(2, 2, 3, "flat")])
def test_schedules_without_lines_are_refused(schedule):
    with pytest.raises(Emu3Error, match="rows of visual tokens that end with EOL"):
        zipar.order([image_schedule(2, 3), schedule], N, 2)


# ------------------------------------------------------------------------------------------------ the tokens


@pytest.mark.parametrize("name", ["guided", "clips"])
def test_with_whole_rows_the_tokens_are_the_sequential_ones(name):
    one, several = run(CASES[name]), run(CASES[name], zipar=5)
    np.testing.assert_array_equal(several.ids, one.ids)
    assert (several.passes <= one.passes).all() and several.passes.sum() < one.passes.sum()


def expected(case, row, ids, ahead, monkeypatch):
    """The token of each step by one forward pass of the whole sequence, in which a token sees what it may see."""
    prompt, schedule = case["prompts"][row], case["schedules"][row]
    order = zipar.order([schedule], bucket(len(schedule)), ahead)
    settings = case["settings"].take(np.asarray([row]))
    negative = (case["negatives"] or [None] * len(case["prompts"]))[row]
    logits = []
    for head in (prompt, negative or prompt):
        fed = np.concatenate([np.zeros(len(head), int), order.fed[0, : len(schedule)]])
        place = np.arange(len(fed))
        sees = (place[None] <= place[:, None]) & (fed[None] <= fed[:, None])

        def masked(q, k, v, *_, sees=sees):
            swapped = (jnp.swapaxes(x, 1, 2) for x in (k, v))
            return attention.placed_attention(q, *swapped, None, None, visible=jnp.asarray(sees)[None])

        monkeypatch.setattr(decoder, "self_attention", masked)
        whole = jnp.asarray([[*head, *ids[: len(schedule)]]])
        found, _ = jax.jit(Decoder(tiny.CONFIG).apply)({"params": tiny.params()}, whole)
        monkeypatch.undo()
        logits.append(found[:, len(head) - 1 : -1, tiny.TOKENS.visual_start : tiny.TOKENS.visual_end])
    variant = engine.Variant(True, negative is not None, True, True)
    none = np.zeros((1, 0), np.int32)
    plan = engine.Plan(
        forced=forced_ids(schedule[None], tiny.TOKENS), goal=np.zeros(1, np.int32), prompts=none, settings=settings
    )
    both = jnp.concatenate(logits if negative is not None else logits[:1])
    return np.asarray(choose(both, jnp.zeros(1, jnp.int32), plan, tiny.CONFIG, variant))[0]


# Pictures with more rows than one pass of the smallest distance computes, and nearly flat distributions, so that a key
# too many or too few changes tokens.
LARGE = {
    "prompts": [[17, 1, 2, 20, 19], [17, 20, 19], [17, *range(12), 20, 19]],
    "negatives": [[17, 20, 19], [17, 5, 6, 7, 20, 19], [17, 1, 20, 19]],
    "schedules": [image_schedule(9, 7), image_schedule(12, 5), image_schedule(10, 6)],
    "settings": tiny.settings(3, seed=[1, 2, 3], temperature=[2.0, 1.5, 2.5], guidance=[1.5, 1.2, 1.0]),
}


@pytest.mark.parametrize("case", [LARGE, CASES["clips"]], ids=["pictures", "clips"])
@pytest.mark.parametrize("ahead", [1, 2])
def test_the_tokens_are_those_of_the_tokens_that_they_see(case, ahead, monkeypatch):
    made = run(case, zipar=ahead)
    assert (made.ids != run(case).ids).any()  # it is lossy
    for row, schedule in enumerate(case["schedules"]):
        ids = made.ids[row, : len(schedule)]
        np.testing.assert_array_equal(ids, expected(case, row, ids, ahead, monkeypatch))
        order = zipar.order([schedule], bucket(len(schedule)), ahead)
        assert made.passes[row] == 1 + order.passes[0] and (made.ids[row, len(schedule) :] == tiny.TOKENS.pad).all()


@pytest.mark.parametrize("ahead", [1, 3])
def test_slots_may_hold_anything_before_they_are_fed(ahead):
    rows = tiny.rows(LARGE["prompts"], LARGE["schedules"], LARGE["negatives"])
    decoding = session.DecodeSession(tiny.params(), tiny.CONFIG, rows, LARGE["settings"], zipar=ahead)
    decoding.start()
    cache, width = decoding.state.cache, decoding.shapes.width

    def dirty(arrays):
        return tuple(
            a.at[:, :, width:].set(30 * jax.random.normal(jax.random.key(0), a.shape)[:, :, width:]) for a in arrays
        )

    cache = cache.replace(keys=dirty(cache.keys), values=dirty(cache.values))
    decoding.state = decoding.state.replace(cache=cache)
    _, ids = finish(decoding)
    np.testing.assert_array_equal(ids, run(LARGE, zipar=ahead).ids)


@pytest.mark.parametrize("name", ["guided", "clips"])
def test_rows_of_several_sizes_equal_those_alone(name):
    together = run(CASES[name], zipar=2)
    for row, schedule in enumerate(CASES[name]["schedules"]):
        alone = run(CASES[name], [row], zipar=2)
        np.testing.assert_array_equal(together.ids[row, : len(schedule)], alone.ids[0])
        assert together.passes[row] == alone.passes[0]


def test_a_mesh_gives_the_same():
    mesh = make_mesh("data=2,tensor=2")
    params = jax.device_put(tiny.params(), decoder_shardings(tiny.CONFIG, mesh))
    spread, alone = run(GUIDED, params=params, mesh=mesh, zipar=2), run(GUIDED, zipar=2)
    np.testing.assert_array_equal(spread.ids, alone.ids)
    np.testing.assert_array_equal(spread.passes, alone.passes)


def test_a_narrow_cache_gives_the_sequential_tokens_too():
    options = {"params": quantise_params(tiny.params(), "int8"), "narrow_cache": True}
    np.testing.assert_array_equal(run(GUIDED, zipar=9, **options).ids, run(GUIDED, **options).ids)


def test_a_narrow_cache_on_a_mesh_gives_the_same():
    mesh = make_mesh("data=2,tensor=2")
    params = jax.device_put(tiny.params(), decoder_shardings(tiny.CONFIG, mesh))
    options = {"narrow_cache": True, "zipar": 2}
    np.testing.assert_array_equal(run(GUIDED, params=params, mesh=mesh, **options).ids, run(GUIDED, **options).ids)


def test_growing_the_cache_and_short_calls_change_nothing(monkeypatch):
    whole = run(GUIDED, zipar=2)
    monkeypatch.setattr(shapes, "CACHE_GROWTH", 72)
    monkeypatch.setattr(session, "WIDE_PASSES_PER_CALL", 2)
    grown, progress = [], []
    grow = KVCache.grow
    monkeypatch.setattr(KVCache, "grow", lambda cache, slots: grown.append(slots) or grow(cache, slots))
    small = run(GUIDED, zipar=2, on_progress=lambda taken, steps: progress.append((taken, steps)))
    np.testing.assert_array_equal(small.ids, whole.ids)
    assert grown and progress[-1] == (15, 15)
    assert progress == sorted(progress) and len(progress) == 1 + -(-8 // 2)


def test_a_picture_of_one_token():
    case = {**GUIDED, "schedules": [image_schedule(1, 1)] * 4}
    made = run(case, zipar=1)
    np.testing.assert_array_equal(made.ids, run(case).ids)
    assert made.passes.tolist() == [1] * 4


def test_writes_go_to_their_slots_and_beyond_the_last_one_nowhere():
    cache = KVCache.create(tiny.CONFIG, jnp.asarray([0, 1]), 4)
    slots = jnp.asarray([[2, 0], [3, 4]])
    new = jnp.arange(1.0, 5.0).reshape(2, 1, 2, 1) * jnp.ones((2, 2, 2, tiny.CONFIG.head_dim))
    placed = cache.replace(placement=Placement(slots, jnp.ones((2, 2, 4), bool)))
    keys = placed.write(0, new, new).keys[0]
    assert keys[:, 0, :, 0].tolist() == [[2, 0, 1, 0], [0, 0, 0, 3]]
    assert placed.positions(2).tolist() == [[2, 0], [2, 3]]


# ------------------------------------------------------------------------------------------------ the options


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "3", 100_001, pytest.param(10**5000, id="huge")])
def test_numbers_that_are_not_legal(value):
    with pytest.raises(Emu3Error, match=r"zipar is .*: it must be None, or a whole number from 1 to 100000: "):
        Batching(zipar=value)
    with pytest.raises(Emu3Error, match=r"zipar.*a whole number from 1 to 100000: "):
        EvaluateConfig("out", zipar=value)


@pytest.mark.parametrize("make", [Batching, lambda **options: EvaluateConfig("out", **options)])
def test_zipar_and_parallel_do_not_go_together(make):
    with pytest.raises(Emu3Error, match=r"zipar is 3 and parallel is 8: .*leave one of the two out"):
        make(zipar=3, parallel=8)
    assert make(zipar=3, parallel="off").zipar == make(zipar=3, parallel="auto").zipar == 3
    assert EvaluateConfig("out", zipar=3).sampling["zipar"] == 3


def test_answers_are_refused():
    with pytest.raises(Emu3Error, match="texts have none"):
        run(MIXED, zipar=3)


def test_the_command(here, capsys):
    assert command("generate", "a", "b", "--zipar", 2, "--json", "--save-tokens", *OPTIONS) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["zipar"] for line in lines] == [2, 2] and [line["passes"] for line in lines] == [1 + 3 + 3 * 2] * 2
    assert command("generate", "a", "b", "--zipar", 4, "--json", "--save-tokens", *OPTIONS, "-o", "whole") == 0
    assert command("generate", "a", "b", "--json", "--save-tokens", *OPTIONS, "-o", "exact") == 0
    *_, whole, _, exact = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert whole["passes"] == 16 < exact["passes"] and "zipar" not in exact
    out, whole, exact = (np.load(here / place / "tokens.npz") for place in ("out", "whole", "exact"))
    for name in ("0", "1"):
        np.testing.assert_array_equal(whole[name], exact[name])
        assert len(out[name]) == len(exact[name])


def test_clips_by_the_command(here, capsys):
    options = ("--frames", 4, *OPTIONS)
    assert command("video", "a", "--zipar", 2, "--live", "live", *options) == 0
    assert command("video", "a", "--zipar", 100, *options, "-o", "whole") == 0
    assert command("video", "a", *options, "-o", "exact") == 0
    assert (here / "whole/000.webp").read_bytes() == (here / "exact/000.webp").read_bytes()
    assert (here / "out/000.webp").is_file() and len(list((here / "live/000").iterdir())) == 4


@pytest.mark.parametrize("verb", ["generate", "video"])
def test_bad_options(refused, verb):
    for value in ("0", "-1", "2.5", "x", "100001", "9" * 30):
        assert "is not a whole number from 1 to 100000: " in refused(verb, "a", "--zipar", value, *OPTIONS)
    line = refused(verb, "a", "--zipar", 3, "--parallel", 8, *OPTIONS)
    assert "zipar is 3 and parallel is 8" in line

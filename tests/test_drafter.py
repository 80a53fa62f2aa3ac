"""scripts/drafter.py: exact decoding with a trained drafter's guesses. It is an experiment, so these tests are few."""

import pathlib

import numpy as np
import pytest
import tiny

from emu3_jax.generation import session
from emu3_jax.generation.schedule import TokenClass, image_schedule

pytestmark = [pytest.mark.slow, pytest.mark.compiled_quickly]

SCRIPTS = pathlib.Path(__file__).parents[1] / "scripts"
SCHEDULE = image_schedule(3, 4)


@pytest.fixture(scope="module")
def drafter():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        import drafter

        yield drafter


@pytest.fixture(scope="module")
def model(drafter):
    return drafter.Model(tiny.CONFIG, tiny.params())


def rows(count):
    prompts = [[17, 1 + number % 4, *range(number % 3), 20, 19] for number in range(count)]
    return [session.Row(prompt, SCHEDULE, [17, 20, 19]) for prompt in prompts]


@pytest.fixture(scope="module")
def trained(drafter, model):
    examples = drafter.make_examples(model, rows(12), tiny.settings(12, guidance=2.0), 4)
    return drafter.train(model, examples, steps=60, batch=4, guidance=2.0, schedule=SCHEDULE, log=False)


@pytest.mark.parametrize(("window", "drafts"), [(4, 0), (4, 2), (6, 5)])
def test_the_tokens_are_the_sequential_ones(drafter, model, trained, window, drafts):
    settings = tiny.settings(3, guidance=2.0, seed=[91, 92, 93])
    truth = session.run(model.params, model.config, rows(3), settings)
    ids, passes = drafter.decode(model, trained, rows(3), settings, window, drafts)
    np.testing.assert_array_equal(ids, truth.ids)
    assert (passes <= truth.passes).all()
    if drafts == 0:  # the product's own guesses
        np.testing.assert_array_equal(
            passes, session.run(model.params, model.config, rows(3), settings, parallel=window).passes
        )


def test_right_guesses_settle_every_token(drafter, model, trained, monkeypatch):
    settings = tiny.settings(2, guidance=2.0, seed=[91, 92])
    truth = session.run(model.params, model.config, rows(2), settings)
    known, choose = np.pad(truth.ids, ((0, 0), (0, 64))), drafter.engine.choose

    def knowing(logits, step, *rest):  # the drafter's logits are those of one token per row
        return drafter.parallel.window(known, step, 1) if logits.shape[1] == 1 else choose(logits, step, *rest)

    monkeypatch.setattr(drafter.engine, "choose", knowing)
    ids, passes = drafter.decode(model, trained, rows(2), settings, 4, 3)
    np.testing.assert_array_equal(ids, truth.ids)
    sampled = int(
        np.flatnonzero(SCHEDULE == TokenClass.VISUAL)[-1]
    )  # steps after the first, up to the last sampled one
    assert passes.tolist() == [1 + -(-sampled // 4)] * 2


def test_training_brings_the_drafter_near_the_decoder(drafter, model, capsys):
    examples = drafter.make_examples(model, rows(4), tiny.settings(4, guidance=2.0), 4)
    drafter.train(model, examples, steps=51, batch=4, guidance=2.0, schedule=SCHEDULE)
    before, after = (
        float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if line.startswith("step")
    )
    assert after > before + 0.2

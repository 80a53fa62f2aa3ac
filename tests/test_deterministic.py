"""`deterministic`: in bfloat16 a row's tokens are the same beside any other rows, also on a mesh."""

import numpy as np
import pytest

import emu3_jax
from emu3_jax.errors import Emu3Error
from emu3_jax.generation import engine

PROMPTS = ["a red heart", "a blue cat", "three green trees that stand beside a river", "sun"]
EACH = {"ratio": ["1:1", "2:1", "1:1", "1:1"], "guidance": [3.0, 3.0, 3.0, 1.0], "temperature": [0.0, 1.0, 1.0, 0.0]}
SAME = {"area": 256, "batch_size": 4, "deterministic": True, "progress": False}


@pytest.fixture(scope="module")
def model():
    return emu3_jax.load(dtype="bfloat16")


def pictures(model, order):
    each = {name: [values[row] for row in order] for name, values in EACH.items()}
    made = model.generate_sequences([PROMPTS[row] for row in order], seed=[7 + row for row in order], **each, **SAME)
    return dict(zip(order, (generation.ids for generation in made), strict=True))


def compiled():
    return engine.prefill.jitted._cache_size(), engine.decode.jitted._cache_size()


@pytest.mark.slow
def test_pictures_are_the_same_alone_and_beside_others_in_any_place(model):
    _same_in_any_company(model, [0, 1, 2, 3], [3, 1, 2, 0], [2], [0], [0, 2], [3])


@pytest.mark.slow
def test_pictures_are_the_same_on_a_mesh():
    _same_in_any_company(emu3_jax.load(dtype="bfloat16", mesh="data=2,tensor=2"), [0, 1, 2], [2, 0], [2], [1])


def _same_in_any_company(model, all_rows, *orders):
    together = pictures(model, all_rows)
    programs = compiled()
    for order in orders:
        for row, ids in pictures(model, order).items():
            np.testing.assert_array_equal(ids, together[row])
    assert compiled() == programs  # whatever the number of rows


@pytest.mark.slow
def test_clips_are_the_same_alone_and_beside_others(model):
    def clips(*rows):
        seeds = [7 + row for row in rows]
        return model.generate_clips([PROMPTS[row] for row in rows], frames=9, seed=seeds, **SAME)

    one, two = clips(0, 2)
    for together, (alone,) in ((one, clips(0)), (two, clips(2))):
        np.testing.assert_array_equal(together.frames, alone.frames)


def test_answers_are_the_same_alone_and_beside_others(model):
    shown = [np.full((32, 32, 3), level, np.uint8) for level in (0, 128, 255)]
    options = {"max_new_tokens": 8, "batch_size": 4, "deterministic": True, "progress": False}
    answers = model.chat(shown, ["what is it?", "which colour?", "what is it?"], **options)
    assert answers[2:] == model.chat(shown[2], "what is it?", **options)
    assert answers[1:2] == model.chat(shown[1], "which colour?", **options)


@pytest.mark.parametrize("size", [0, 4097, 10**9, 2.0])
def test_batches_are_bounded(model, size):
    with pytest.raises(Emu3Error, match="must be a whole number from 1 to 4096"):
        model.generate("a", batch_size=size, progress=False)

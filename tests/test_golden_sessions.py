"""The decode session compiled as for users: golden sequences, independent rows, no copies of the cache."""

import re

import numpy as np
import pytest
import tiny
from conftest import golden_json, golden_npz
from session_cases import MIXED, mixed_rows, run_rows, started
from session_cases import run as run_case

from emu3_jax.generation import session
from emu3_jax.generation.schedule import image_schedule, text_schedule
from emu3_jax.text.prompts import generation_prompt


@pytest.fixture(scope="module")
def golden():
    return golden_npz("generate.npz")


@pytest.mark.parametrize("name", ["square", "wide"])
def test_golden_greedy_pictures_under_guidance(name, golden, golden_model):
    case = golden_json("prompts.json")["generate"][name]
    language = golden_model.language
    height, width = golden[f"{name}/image_size"][0]
    prompt, negative = (
        generation_prompt(language.tokenizer, language.config.tokens, text, height, width)
        for text in (case["text"][0], case["negative"])
    )
    length = int(golden[f"{name}/prompt_length"])
    sequence = golden[f"{name}/sequences"][0]
    assert prompt == sequence[:length].tolist()
    ids = session.run(
        language.params,
        language.config,
        [session.Row(prompt, image_schedule(height, width), negative)],
        tiny.settings(1, temperature=0.0, guidance=case["guidance"]),
    ).ids
    np.testing.assert_array_equal(ids[0], sequence[length:])


@pytest.mark.parametrize(("name", "case"), [("describe", 0), ("batch", 1)])
def test_golden_greedy_answers_alone_and_batched(name, case, golden, golden_model):
    prompt = golden_json("text.json")["understanding_prompt"][case]
    rows = [
        [token for token, real in zip(ids, mask, strict=True) if real]
        for ids, mask in zip(prompt["input_ids"], prompt["attention_mask"], strict=True)
    ]
    language = golden_model.language
    settings = tiny.settings(len(rows), temperature=0.0)
    rows = tiny.rows(rows, [text_schedule(24)] * len(rows))
    ids = session.run(language.params, language.config, rows, settings).ids
    np.testing.assert_array_equal(ids, golden[f"{name}/sequences"][:, int(golden[f"{name}/prompt_length"]) :])


def test_a_row_does_not_depend_on_its_batch_mates():
    together = run_rows([0, 1, 2, 3])
    for row, schedule in enumerate(mixed_rows()[2]):
        alone = run_rows([row])[0]
        np.testing.assert_array_equal(together[row, : len(schedule)], alone)
        assert (together[row, len(schedule) :] == tiny.TOKENS.pad).all()
    np.testing.assert_array_equal(run_rows([3, 1, 0, 2])[2, :18], together[0, :18])


def test_the_cache_is_donated_and_never_copied():
    rows = [session.Row([17, 20, 19], image_schedule(7, 7))] * 2
    decoding = session.DecodeSession(tiny.params(), tiny.CONFIG, rows, tiny.settings(2))
    decoding.start()
    state = decoding.state
    text = decoding.lower_decode(state.cache.slots).compile().as_text()
    shape = ",".join(map(str, state.cache.keys[0].shape))
    assert f"[{shape}]" in text and not re.search(rf"= \(?\w+\[{shape}\]\S* copy(-start)?\(", text)
    decoding.advance(2)
    assert all(leaf.is_deleted() for leaf in (*state.cache.keys, *state.cache.values))
    assert decoding.state.cache.length.tolist() == [decoding.shapes.width + 2] * 2


def test_parallel_decoding_gives_the_sequential_tokens():
    one, several = run_case(MIXED), run_case(MIXED, parallel=5)
    np.testing.assert_array_equal(several.ids, one.ids)
    assert (several.passes <= one.passes).all() and several.passes.sum() < one.passes.sum()


@pytest.mark.parametrize("parallel", ["off", 4])
def test_rows_of_all_kinds_equal_those_alone(parallel):
    together = run_case(MIXED, parallel=parallel).ids
    for row, schedule in enumerate(MIXED["schedules"]):
        np.testing.assert_array_equal(together[row, : len(schedule)], run_case(MIXED, [row], parallel=parallel).ids[0])
        assert (together[row, len(schedule) :] == tiny.TOKENS.pad).all()


def test_the_cache_of_rows_of_all_ages_is_never_copied():
    decoding = started(4, image_schedule(7, 7))
    state = decoding.state
    text = decoding.lower_decode(state.cache.slots).compile().as_text()
    shape = ",".join(map(str, state.cache.keys[0].shape))
    assert f"[{shape}]" in text and not re.search(rf"= \(?\w+\[{shape}\]\S* copy(-start)?\(", text)

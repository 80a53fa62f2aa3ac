"""Guesses of free text by prompt lookup: equal to a plain search, and right for a text that copies."""

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from emu3_jax.generation import session
from emu3_jax.generation.lookup import MOST_MATCHED, look_up
from emu3_jax.generation.schedule import clip_schedule, text_schedule

pytestmark = pytest.mark.compiled_quickly

ROOM = 24
LOOK_UP = jax.jit(look_up, static_argnums=2)


def searched(text: list[int], count: int) -> list[int] | None:
    """The guesses after `text`, by a plain search, or None if its last token did not occur before."""
    for matched in range(MOST_MATCHED, 0, -1):
        for end in range(len(text) - 1, matched - 1, -1):  # the latest place first
            if text[end - matched : end] == text[-matched:]:
                copied = list(text)
                for index in range(count):
                    copied.append(copied[end + index])
                return copied[len(text) :]
    return None


@settings(max_examples=300)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=ROOM), min_size=2, max_size=2))
def test_look_up_equals_a_plain_search(texts):
    history = np.full((2, ROOM), 3, np.int32)  # what follows a text could be matched, and must not be
    for row, text in zip(history, texts, strict=True):
        row[: len(text)] = text
    guesses, found = LOOK_UP(history, np.asarray([len(text) for text in texts], np.int32), 7)
    for text, guessed, there in zip(texts, guesses.tolist(), found.tolist(), strict=True):
        expected = searched(text, 7)
        assert there == (expected is not None)
        if there:
            assert guessed == expected


def copying_params(follows: dict[int, int]):
    """Parameters of a decoder that reads only the current token, and whose likeliest next one is `follows[token]`."""
    config = tiny.CONFIG
    params = jax.tree.map(np.zeros_like, tiny.params())
    table = np.eye(config.vocab_size, config.hidden_size, dtype=np.float32)
    head = np.zeros_like(table)
    for token, following in follows.items():
        head[following] = table[token]
    return {
        **params, "embed": {"embedding": table}, "norm": {"scale": np.ones(config.hidden_size, np.float32)},
        "head": {"kernel": head},
    }  # fmt: skip


@pytest.mark.parametrize("window", [4, 8])
@pytest.mark.parametrize("given_once", [True, False])
def test_a_text_that_copies_takes_few_passes(window, given_once):
    """A text with a period of ten tokens: only with lookup does a pass settle more than one token."""
    params, steps, period = copying_params({token: (token + 1) % 10 for token in range(10)}), 50, 10
    prompt = [tiny.TOKENS.bos, *(range(period) if given_once else []), 0]
    rows = [session.Row(prompt, text_schedule(steps))]
    found = session.run(params, tiny.CONFIG, rows, tiny.settings(1, temperature=0.0), parallel=window)
    assert found.ids[0].tolist() == [(1 + step) % period for step in range(steps)]
    alone = 1 if given_once else period  # the first token comes from prefill; the rest of an unknown period, one by one
    assert found.passes.tolist() == [alone + -(-(steps - alone) // window)]


def test_rows_that_are_not_text_keep_their_guesses():
    """A clip takes as many passes beside a text as without it, where it is compiled without lookup."""
    clip, text = session.Row([17, 1, 20, 19], clip_schedule(3, 2, 3)), session.Row([17, 1, 2, 1, 2], text_schedule(30))
    alone = session.run(tiny.params(), tiny.CONFIG, [clip], tiny.settings(1), parallel=4)
    both = session.run(tiny.params(), tiny.CONFIG, [clip, text], tiny.settings(2), parallel=4)
    np.testing.assert_array_equal(both.ids[0, : len(clip.schedule)], alone.ids[0])
    assert both.passes[0] == alone.passes[0]

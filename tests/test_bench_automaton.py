"""`bench decode --automaton`: the loop of `interleave` that it times is within pictures."""

import json

import numpy as np
import pytest
import tiny

from emu3_jax.benchmarks import decode
from emu3_jax.benchmarks.automaton import Interleaved
from emu3_jax.cli.main import main
from emu3_jax.generation.grammar import PICTURE, Grammar

TINY = Grammar.of(tiny.CONFIG, range(1, 11), 11)
pytestmark = pytest.mark.compiled_quickly


@pytest.mark.parametrize("window", [1, 4])
def test_the_timed_rows_are_within_pictures(window):
    side, head, step = 6, len("6*6") + 2, 10
    rows = Interleaved(tiny.params(), tiny.CONFIG, 2, side, prompt=16, slots=80, window=window)
    for _ in range(2):  # each run begins at the same place
        assert rows.timed(step, 5) > 0
        state = rows._state
        assert state.passes.tolist() == [5, 5] and (state.step >= step + 5).all()
        # BOI, the size and IMG are before the picture's own tokens.
        np.testing.assert_array_equal(state.grammar.at, state.step - head)
        np.testing.assert_array_equal(state.cache.length, np.tile(16 + state.step - 1, 2))
        assert (state.grammar.mode == PICTURE).all() and not state.ended.any()
        if window == 1:
            ids = np.asarray(state.tokens[:, step : step + 5])
            lines = (np.arange(step, step + 5) - head) % (side + 1) == side
            assert ((ids == tiny.TOKENS.eol) == lines).all() and lines.any()
    rows.timed(step, 1000)
    goal = TINY.picture_length(side, side)
    assert (rows._state.step == goal).all() and (rows._state.tokens[:, goal - 1] == tiny.TOKENS.eoi).all()
    assert rows.automaton() > 0


@pytest.mark.slow
def test_its_figures(capsys, monkeypatch):
    monkeypatch.setitem(decode.PRESETS, "small", tiny.CONFIG)
    options = ("--preset", "small", "--steps", "2", "--area", "1024", "--parallel", "4", "--mesh", "tensor=2")
    assert main(["bench", "decode", *options, "--automaton"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    last = lines[-1]
    assert last["parallel"] == 4 and last["static_ms_per_pass"] > 0 and last["interleaved_ms_per_pass"] > 0
    assert last["automaton_ms"] > 0 and 0 <= last["automaton_share"] < 1

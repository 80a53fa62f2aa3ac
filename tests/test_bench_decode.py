"""`bench decode`: the steps that it times are steps that the device takes."""

import numpy as np
import pytest
import tiny

from emu3_jax.benchmarks import decode
from emu3_jax.cli.main import main

pytestmark = pytest.mark.compiled_quickly


def test_timed_steps_end_with_the_picture(monkeypatch):
    """The last stage of the cache can be shorter than the steps to time. The device stops at the picture's end."""
    monkeypatch.setitem(decode.PRESETS, "small", tiny.CONFIG)
    time, taken = decode._timed, []

    def timed(decoding, first, steps):
        seconds = time(decoding, first, steps)
        taken.append((steps, int(np.max(decoding.state.step)) - first))
        return seconds

    monkeypatch.setattr(decode, "_timed", timed)
    for steps in ("3", "1000"):
        assert main(["bench", "decode", "--preset", "small", "--area", "1024", "--steps", steps]) == 0
    assert all(asked == steps for asked, steps in taken) and {asked for asked, _ in taken} > {3}

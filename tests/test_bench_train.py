"""`bench train`: both sides run and their figures are consistent."""

import dataclasses
import json

import numpy as np
import pytest
import tiny

from emu3_jax.benchmarks import train, train_transformers
from emu3_jax.cli.main import main
from emu3_jax.training.flops import step_flops


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch):
    monkeypatch.setitem(train.PRESETS, "small", dataclasses.replace(tiny.CONFIG, dtype="bfloat16"))


def lines(capsys, *arguments):
    assert main(["bench", "train", "--preset", "small", "--tokens", "16", "--steps", "1", *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    "arguments", [("--rows", "2", "--mesh", "fsdp=2"), ("--adapter", "2", "--base", "nf4", "--mesh", "fsdp=1")]
)
def test_our_side(capsys, arguments):
    head, figures = lines(capsys, *arguments)
    assert head["layers"] == 2 and figures["ms_per_step"] > 0
    rows = 2 if "--rows" in arguments else 1
    assert figures["tokens_per_second"] == pytest.approx(rows * 16 / figures["ms_per_step"] * 1e3, rel=0.1)


def test_the_peer():
    plain, chunked = train_transformers.run(tiny.CONFIG, 16, 1, 0, 1)
    assert plain["ms_per_step"] > 0 and "chunked" in chunked["program"]


def test_rates():
    flops = step_flops(tiny.CONFIG, 16, 136)
    assert train.rates(500.0, 16, flops, 4 * flops) == {
        "tokens_per_second": 32,
        "model_tflops": round(2 * flops / 1e12, 1),
        "mfu": 0.5,
    }
    assert "mfu" not in train.rates(500.0, 16, flops, np.nan)

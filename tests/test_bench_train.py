"""`bench train`: both sides run and their figures are consistent."""

import dataclasses
import json

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny

from emu3_jax.benchmarks import peer, train, train_transformers, train_transformers_fsdp
from emu3_jax.cli.main import main
from emu3_jax.errors import Emu3Error
from emu3_jax.models.adapters import Adapter, dequantise_matrix
from emu3_jax.models.decoder import Decoder
from emu3_jax.training.flops import step_flops

pytestmark = pytest.mark.compiled_quickly


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch):
    monkeypatch.setitem(train.PRESETS, "small", dataclasses.replace(tiny.CONFIG, dtype="bfloat16"))


def lines(capsys, *arguments):
    assert main(["bench", "train", "--preset", "small", "--tokens", "16", "--steps", "1", *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--rows", "2", "--mesh", "fsdp=2"),
        ("--adapter", "2", "--base", "nf4", "--remat", "none", "--unroll", "2", "--mesh", "fsdp=1"),
    ],
)
@pytest.mark.slow
def test_our_side(capsys, arguments):
    head, figures = lines(capsys, *arguments)
    assert head["layers"] == 2 and figures["ms_per_step"] > 0
    assert np.isfinite(figures["losses"]).all()
    rows = 2 if "--rows" in arguments else 1
    assert figures["tokens_per_second"] == pytest.approx(rows * 16 / figures["ms_per_step"] * 1e3, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["stored", "adapters_off"])
def test_preference_pairs(reference):
    arguments = {"tokens": 16, "rows": 4, "adapter": 2, "mesh": "fsdp=2", "steps": 1, "preference": reference}
    _, figures = train.run("small", **arguments)
    assert figures["preference"] == reference and np.isfinite(figures["losses"]).all()
    if reference == "adapters_off":  # adapters start without effect, so the margin is 0
        knows_nothing = np.log(2) + 0.1 * np.log(tiny.CONFIG.vocab_size)
        assert figures["losses"][0] == pytest.approx(knows_nothing, rel=0.05)


def test_preference_pairs_need_pairs_of_rows():
    with pytest.raises(Emu3Error, match="rows is 1: preference pairs have two rows each"):
        next(train.run("small", tokens=16, preference="stored"))


@pytest.mark.oracle
def test_the_peer():
    plain, chunked = train_transformers.run(tiny.CONFIG, tokens=16, rows=1, rank=0, steps=1)
    assert plain["ms_per_step"] > 0 and "chunked" in chunked["program"]
    # Random weights give about the same loss as knowing nothing, however it is computed.
    for figures in (plain, chunked):
        np.testing.assert_allclose(figures["losses"], np.log(tiny.CONFIG.vocab_size), rtol=0.1)


@pytest.mark.oracle
@pytest.mark.multiprocess
@pytest.mark.slow
def test_the_peer_on_two_devices():
    chunked, plain = train_transformers_fsdp.run(tiny.CONFIG, devices=2, tokens=16, rows=2, steps=1)
    assert "chunked" in chunked["program"] and plain["ms_per_step"] > 0 and plain["devices"] == 2
    for figures in (chunked, plain):
        np.testing.assert_allclose(figures["losses"], np.log(tiny.CONFIG.vocab_size), rtol=0.1)


def test_a_mesh_of_two_devices_chooses_the_sharded_peer(monkeypatch):
    asked = {}

    def answering(module, decoder, **options):
        asked.update(options, module=module)
        yield {"program": "transformers, FSDP2", "device": "NVIDIA H200", "ms_per_step": 3.0}

    monkeypatch.setattr(peer, "require", lambda *packages: None)
    monkeypatch.setattr(peer, "in_a_process", answering)
    monkeypatch.setattr(train, "_measure", lambda *arguments: {"ms_per_step": 2.0, "devices": 2})
    theirs, _, ours = train.run("small", tokens=16, rows=2, mesh="data=1,fsdp=2", steps=1, compare="transformers")
    assert (asked["module"], asked["devices"], asked["rows"]) == ("train_transformers_fsdp", 2, 2)
    whole = train.rates(3.0, 32, step_flops(tiny.CONFIG, 32, 2 * 136), 2 * 989e12)
    assert theirs.items() >= whole.items() and ours["speedup"] == 1.5


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"rows": 2, "adapter": 2}, "mesh fsdp=2: compare trains adapters on one"),
        ({"rows": 3}, "rows is 3: compare needs a multiple of the 2"),
    ],
)
def test_the_sharded_peer_refuses(monkeypatch, arguments, error):
    monkeypatch.setattr(peer, "require", lambda *packages: None)
    with pytest.raises(Emu3Error, match=error):
        next(train.run("small", tokens=16, mesh="fsdp=2", compare="transformers", **arguments))


def test_a_missing_package_stops_at_once(monkeypatch):
    monkeypatch.setattr(peer.importlib.util, "find_spec", lambda name: None if name == "peft" else name)
    with pytest.raises(Emu3Error, match="pip install peft"):
        next(train.run("small", tokens=16, adapter=2, compare="transformers"))


def test_ours_come_though_the_peer_fails(monkeypatch):
    def failing(*arguments, **named):
        yield {"program": "transformers", "device": "NVIDIA H100", "ms_per_step": 1.0}
        raise Emu3Error("the peer failed")

    monkeypatch.setattr(peer, "require", lambda *packages: None)
    monkeypatch.setattr(peer, "in_a_process", failing)
    monkeypatch.setattr(train, "_measure", lambda *arguments: {"ms_per_step": 1.0, "devices": 1})
    figures = train.run("small", tokens=16, mesh="fsdp=1", steps=1, compare="transformers")
    assert next(figures)["mfu"] >= 0
    assert next(figures)["bench"] == "train"
    assert next(figures)["program"] == "emu3-jax"
    with pytest.raises(Emu3Error, match="the peer failed"):
        next(figures)


@pytest.mark.parametrize("base", ["bfloat16", "int8", "nf4"])
def test_frozen_weights_are_random(base):
    """Patterns would flatter the time: each layer's weights differ, and are about as large as real ones."""
    config = dataclasses.replace(tiny.CONFIG, dtype="bfloat16")
    adapter = Adapter(rank=2, base=base)
    shapes = nn.unbox(
        jax.eval_shape(Decoder(config, stacked=True, adapter=adapter).init, jax.random.key(0), np.zeros((1, 1), int))
    )
    gate_up = {k: v for k, v in shapes["params"]["layers"]["mlp"].items() if not k.endswith(("_a", "_b"))}
    key = jax.random.key(0)
    drawn = {k: train._random_leaf(k, v.shape, v.dtype, key) for k, v in gate_up.items()}
    assert {k: (v.shape, v.dtype) for k, v in drawn.items()} == {k: (v.shape, v.dtype) for k, v in gate_up.items()}
    weights = (
        dequantise_matrix("gate_up", drawn["gate_up_q"], drawn["gate_up_scale"], base)
        if adapter.quantised
        else drawn["gate_up"]
    )
    weights = np.asarray(weights, np.float32)
    assert 0.01 < weights.std() < 0.04 and abs(np.corrcoef(weights[0].ravel(), weights[1].ravel())[0, 1]) < 0.1


def test_rates():
    flops = step_flops(tiny.CONFIG, 16, 136)
    assert train.rates(500.0, 16, flops, 4 * flops) == {
        "tokens_per_second": 32,
        "model_tflops": round(2 * flops / 1e12, 1),
        "mfu": 0.5,
    }
    assert "mfu" not in train.rates(500.0, 16, flops, np.nan)

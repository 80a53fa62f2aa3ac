"""The step: the same on every mesh and however accumulated; dropout, noise and figures."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
import tiny

from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.records import Record
from emu3_jax.data.sequences import NextFrame, TextOnly, TokenSequence, padded_row
from emu3_jax.models.adapters import Adapter
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.rules import use_mesh
from emu3_jax.text.prompts import CHAT
from emu3_jax.training.config import ModelConfig, OptimizerConfig, TrainConfig
from emu3_jax.training.flops import matrix_weights, peak_flops, step_flops
from emu3_jax.training.host_rows import HostRows
from emu3_jax.training.step import Trainer

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.slow]

ROWS, LENGTH = 8, 16
CONFIG = TrainConfig(
    directory="",
    model=ModelConfig("", tiny.CONFIG, random=True, dtype="float32"),
    data=DataConfig((Source("", TextOnly()),), LENGTH),
    batch_size=ROWS,
    steps=10,
    optimizer=OptimizerConfig(learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=1),
    vision_weight=0.5,
)


def batch():
    """Packed rows with padding; some tokens are no targets."""
    rng = np.random.default_rng(0)
    segments = np.repeat(np.asarray([[1] * 6 + [2] * 8 + [0] * 2]), ROWS, axis=0).astype(np.int32)
    return {
        "tokens": rng.integers(0, 32, (ROWS, LENGTH)).astype(np.int32),
        "segment_ids": segments,
        "positions": np.tile(np.asarray([*range(6), *range(8), 0, 1], np.int32), (ROWS, 1)),
        "loss_mask": (rng.random((ROWS, LENGTH)) < 0.8) & (segments > 0),
    }


class Letters:
    """A tokenizer of `tiny.TOKENS`, for captions and sizes: a character is one of the 16 ids of text."""

    special = tiny.TOKENS

    def encode(self, text, allow_special=False):
        return [ord(letter) % 16 for letter in text]


def clips():
    """Rows of two clips each, of 2x2x2 and 1x2x3 codes, as next frames; at 48 tokens there is some padding."""
    rng, task, rows = np.random.default_rng(0), NextFrame(loss="all", eos=True), []
    for _ in range(ROWS):
        made = [
            task.sequence(Record("", "up", rng.integers(0, 8, shape)), Letters(), CHAT)
            for shape in ((2, 2, 2), (1, 2, 3))
        ]
        parts = [padded_row(sequence, len(sequence), tiny.TOKENS.pad) for sequence in made]
        parts[1]["segment_ids"] *= 2
        rest = padded_row(TokenSequence(np.zeros(0, np.int32), np.zeros(0, bool)), 48 - sum(map(len, made)), 16)
        rows.append({name: np.concatenate([part[name] for part in (*parts, rest)]) for name in rest})
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@functools.cache
def trainer_of(config, mesh):
    """One for all runs of a config on a mesh: its programs are compiled once."""
    return Trainer(config, tiny.CONFIG, mesh)


def run(config=CONFIG, mesh="fsdp=1", steps=3, batch=batch):
    """Metrics of some steps, and the parameters after them."""
    mesh = make_mesh(mesh)
    trainer = trainer_of(config, mesh)
    with use_mesh(mesh):
        state, metrics = trainer.initial_state(), []
        rows = HostRows(mesh, ROWS)
        for _ in range(steps):
            state, figures = trainer.step(state, {}, rows.spread(batch()))
            metrics.append({name: float(value) for name, value in figures.items()})
        sums = trainer.evaluate(state.params, {}, rows.spread(batch()))
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == trainer.state_shardings
    return metrics, jax.tree.map(np.asarray, state), sums


@pytest.fixture(scope="module")
def plain():
    return run()


@pytest.fixture(scope="module")
def untouched():
    """What a plain evaluation of the initial parameters finds."""
    return run(steps=0)[2]


@pytest.mark.parametrize(
    ("mesh", "accumulation"),
    [
        ("fsdp=1", 4),
        ("data=8", 1),
        ("fsdp=4", 2),
        ("data=2,fsdp=2,sequence=2", 1),
        ("tensor=2", 1),
        ("data=2,fsdp=2,tensor=2", 2),
        ("fsdp=2,sequence=2,tensor=2", 1),
    ],
)
def test_meshes_and_accumulation_change_nothing(plain, mesh, accumulation):
    metrics, state, sums = run(dataclasses.replace(CONFIG, accumulation=accumulation), mesh)
    for found, wanted in zip(metrics, plain[0], strict=True):
        assert found.keys() == wanted.keys()
        np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=2e-5)
    # Adam divides by the gradient's own size: where that is rounding, so is the direction of the step.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), state.params, plain[1].params)
    np.testing.assert_allclose(tiny.mean_loss(sums), tiny.mean_loss(plain[2]), rtol=1e-4)
    np.testing.assert_array_equal(state.key, plain[1].key)


@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2", "fsdp=4,sequence=2"])
def test_muon_is_the_same_on_meshes(mesh):
    config = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, algorithm="muon"))
    (metrics, state, _), (alone, alone_state, _) = run(config, mesh), run(config)
    assert alone[-1]["loss"] < alone[0]["loss"]
    for found, wanted in zip(metrics, alone, strict=True):
        np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-4), state.params, alone_state.params)


def test_clips_over_the_sequence():
    """Packed clips whose frames lie on several devices. Two KV heads to four devices: each goes to two."""
    metrics, state, sums = run(steps=2, batch=clips)
    split, split_state, split_sums = run(mesh="fsdp=2,sequence=4", steps=2, batch=clips)
    for found, wanted in zip(split, metrics, strict=True):
        np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=2e-5)
    assert metrics[0]["loss_vision"] > 0 and metrics[0]["tokens"] < ROWS * 48
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), split_state.params, state.params)
    np.testing.assert_allclose(tiny.mean_loss(split_sums), tiny.mean_loss(sums), rtol=1e-4)


@pytest.mark.parametrize("fields", [{"dropout": 0.3}, {"noise": 1.0}])
def test_dropout_and_noise(plain, untouched, fields):
    """They change the training, and each step of it anew, the same on any mesh; never the evaluation."""
    still = dataclasses.replace(CONFIG.optimizer, learning_rate=1e-12, final_learning_rate=0.0)
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, **fields), optimizer=still)
    metrics, _, sums = run(config)
    losses = [figures["loss"] for figures in metrics]
    clean = plain[0][0]["loss"]
    assert all(abs(a - b) > 1e-4 * clean for a, b in itertools.combinations([*losses, clean], 2))
    other, _, evaluated = run(config, "data=2,fsdp=2,tensor=2")
    np.testing.assert_allclose([figures["loss"] for figures in other], losses, rtol=2e-5)
    np.testing.assert_allclose(tiny.mean_loss(evaluated), tiny.mean_loss(sums), rtol=1e-5)
    accumulated, _, evaluated = run(dataclasses.replace(config, accumulation=2))
    assert all(np.isfinite(figures["loss"]) for figures in accumulated)
    for found in (sums, evaluated):
        np.testing.assert_allclose(tiny.mean_loss(found), tiny.mean_loss(untouched), rtol=1e-5)


def test_noise_is_for_visual_tokens():
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, noise=1.0))
    noisy = Trainer(config, tiny.CONFIG, make_mesh("fsdp=1"))._noisy
    rng, special = np.random.default_rng(0), tiny.CONFIG.tokens
    tokens = rng.integers(0, special.visual_end, (400, 200)).astype(np.int32)
    targets = rng.random(tokens.shape) < 0.5
    found = np.asarray(noisy(tokens, targets, jax.random.key(0)))
    visual = (tokens >= special.visual_start) & (tokens < special.visual_end)
    np.testing.assert_array_equal(found[~visual], tokens[~visual])
    assert ((found >= special.visual_start) & (found < special.visual_end))[visual].all()
    changed = np.sum((found != tokens) & visual, axis=1) / visual.sum(axis=1)
    kept = 1 - 1 / special.visual_count  # a random token may be the same
    assert abs(changed.mean() - kept / 3) < 0.04 and changed.max() > 0.9 * kept and np.median(changed) < 0.3
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, noise_in="targets"))
    noisy = Trainer(config, tiny.CONFIG, make_mesh("fsdp=1"))._noisy
    in_targets = np.asarray(noisy(tokens, targets, jax.random.key(0)))
    np.testing.assert_array_equal(in_targets, np.where(targets, found, tokens))
    # "auto": all visual tokens of a row without visual targets.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, noise_in="auto"))
    noisy = Trainer(config, tiny.CONFIG, make_mesh("fsdp=1"))._noisy
    targets[::2] &= ~visual[::2]
    by_row = np.asarray(noisy(tokens, targets, jax.random.key(0)))
    np.testing.assert_array_equal(by_row[::2], found[::2])
    np.testing.assert_array_equal(by_row[1::2], in_targets[1::2])


def test_metrics(plain):
    first, second, _ = plain[0]
    sent = batch()
    targets = sent["loss_mask"][:, 1:].sum()
    visual = (sent["loss_mask"] & (sent["tokens"] >= 24))[:, 1:].sum()
    assert first["targets"] == targets and first["tokens"] == 14 * ROWS and first["attended"] == (21 + 36) * ROWS
    expected = (first["loss_text"] * (targets - visual) + 0.5 * first["loss_vision"] * visual) / targets
    np.testing.assert_allclose(first["loss"], expected, rtol=1e-5)
    assert first["learning_rate"] == 0 and second["learning_rate"] == np.float32(1e-2)
    assert first["loss"] == second["loss"] > plain[0][2]["loss"]
    assert plain[1].step == 3


def test_only_adapters_have_an_optimiser_state():
    config = dataclasses.replace(CONFIG, adapter=Adapter(rank=2), model=dataclasses.replace(CONFIG.model, random=False))
    trainer = Trainer(config, tiny.CONFIG, make_mesh("fsdp=1"))
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(trainer.abstract_state().params)}
    assert names == {f"{matrix}_{side}" for matrix in ("qkv", "out", "gate_up", "down") for side in "ab"}
    frozen = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(trainer.abstract_frozen())}
    assert frozen == {"embedding", "kernel", "qkv", "out", "gate_up", "down", "scale"}


def test_flops_of_the_published_model():
    from emu3_jax.config import DecoderConfig

    config = DecoderConfig()
    weights = 32 * (4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 184622 * 4096
    assert matrix_weights(config) == weights
    assert step_flops(config, 10, 0) == 60 * weights and step_flops(config, 10, 0, frozen=True) == 40 * weights
    assert step_flops(config, 0, 55) == 12 * 32 * 4096 * 55
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and peak_flops("TPU v5 lite") == 197e12
    assert np.isnan(peak_flops("cpu"))

"""Training by GRPO: the policy is the one that was sampled; it learns, resumes exactly, and names bad rewards."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from grpo_runs import change, compare_policy_with_sampler, job, lines

from emu3_jax import Emu3Error, train
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.data.config import DataConfig
from emu3_jax.models.adapters import Adapter
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.rules import use_mesh
from emu3_jax.training import runner
from emu3_jax.training.config import ModelConfig, OptimizerConfig, TrainConfig
from emu3_jax.training.grpo_config import GrpoConfig

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.slow, pytest.mark.usefixtures("shared_trainers")]

STEPS, LENGTH = 14, 48
REWARDS = """
import os, time
import numpy as np

def red(prompts, pictures):
    return [float(picture[..., 0].mean() - picture[..., 2].mean()) for picture in pictures]

def raises(prompts, pictures):
    raise ValueError("no idea")

def not_a_number(prompts, pictures):
    return [float("nan") if prompt == "text 1" else float(picture.mean()) for prompt, picture in zip(prompts, pictures)]

def hangs(prompts, pictures):
    if "text 1" in prompts:
        time.sleep(100)
    return [float(picture.mean()) for picture in pictures]

def level(prompts, pictures):
    return [1.0] * len(pictures)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("grpo")
    (directory / "rewards.py").write_text(REWARDS)
    (directory / "prompts.txt").write_text("text 0\ntext 1\na text 2\n")
    return directory


@pytest.fixture(scope="module")
def base(tiny_bundle, folder) -> TrainConfig:
    return TrainConfig(
        directory="",
        model=ModelConfig(str(tiny_bundle), dtype="float32"),
        data=DataConfig((), LENGTH, packing=0),
        batch_size=64,
        steps=STEPS,
        optimizer=OptimizerConfig(learning_rate=3e-2, final_learning_rate=2e-2, warmup_steps=1, weight_decay=0.0),
        grpo=GrpoConfig(str(folder / "prompts.txt"), f"{folder}/rewards.py:red", n=32, area=16 * 16),
        mesh="fsdp=1",
        checkpoint_every=5,
    )


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> pathlib.Path:
    """The directory of a run that nothing disturbed."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    held_out = {"held_out": base.grpo.prompts}
    train(change(base, directory, held_out, evaluate_every=STEPS), progress=False)
    return directory


def test_it_learns_the_reward(whole):
    found = lines(whole)
    rewards = [line["reward"] for line in found]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + found[0]["reward_spread"]
    assert found[0]["kl"] == pytest.approx(0, abs=1e-6) and found[-1]["kl"] > 0.01
    assert found[0]["pictures"] == 64 and found[0]["targets"] == 64 * 4
    assert found[0]["clip_low"] == found[0]["clip_high"] == found[0]["failed"] == found[0]["level"] == 0
    (evaluated,) = lines(whole, "evaluation/held_out")
    assert evaluated["reward"] > rewards[0]


def test_the_weights_for_drawing_are_gone_when_pixels_are_decoded(base, tmp_path):
    """`emu3-jax plan` counts on it."""
    with use_mesh(make_mesh(base.mesh)):
        made = job(change(base, tmp_path))
        state = made.initial_state()
        made.start(0, None)
        alive = jax.live_arrays()
        before = {id(array) for array in alive}
        drawn = made._artist.draw(made._language(state), ["text 0"] * 4, np.arange(4, dtype=np.uint32))
        left = [array.shape for array in jax.live_arrays() if id(array) not in before and array.ndim > 1]
        made.close()
    assert not left and len(drawn.grids) == 4


def test_a_stopped_run_resumes_exactly(base, whole, tmp_path, monkeypatch):
    config = change(base, tmp_path / "run", {"held_out": base.grpo.prompts}, evaluate_every=STEPS)
    with monkeypatch.context() as patch:
        patch.setattr(runner._Loop, "_stopping", lambda at, _: at.step == 7)
        assert train(config, progress=False).step == 7
    train(config, progress=False)
    assert lines(tmp_path / "run") == lines(whole)
    trained = [Bundle.open(run / "model").arrays("decoder") for run in (tmp_path / "run", whole)]
    for (param, found), (_, wanted) in zip(*trained, strict=True):
        np.testing.assert_array_equal(found, wanted, err_msg=str(param.path))


@pytest.mark.parametrize(
    ("mesh", "accumulation", "gather"),
    [
        ("data=2,fsdp=2", 1, False),
        ("fsdp=1,sequence=2,tensor=2", 4, False),
        ("fsdp=8", 1, True),
        ("fsdp=2,sequence=2,tensor=2", 1, True),
    ],
)
def test_meshes_and_microbatches_change_nothing(base, whole, tmp_path, mesh, accumulation, gather):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner._Loop, "_stopping", lambda at, _: at.step == 2)
        grpo = {"gather_weights": gather}
        train(change(base, tmp_path, grpo, mesh=mesh, accumulation=accumulation), progress=False)
    for found, wanted in zip(lines(tmp_path), lines(whole)[:2], strict=True):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value, rel=1e-4, abs=2e-5), name


def test_the_gathered_copy_is_told_and_lies_on_each_device(base, tmp_path):
    config = change(base, tmp_path, {"gather_weights": True, "reference": False}, mesh="fsdp=4,tensor=2")
    with use_mesh(make_mesh(config.mesh)):
        made = job(config)
        assert "weights for drawing" in made.describe()[-1]
        made.start(0, None)
        params = made._language(made.initial_state()).params
        made.close()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):  # `tensor` splits all but the norms
        assert leaf.addressable_shards[0].data.size == leaf.size // (1 if leaf.ndim == 1 else 2), path


# ------------------------------------------------------------------------------------------------ the policy


@pytest.mark.parametrize(("guidance", "guided", "temperature"), [(1.0, True, 0.7), (3.0, True, 1.0), (3.0, False, 1.0)])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_policy_is_the_one_that_was_sampled(base, tmp_path, guidance, guided, temperature, accumulation):
    grpo = {"guidance": guidance, "guided_policy": guided, "temperature": temperature, "n": 4}
    compare_policy_with_sampler(change(base, tmp_path, grpo, accumulation=accumulation), ["text 0", "a text 2"])


def test_guidance_and_several_updates(base, tmp_path):
    grpo = {"guidance": 2.0, "iterations": 3, "kl_weight": 0.01, "level": "sequence", "clip_low": 1e-3}
    train(change(base, tmp_path / "run", grpo, steps=3), progress=False)
    found = lines(tmp_path / "run")
    assert found[0]["pictures"] == 32 and found[-1]["clip_low"] > 0
    assert found[1]["learning_rate"] > found[2]["learning_rate"] > 0  # nine updates share one schedule


def test_adapters(base, tmp_path):
    optimizer = dataclasses.replace(base.optimizer, learning_rate=1e-1)
    config = change(base, tmp_path / "run", adapter=Adapter(rank=4, base="float32"), optimizer=optimizer)
    train(config, progress=False, adapter_only=True)
    found = lines(tmp_path / "run")
    assert found[0]["kl"] == pytest.approx(0, abs=1e-6) and found[-1]["kl"] > 1e-3
    assert np.mean([line["reward"] for line in found[-3:]]) > np.mean([line["reward"] for line in found[:3]])
    assert (tmp_path / "run/adapter").is_dir()


# ------------------------------------------------------------------------------------------------ rewards


def test_groups_without_spread_change_nothing(base, folder, tmp_path):
    train(change(base, tmp_path / "run", {"reward": f"{folder}/rewards.py:level"}, steps=2), progress=False)
    for line in lines(tmp_path / "run"):
        assert line["level"] == 2 and line["loss"] == line["gradient_norm"] == 0


@pytest.mark.parametrize(
    ("reward", "reason"), [("not_a_number", "it returned nan for picture 0"), ("hangs", "it took longer than 3 s")]
)
def test_prompts_without_rewards_are_skipped(base, folder, tmp_path, caplog, reward, reason):
    settings = {"reward": f"{folder}/rewards.py:{reward}", "timeout": 3.0, "pictures_per_call": 32}
    train(change(base, tmp_path / "run", settings, steps=3), progress=False)
    found = lines(tmp_path / "run")
    assert sum(line["failed"] for line in found) >= 2  # each of the three prompts comes twice in three steps
    assert {line["pictures"] for line in found} <= {32, 64} and all(np.isfinite(line["reward"]) for line in found)
    assert f"reward {reward}, prompt 'text 1': {reason}" in caplog.text


def test_a_reward_that_always_fails_ends_the_run(base, folder, tmp_path):
    config = change(base, tmp_path / "run", {"reward": f"{folder}/rewards.py:raises"}, steps=3)
    message = r"reward raises failed 3 times in a row for all prompts of a step \(ValueError: no idea"
    with pytest.raises(Emu3Error, match=message):
        train(config, progress=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text 0\n\n<|image start|>\n", r"prompts.txt line 3: .*control token"),
        ("text 0\n" + "a text " * 20, r"prompts.txt line 2: the prompt and its picture take \d+ tokens, a row has 48"),
        ("", "prompts.txt has no prompt"),
    ],
)
def test_bad_prompts_are_named(base, tmp_path, text, message):
    (tmp_path / "prompts.txt").write_text(text)
    with pytest.raises(Emu3Error, match=message):
        train(change(base, tmp_path / "run", {"prompts": str(tmp_path / "prompts.txt")}), progress=False)
    assert not (tmp_path / "run").exists()


def test_other_prompts_do_not_resume(base, tmp_path):
    (tmp_path / "prompts.txt").write_text("text 0\ntext 1\n")
    config = change(base, tmp_path / "run", {"prompts": str(tmp_path / "prompts.txt")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner._Loop, "_stopping", lambda at, _: at.step == 1)
        train(config, progress=False)
    (tmp_path / "prompts.txt").write_text("text 0\ntext 2\n")
    with pytest.raises(Emu3Error, match="the saved position belongs to other prompts"):
        train(config, progress=False)


@pytest.mark.parametrize(
    ("grpo", "fields", "message"),
    [
        ({"n": 1}, {}, "n is 1: it must be a whole number >= 2"),
        ({"n": 5}, {}, "batch_size is 64: it must be a multiple of 5: 5 pictures per prompt"),
        (
            {"guidance": 2.0},
            {"batch_size": 32},
            "batch_size is 32: it must be a multiple of 64: 32 pictures .* two rows",
        ),
        ({"temperature": 0}, {}, "temperature is 0: .* greedy drawing gives no spread"),
        ({"kl_weight": 0.1, "reference": False}, {}, "reference is False: it must be True where kl_weight is above 0"),
        ({"reward": "judge"}, {}, "judge_data is '': it must be a directory of evaluation data"),
        ({"area": 7}, {}, "grpo.area is 7: at ratio 1:1 it must be at least 144 pixels"),
        ({"area": 1 << 23}, {}, "grpo.area is 8388608: it must be a whole number of pixels > 0 and <= 4194304"),
        ({"reward": "rewards.txt:f"}, {}, "is no Python file"),
        ({"held_out": "nowhere.txt"}, {}, "nowhere.txt"),
        ({}, {"data": DataConfig((), LENGTH)}, "data needs sources=\\(\\), packing=0"),
        ({"guidance": 2.0, "n": 4}, {"mesh": "fsdp=8", "batch_size": 24}, "batch_size is 24, and the mesh splits rows"),
    ],
)
def test_bad_configs(base, tmp_path, grpo, fields, message):
    with pytest.raises(Emu3Error, match=message):
        train(change(base, tmp_path / "run", grpo, **fields), progress=False)
    assert not (tmp_path / "run").exists()


def test_no_sources_without_grpo(base):
    with pytest.raises(Emu3Error, match="sources is empty: name at least one directory of prepared data"):
        dataclasses.replace(base, grpo=None)

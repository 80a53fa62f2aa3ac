"""GRPO on clips: what is drawn, what the reward gets, what is trained, and what is refused."""

import pathlib

import numpy as np
import pytest
from full_size import CONFIGS
from grpo_runs import change, compare_policy_with_sampler, job, lines

from emu3_jax import Emu3Error, train
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.cli.main import main
from emu3_jax.data.config import DataConfig
from emu3_jax.preference.shipped_rewards import MOVING_EXAMPLE, STILL_EXAMPLE, describes_scene, procedural
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.rules import use_mesh
from emu3_jax.training.config import ModelConfig, OptimizerConfig, TrainConfig
from emu3_jax.training.grpo_config import GrpoConfig

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.slow]

LENGTH, FRAMES = 64, 6
TWO_SHAPES = "a red circle above a blue square on a gray background"
SEVERAL = "two red circles and one blue square on a white background"
PLACELESS = "a small red circle on a gray background"
REWARDS = f"""
def redder(prompts, clips):
    assert all(clip.shape == ({FRAMES}, 16, 16, 3) for clip in clips)
    return [float(clip[-1, ..., 0].mean() - clip[0, ..., 0].mean()) for clip in clips]

def short(prompts, clips):
    return [1.0]
"""


@pytest.fixture(scope="module")
def base(tiny_bundle, tmp_path_factory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("clips")
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "prompts.txt").write_text("text 0\na text 2\n")
    return TrainConfig(
        directory="",
        model=ModelConfig(str(tiny_bundle), dtype="float32"),
        data=DataConfig((), LENGTH, packing=0),
        batch_size=8,
        steps=2,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0.0),
        grpo=GrpoConfig(str(folder / "prompts.txt"), f"{folder}/rewards.py:redder", n=4, frames=FRAMES, area=16 * 16),
        mesh="fsdp=1",
        checkpoint_every=5,
    )


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> pathlib.Path:
    """The directory of a run with an evaluation."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    train(change(base, directory, {"held_out": base.grpo.prompts}, evaluate_every=2), progress=False)
    return directory


def test_clips_are_drawn_rewarded_and_trained(whole, tiny_bundle):
    found = lines(whole)
    factor = Bundle.open(tiny_bundle).vision_config.temporal_factor
    latents = -(-FRAMES // factor)
    assert latents > 1 and FRAMES % factor  # the last latent frame has frames that are cut off
    assert [line["targets"] for line in found] == [8 * latents * 4] * 2 and found[0]["clips"] == 8
    assert found[0]["kl"] == pytest.approx(0, abs=1e-6) and found[0]["reward_spread"] > 0 and found[0]["loss"] != 0
    assert lines(whole, "evaluation/held_out")


@pytest.mark.parametrize(("guidance", "guided"), [(1.0, True), (2.0, True)])
def test_the_policy_is_the_one_that_was_sampled(base, tmp_path, guidance, guided):
    config = change(base, tmp_path, {"guidance": guidance, "guided_policy": guided})
    compare_policy_with_sampler(config, ["text 0", "a text 2"])


def test_the_last_line_names_the_command_for_clips(base):
    with use_mesh(make_mesh(base.mesh)):
        made = job(base)
        assert made._example("--model m") == "emu3-jax video 'text 0' --model m -o out/clips"
        made.close()


def test_a_mesh_changes_nothing(base, whole, tmp_path):
    train(change(base, tmp_path / "run", mesh="data=2,fsdp=2"), progress=False)
    for found, wanted in zip(lines(tmp_path / "run"), lines(whole), strict=True):
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value, rel=1e-4, abs=2e-5), name


def test_the_shipped_reward_reads_clips():
    from emu3_jax.evaluation.procedural import all_clips, rasterise_clip

    clip = next(one for one in all_clips() if one.motion == "moves right" and one.size == "large")
    frames = rasterise_clip(clip, 32)
    other = clip.caption.replace("moves right", "moves left").replace(f" {clip.colour} ", " pink ")
    assert procedural([clip.caption, clip.caption.upper() + ".", other], [frames] * 3) == [1.0, 1.0, 0.6]
    with pytest.raises(ValueError, match="describes no procedural clip"):
        procedural(["a dog"], [frames])
    with pytest.raises(ValueError, match="has 2 frames, its motion is read from 3 or more"):
        procedural([clip.caption], [frames[:2]])


@pytest.mark.parametrize("prompt", [STILL_EXAMPLE, MOVING_EXAMPLE, TWO_SHAPES, SEVERAL, PLACELESS, "a dog", ""])
@pytest.mark.parametrize("moving", [False, True])
def test_a_scene_is_what_the_shipped_reward_scores(prompt, moving):
    white = np.full((3, 64, 64, 3) if moving else (64, 64, 3), 255, np.uint8)
    assert describes_scene(prompt, moving=moving) == (
        (prompt == MOVING_EXAMPLE) == moving and prompt not in ("a dog", "")
    )
    if describes_scene(prompt, moving=moving):
        assert 0 <= procedural([prompt], [white])[0] < 1
    else:
        with pytest.raises(ValueError, match="describes no procedural"):
            procedural([prompt], [white])


@pytest.mark.parametrize("field", ["prompts", "held_out"])
@pytest.mark.parametrize(
    ("frames", "good", "bad", "found", "remedy"),
    [
        (8, MOVING_EXAMPLE, STILL_EXAMPLE, "a still scene, but the run draws clips", "grpo.frames=None"),
        (8, MOVING_EXAMPLE, TWO_SHAPES, "a still scene, but the run draws clips", "grpo.frames=None"),
        (8, MOVING_EXAMPLE, "a dog", "no scene that the reward procedural reads", "choose another reward"),
        (None, TWO_SHAPES, MOVING_EXAMPLE, "a moving scene, but the run draws pictures", "grpo.frames=8"),
        (None, STILL_EXAMPLE, "a dog", "no scene that the reward procedural reads", "choose another reward"),
    ],
)
def test_prompts_that_the_shipped_reward_cannot_score_are_refused(
    tiny_bundle, tmp_path, monkeypatch, capsys, field, frames, good, bad, found, remedy
):
    """The error names the line. It comes before weights are loaded or anything is written."""
    monkeypatch.setattr(Bundle, "load_vision", None)
    monkeypatch.chdir(tmp_path)
    files = {"prompts": "good.txt", "held_out": "good.txt", field: "bad.txt"}
    pathlib.Path("good.txt").write_text(f"{good}\n")
    pathlib.Path("bad.txt").write_text(f"{good}\n\n{bad}\n{bad}\n")
    settings = {
        "model.bundle": tiny_bundle,
        "grpo.frames": frames,
        **{f"grpo.{key}": name for key, name in files.items()},
    }
    sets = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    assert main(["train", str(CONFIGS / "grpo_emoji.py"), *sets]) == 2
    shown = capsys.readouterr()
    assert (
        shown.err.count("\n") == 1 and f"bad.txt line 3: the prompt '{bad}' describes {found}: write one" in shown.err
    )
    assert repr(STILL_EXAMPLE if frames is None else MOVING_EXAMPLE) in shown.err and remedy in shown.err
    assert not shown.out and sorted(path.name for path in tmp_path.iterdir()) == ["bad.txt", "good.txt"]


@pytest.mark.parametrize("frames", [None, FRAMES])
def test_the_shipped_reward_of_oblong_pictures_is_refused(base, tmp_path, frames):
    (tmp_path / "prompts.txt").write_text(STILL_EXAMPLE if frames is None else MOVING_EXAMPLE)
    grpo = {"prompts": str(tmp_path / "prompts.txt"), "reward": "procedural", "frames": frames, "ratio": "2:1"}
    with pytest.raises(Emu3Error, match=r"grpo\.ratio is 2:1, and the reward procedural reads square .* to 1:1"):
        train(change(base, tmp_path / "run", grpo | {"area": 32 * 16}), progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("grpo", "message"),
    [
        ({"frames": 0}, "frames is 0: it must be a whole number from 1 to"),
        ({"frames": 2.5}, "frames is 2.5: it must be a whole number from 1 to"),
        ({"max_new_tokens": 4}, "frames is 6: it must be None where max_new_tokens is set"),
        ({"reward": "judge", "judge_data": "x"}, "frames is 6: it must be None where the reward is judge"),
        ({"reward": "procedural", "frames": 2}, "frames is 2: it must be 3 or more where the reward is procedural"),
        ({"n": 3}, "it must be a multiple of 3: 3 clips per prompt"),
        ({"frames": 80}, r"prompts.txt line 1: the prompt and its clip take \d+ tokens, a row has 64: .*grpo.frames"),
    ],
)
def test_bad_configs(base, tmp_path: pathlib.Path, grpo, message):
    with pytest.raises(Emu3Error, match=message):
        train(change(base, tmp_path / "run", grpo), progress=False)
    assert not (tmp_path / "run").exists()


def test_clips_without_motion_are_refused_with_the_config(tmp_path, monkeypatch, capsys):
    """The shipped reward reads motion from three frames. The error comes before anything is compiled or written."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(CONFIGS / "grpo_emoji.py"), "--set", "grpo.frames=2"]) == 2
    shown = capsys.readouterr()
    assert (
        shown.err.count("\n") == 1 and "frames is 2: it must be 3 or more where the reward is procedural" in shown.err
    )
    assert not shown.out and not list(tmp_path.iterdir())


def test_a_reward_of_another_length_is_named(base, tmp_path):
    reward = base.grpo.reward.replace("redder", "short")
    with pytest.raises(Emu3Error, match="it returned 1 numbers for 4 clips"):
        train(change(base, tmp_path / "run", {"reward": reward, "pictures_per_call": 4}, steps=1), progress=False)

"""The loop as a user meets it: a config file runs, is killed, goes on exactly, and leaves a model that generates."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from config_files import write_config
from prepare_entries import Entries
from tiny_bundle import CODES

import emu3_jax
from emu3_jax import Emu3Error
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.cli.main import main
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.encoder import bundle_codebook
from emu3_jax.data.prepare import prepare
from emu3_jax.data.sequences import TextToImage
from emu3_jax.models.adapters import Adapter
from emu3_jax.training import decoder_job, loop, stopping
from emu3_jax.training.config import ModelConfig, OptimizerConfig, SampleConfig, TrainConfig
from emu3_jax.training.loop import train
from emu3_jax.training.metrics import read_metrics
from emu3_jax.training.overrides import override

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.usefixtures("shared_trainers")]

STEPS, EVERY = 40, 10  # enough that a run is far from its end when it is killed


@pytest.fixture(scope="module")
def data(tiny_bundle, tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("train") / "data"
    prepare(Entries(codes=CODES), directory, bundle_codebook(Bundle.open(tiny_bundle)), shards=2)
    return str(directory)


@pytest.fixture(scope="module")
def base(tiny_bundle, data) -> TrainConfig:
    return TrainConfig(
        directory="",
        model=ModelConfig(str(tiny_bundle), dtype="float32"),
        data=DataConfig((Source(data, TextToImage(loss="all", prompt_dropout=0.3)),), sequence_length=64, packing=2),
        batch_size=2,
        steps=STEPS,
        optimizer=OptimizerConfig(learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=2),
        mesh="fsdp=2",
        checkpoint_every=EVERY,
        keep=2,
    )


@pytest.fixture(scope="module")
def config_file(base, tmp_path_factory) -> pathlib.Path:
    """A file that holds `base`."""
    return write_config(tmp_path_factory.mktemp("config") / "small.py", base)


def losses(directory) -> list[tuple[int, float, float]]:
    lines = [line for line in read_metrics(pathlib.Path(directory)) if line["group"] == "train"]
    return [(line["step"], line["loss"], line["gradient_norm"]) for line in lines]


@pytest.fixture(scope="module")
def whole(config_file, tmp_path_factory) -> pathlib.Path:
    """The directory of a run that nothing disturbed."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    assert main(["train", str(config_file), "--set", f"directory={directory}", "--quiet"]) == 0
    return directory


def start(config_file, directory) -> subprocess.Popen:
    command = [sys.executable, "-m", "emu3_jax.cli.main", "train", str(config_file), "--set", f"directory={directory}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))


def wait_for_step(process: subprocess.Popen, directory: pathlib.Path, step: int) -> None:
    """Until the run has written about `step`, or has ended."""
    while process.poll() is None and max([0, *(s for s, *_ in losses(directory))]) < step:
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------ going on


@pytest.mark.slow
def test_a_run_killed_at_random_goes_on_exactly(config_file, whole, tmp_path):
    directory, draw = tmp_path / "run", random.Random(0)
    for step in (5, 15):
        process = start(config_file, directory)
        wait_for_step(process, directory, step)
        time.sleep(draw.random() / 20)  # in the middle of a step, or of writing a checkpoint
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert len(losses(directory)) < STEPS
    process = start(config_file, directory)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert out == f"{directory / 'model'}: the model after {STEPS} steps\n"
    assert losses(directory) == losses(whole)
    assert [step for step, *_ in losses(whole)] == list(range(1, STEPS + 1))
    for name, array in weights_of(whole / "model").items():
        np.testing.assert_array_equal(weights_of(directory / "model")[name], array, err_msg=name)


def test_ctrl_c_is_heard_and_the_second_interrupts(monkeypatch, capfd):
    now = [10.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stopping.stop_signal() as stop:
        signal.getsignal(signal.SIGINT).tell()  # as the watcher of the command line does at once
        signal.raise_signal(signal.SIGINT)
        now[0] += 0.2
        signal.raise_signal(signal.SIGINT)  # the launcher passes the same one on
        assert stop == [signal.SIGINT]
        signal.raise_signal(signal.SIGTERM)
        assert stop == [signal.SIGINT, signal.SIGTERM]
        now[0] += 0.2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert capfd.readouterr().err == "emu3-jax: stopping after this step; Ctrl-C again ends at once\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_with_a_checkpoint(base, whole, tmp_path, monkeypatch, number):
    directory = tmp_path / "run"
    step = decoder_job.DecoderJob.step

    def interrupted(job, state, batch):
        if not losses(directory):  # before the first step has been reported, as while it compiles
            signal.raise_signal(number)
        return step(job, state, batch)

    monkeypatch.setattr(decoder_job.DecoderJob, "step", interrupted)
    outcome = train(dataclasses.replace(base, directory=str(directory)), progress=False)
    assert (outcome.step, outcome.model, outcome.signal) == (1, None, number)
    assert [path.name for path in (directory / "checkpoints").iterdir()] == ["1"]
    assert losses(directory) == losses(whole)[:1]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_write_a_checkpoint(config_file, whole, tmp_path, number, code):
    process = start(config_file, tmp_path / "run")
    wait_for_step(process, tmp_path / "run", 1)
    process.send_signal(number)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    assert ("stopping after this step; Ctrl-C again ends at once" in errors) == (number == signal.SIGINT)
    (step,) = [int(word) for word in out.split() if word.isdigit()][:1]
    assert str(step) in {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert losses(tmp_path / "run") == losses(whole)[:step]


@pytest.mark.parametrize("change", ["mesh=data=2,tensor=2", "model.unroll=3"])
def test_another_mesh_or_unrolled_layers_go_on(base, whole, tmp_path, change):
    """The same numbers but for the order of sums."""
    directory = tmp_path / "run"
    shutil.copytree(whole, directory)
    shutil.rmtree(directory / "checkpoints" / str(STEPS))
    train(override(base, [f"directory={directory}", change]), progress=False)
    np.testing.assert_allclose(losses(directory), losses(whole), rtol=1e-4)


def test_muon_goes_on_exactly(base, tmp_path):
    """Weights of AdamW have no place in Muon's state, nor the other way round. Checkpoints keep both."""
    optimizer = dataclasses.replace(base.optimizer, algorithm="muon")
    config = dataclasses.replace(base, optimizer=optimizer, steps=6, checkpoint_every=3)
    configs = [dataclasses.replace(config, directory=str(tmp_path / name)) for name in ("whole", "again")]
    train(configs[0], progress=False)
    shutil.copytree(tmp_path / "whole", tmp_path / "again", ignore=shutil.ignore_patterns("6", "model"))
    assert train(configs[1], progress=False).step == 6
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")
    for name, array in weights_of(tmp_path / "whole" / "model").items():
        np.testing.assert_array_equal(weights_of(tmp_path / "again" / "model")[name], array, err_msg=name)


def test_only_the_newest_checkpoints_are_kept(whole):
    assert sorted(int(p.name) for p in (whole / "checkpoints").iterdir()) == [STEPS - EVERY, STEPS]


def weights_of(bundle: pathlib.Path) -> dict[str, np.ndarray]:
    return {param.name: array for param, array in Bundle.open(bundle).arrays("decoder")}


def test_training_lowers_the_loss(whole):
    values = [loss for _, loss, _ in losses(whole)]
    assert values[-1] < 0.9 * values[0]


def test_the_model_generates(whole, tiny_bundle):
    model = emu3_jax.load(whole / "model")
    assert model.language.config.dtype == "float32"
    (picture,) = model.generate("text 1", area=32 * 32, greedy=True, progress=False)
    assert picture.size == (32, 32)
    old, new = weights_of(tiny_bundle), weights_of(whole / "model")
    assert all((old[name] != new[name]).any() for name in old if "norm" not in name)


def test_convert_takes_a_run(whole, tmp_path, capsys):
    assert main(["convert", str(whole), "-o", str(tmp_path / "bundle")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'bundle'}: the model after step {STEPS}\n"
    for name, array in weights_of(whole / "model").items():
        np.testing.assert_array_equal(weights_of(tmp_path / "bundle")[name], array, err_msg=name)
    assert main(["convert", str(whole), str(whole), "-o", str(tmp_path / "two")]) == 2
    assert "convert it alone" in capsys.readouterr().err


def test_a_directory_above_and_odd_names_beside_checkpoints(base, tmp_path, monkeypatch):
    """The export at the end reads the checkpoint through TensorStore, which takes no `..`."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("\u00b2", "\u0663", "007", "x", "9.orbax"):
        (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
    outcome = emu3_jax.train(dataclasses.replace(base, directory="../run", steps=3), progress=False)
    assert outcome.model == pathlib.Path("../run/model")
    assert Bundle.open("../run/model", verify=True).has("decoder")
    assert main(["convert", "../run", "-o", "bundle"]) == 0
    assert Bundle.open("bundle", verify=True).has("decoder")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[]", "not an object: give the directory of a training run"),
        ("{}", "format is None, this version reads only 1"),
        ('{"format": 1, "decoder": 5}', "decoder is 5, so the file was changed"),
        ('{"format": 1, "adapter": []}', "adapter is"),
        ('{"format": 1, "decoder": {}}', "checkpoints of another model: its decoder has"),
    ],
)
def test_a_damaged_run_json(base, tmp_path, capsys, text, reason):
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text(text)
    message_of(dataclasses.replace(base, directory=str(tmp_path / "run")), reason)
    assert main(["convert", str(tmp_path / "run"), "-o", str(tmp_path / "bundle")]) == 2
    assert "run.json" in (said := capsys.readouterr().err) and said.count("\n") == 1


# ------------------------------------------------------------------------------------------------ between steps


def test_evaluation_pictures_and_profile(base, data, tmp_path):
    config = dataclasses.replace(
        base,
        directory=str(tmp_path),
        steps=4,
        evaluation=(("held out", Source(data, TextToImage())),),
        evaluate_every=2,
        samples=SampleConfig(("text 1", "text 2"), every=4, area=32 * 32),
        profile=(1, 1),
    )
    train(config, progress=False)
    held_out = [line for line in read_metrics(tmp_path) if line["group"] == "evaluation/held out"]
    assert [line["step"] for line in held_out] == [2, 4]
    codes = sum((2 + i % 3) * (3 + i % 4) for i in range(23))
    assert all(line["targets"] == codes and line["loss"] == line["loss_vision"] for line in held_out)
    assert sorted(p.name for p in (tmp_path / "samples" / "00000004").iterdir()) == ["000.png", "001.png"]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("base_dtype", ["float32", "nf4"])
@pytest.mark.slow
def test_adapters(base, base_dtype, tmp_path, tiny_bundle):
    adapter = Adapter(rank=2, base=base_dtype)
    config = dataclasses.replace(base, directory=str(tmp_path), steps=4, checkpoint_every=3, adapter=adapter)
    train(config, progress=False)
    sizes = {path.name: path for path in (tmp_path / "checkpoints").iterdir()}
    assert set(sizes) == {"3", "4"}
    old, new = weights_of(tiny_bundle), weights_of(tmp_path / "model")
    moved = {name for name in old if not np.array_equal(old[name].astype(np.float32), new[name].astype(np.float32))}
    matrices = {name for name in old if name.startswith("layers_") and "norm" not in name}
    assert matrices <= moved and (base_dtype == "nf4" or moved == matrices)


# ------------------------------------------------------------------------------------------------ bad input


def message_of(config, match):
    with pytest.raises(Emu3Error, match=match) as caught:
        train(config, progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_two_runs_on_one_directory(base, config_file, tmp_path):
    process = start(config_file, tmp_path / "run")
    wait_for_step(process, tmp_path / "run", 1)
    process.send_signal(signal.SIGSTOP)  # or it might end before the other begins
    message_of(dataclasses.replace(base, directory=str(tmp_path / "run")), f"in use by process {process.pid} on")
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=300)
    assert process.returncode == 0


def test_another_model(base, whole, tiny_bundle):
    other = dataclasses.replace(Bundle.open(tiny_bundle).decoder_config, num_layers=1)
    model = dataclasses.replace(base.model, decoder=other)
    message_of(
        dataclasses.replace(base, directory=str(whole), model=model), "the decoder of this bundle has num_layers"
    )
    model = dataclasses.replace(base.model, decoder=other, random=True)
    message_of(dataclasses.replace(base, directory=str(whole), model=model), "checkpoints of another model.*num_layers")
    message_of(dataclasses.replace(base, directory=str(whole), adapter=Adapter()), "checkpoints of another model")


def test_what_is_no_shape_may_be_new(base, tiny_bundle):
    bundle = Bundle.open(tiny_bundle)
    other = dataclasses.replace(bundle.decoder_config, max_positions=8192, clip_frames=8, clip_layout="flat")
    model = dataclasses.replace(base.model, bundle=str(tiny_bundle), decoder=other)
    assert loop._decoder(dataclasses.replace(base, model=model), bundle) == other
    model = dataclasses.replace(model, decoder=None)
    assert loop._decoder(dataclasses.replace(base, model=model), bundle) == bundle.decoder_config


def test_a_run_of_version_0_1_0_goes_on_in_its_order(base, tmp_path, monkeypatch):
    """It needs as many processes as before, because that order depends on their number."""
    config = dataclasses.replace(base, directory=str(tmp_path / "run"), steps=6, checkpoint_every=2, keep=3)
    with monkeypatch.context() as patch:
        patch.setattr(decoder_job, "ORDERS", (1,))
        train(config, progress=False)
    wanted = losses(tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in ("4", "6"):
        shutil.rmtree(checkpoints / step)
    shutil.rmtree(tmp_path / "run" / "model")
    positions = checkpoints / "2" / "data" / "metadata"
    text = positions.read_text()
    (position,) = json.loads(text)
    assert set(position) == {"pipeline", "position"}
    positions.write_text(json.dumps([position, position]))
    with pytest.raises(Emu3Error, match=r"read its data in 2 shares, now there are 1: resume with as many processes"):
        train(config, progress=False)
    positions.write_text(text)
    train(config, progress=False)
    assert losses(tmp_path / "run") == wanted
    train(dataclasses.replace(config, directory=str(tmp_path / "new")), progress=False)
    assert losses(tmp_path / "new") != wanted


def test_other_data(base, whole):
    data = dataclasses.replace(base.data, packing=3)
    config = dataclasses.replace(base, directory=str(whole), steps=STEPS + 1, data=data)
    message_of(config, "belongs to other data")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mesh": "fsdp=3"}, "does not divide the 8"),
        ({"mesh": "fsdp=4"}, "batch_size is 2, and the mesh splits rows into 4"),
        ({"mesh": "fsdp=2,sequence=3"}, "does not divide"),
        ({"mesh": "fsdp=1,tensor=8"}, "does not divide"),
        ({"batch_size": 4, "accumulation": 4}, "batch_size is 1"),
    ],
)
def test_meshes_that_do_not_fit(base, tmp_path, changes, reason):
    message_of(dataclasses.replace(base, directory=str(tmp_path), **changes), reason)


def test_a_loss_that_is_not_finite_stops_the_run(base, tmp_path, monkeypatch):
    directory = tmp_path / "run"
    train(dataclasses.replace(base, directory=str(directory), steps=3), progress=False)
    # From here on each step raises the weights a hundred orders of magnitude.
    optimizer = OptimizerConfig(learning_rate=1e38, final_learning_rate=1e38, warmup_steps=0, weight_decay=1e6)
    config = dataclasses.replace(base, directory=str(directory), steps=9, optimizer=optimizer, checkpoint_every=1)
    message_of(
        config, r"at step [45], whose batch is in .*batch-[45]-process-0.npz; the checkpoint of step [34] is kept"
    )
    (file,) = directory.glob("batch-*.npz")
    with np.load(file) as batch:
        assert batch["tokens"].shape == (2, 64)


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint(base, tmp_path, monkeypatch):
    directory = tmp_path / "run"
    train(dataclasses.replace(base, directory=str(directory), steps=3), progress=False)

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: write failed: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.CheckpointManager.save", full)
        config = dataclasses.replace(base, directory=str(directory), steps=6)
        message_of(
            config, "step 6 cannot be written .the disk is full.; the one of step 3 is kept; free space, then run again"
        )
    assert train(config, progress=False).step == 6


def test_a_damaged_checkpoint_is_named(base, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    state = tmp_path / "run" / "checkpoints" / str(STEPS) / "state"
    for file in state.rglob("*"):
        if file.is_file() and file.stat().st_size > 10000:
            file.write_bytes(file.read_bytes()[:1000])
    config = dataclasses.replace(base, directory=str(tmp_path / "run"))
    message_of(config, f"checkpoints/{STEPS} cannot be restored .*; delete it to resume")

"""Two processes as on two hosts: training, checkpoints, generation, preparation, and how they end."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from config_files import write_config
from pair_cases import picture_pairs
from PIL import Image
from prepare_entries import Entries
from tiny_bundle import CODES
from two_processes import Pair, losses

import emu3_jax
from emu3_jax import Emu3Error, distributed
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.checkpoints.merged import merge_bundle
from emu3_jax.cli.main import main
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.encoder import bundle_codebook
from emu3_jax.data.pairs import write_pairs
from emu3_jax.data.prepare import prepare
from emu3_jax.data.rows import count_too_long
from emu3_jax.data.sequences import Preference, TextToImage
from emu3_jax.training.config import ModelConfig, OptimizerConfig, TrainConfig
from emu3_jax.training.grpo_config import GrpoConfig
from emu3_jax.training.loop import train
from emu3_jax.training.metrics import read_metrics
from emu3_jax.training.preference_config import PreferenceConfig
from emu3_jax.training.weights import export_adapter, export_run

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.multiprocess]

STEPS, EVERY = 24, 8  # enough that a run is far from its end when it is killed


def assert_near(found, wanted) -> None:
    """Equal but for the order of sums: Gloo's differ from run to run, already in a first step that nothing disturbed.

    A step left out, or done twice, would show: each changes the loss by more than this.
    """
    np.testing.assert_allclose(found, wanted, rtol=1e-3)


def weights_of(bundle: pathlib.Path) -> dict[str, np.ndarray]:
    return {param.name: array for param, array in Bundle.open(bundle).arrays("decoder")}


def assert_same_weights(left: pathlib.Path, right: pathlib.Path) -> None:
    expected, found = weights_of(left), weights_of(right)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.fixture(scope="module")
def base(tiny_bundle, tmp_path_factory) -> TrainConfig:
    """Each process reads its own half of the rows; the weights lie on all four devices."""
    data = tmp_path_factory.mktemp("two") / "data"
    prepare(Entries(codes=CODES), data, bundle_codebook(Bundle.open(tiny_bundle)), shards=2)
    return TrainConfig(
        directory="",
        model=ModelConfig(str(tiny_bundle), dtype="float32"),
        data=DataConfig(
            (Source(str(data), TextToImage(loss="all", prompt_dropout=0.3)),), 32, packing=2, too_long="skip"
        ),
        batch_size=4,
        steps=STEPS,
        optimizer=OptimizerConfig(learning_rate=3e-3, final_learning_rate=3e-4, warmup_steps=2),
        mesh="fsdp=4",
        checkpoint_every=EVERY,
        keep=2,
    )


@pytest.fixture(scope="module")
def config_file(base, tmp_path_factory) -> pathlib.Path:
    """A file that holds `base`."""
    return write_config(tmp_path_factory.mktemp("config") / "two.py", base)


@pytest.fixture(scope="module")
def whole(config_file, tmp_path_factory) -> pathlib.Path:
    """The directory of a run of two processes that nothing disturbed."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    said = Pair("train", config_file, "--set", f"directory={directory}").succeed()
    # Each process skips records of its own rows; what is told is their sum.
    shares = json.loads((directory / "checkpoints" / str(STEPS) / "data" / "metadata").read_text())
    skipped = [count_too_long(share) for share in shares]
    assert len(skipped) == 2 and min(skipped) > 0
    assert read_metrics(directory)[-1]["skipped"] == sum(skipped)
    model, told = said.splitlines()
    assert model == f"{directory / 'model'}: the model after {STEPS} steps"
    assert told.startswith(f"{directory}: {sum(skipped)} records were longer than 32 tokens and were skipped")
    assert [step for step, *_ in losses(directory)] == list(range(1, STEPS + 1))
    return directory


# ------------------------------------------------------------------------------------------------ training


def test_stopped_and_killed_processes_go_on(config_file, whole, tmp_path):
    """SIGTERM to one stops both with a checkpoint; a run that was stopped, then killed, ends as one that was not."""
    directory = tmp_path / "run"
    arguments = ("train", config_file, "--set", f"directory={directory}")
    pair = Pair(*arguments)
    pair.wait_for_step(directory, 1)
    pair.processes[1].send_signal(signal.SIGTERM)
    (code, out, errors), (other_code, other_out, _) = pair.end()
    assert (code, other_code, other_out) == (143, 143, ""), errors
    (step,) = [int(word) for word in out.split() if word.isdigit()][:1]
    assert (directory / "checkpoints" / str(step)).is_dir()
    assert not (directory / "model").exists()

    pair = Pair(*arguments)
    pair.wait_for_step(directory, max(step, EVERY) + 2)
    pair.kill()
    assert step < len(losses(directory)) < STEPS
    Pair(*arguments).succeed()
    assert_near(losses(directory), losses(whole))


def test_an_adapter_is_merged_by_one_process(config_file, tiny_bundle, tmp_path):
    """The other one waits: nothing of the merging may be spread over the mesh of both."""
    directory, adapter = tmp_path / "run", "adapter=Adapter(rank=2, base='nf4')"
    arguments = ("--set", "steps=3", "--set", adapter, "--set", f"directory={directory}")
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    pair = Pair("train", config_file, *arguments, **cache)
    pair.succeed()
    # With programs from the cache, the next pair can hang; see `enable_persistent_cache`.
    assert not (tmp_path / "cache").exists() or not os.listdir(tmp_path / "cache")
    assert "devices: 4 (cpu), mesh fsdp=4, 2 processes" in pair.log
    assert sum(line.startswith("step ") for line in pair.log) == 3
    export_adapter(directory, tmp_path / "adapter")
    merge_bundle(Bundle.open(tiny_bundle), tmp_path / "adapter", tmp_path / "merged", progress=False)
    assert_same_weights(tmp_path / "merged", directory / "model")


def test_ctrl_c_in_one_process_stops_both(config_file, tmp_path):
    pair = Pair("train", config_file, "--set", f"directory={tmp_path / 'run'}")
    pair.wait_for_step(tmp_path / "run", 1)
    pair.processes[1].send_signal(signal.SIGINT)
    (code, out, errors), (other_code, _, other_errors) = pair.end()
    assert (code, other_code) == (143, 130), errors + other_errors
    assert "stopping after this step" in other_errors and "stopped after step" in out


def test_their_checkpoint_in_one_process(base, whole, tmp_path):
    assert export_run(whole, tmp_path / "model") == STEPS
    assert_same_weights(whole / "model", tmp_path / "model")
    # One process goes on where two were after 16 steps, and reads what they would have read.
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    shutil.rmtree(tmp_path / "run" / "model")
    train(dataclasses.replace(base, directory=str(tmp_path / "run")), progress=False)
    assert_near(losses(tmp_path / "run"), losses(whole))
    assert read_metrics(tmp_path / "run")[-1]["skipped"] == read_metrics(whole)[-1]["skipped"]


def test_one_model_over_both_is_as_one_process(base, config_file, tmp_path):
    """Where `tensor` and `sequence` span the processes both read the same rows, those that one process reads."""
    two, one = tmp_path / "two", tmp_path / "one"
    changes = {"mesh": "sequence=2,tensor=2", "steps": 4, "checkpoint_every": 2}
    settings = [f"{name}={value}" for name, value in {"directory": two, **changes}.items()]
    Pair("train", config_file, *(word for setting in settings for word in ("--set", setting))).succeed()
    train(dataclasses.replace(base, directory=str(one), **changes), progress=False)
    assert_near(losses(two), losses(one))
    # And one process goes on from the checkpoint of two.
    shutil.rmtree(two / "checkpoints" / "4")
    train(dataclasses.replace(base, directory=str(two), **changes), progress=False)
    assert_near(losses(two), losses(one))


def test_preference_pairs_are_those_of_one_process(base, tiny_bundle, tmp_path):
    """Each process reads its share of the pairs. One writes the reference's log-probabilities, both get them."""
    write_pairs(picture_pairs(), tmp_path / "pairs", bundle_codebook(Bundle.open(tiny_bundle)))
    changes = {"batch_size": 8, "steps": 3, "preference": PreferenceConfig()}
    data = DataConfig((Source(str(tmp_path / "pairs"), Preference()),), 48, packing=0)
    one, two = (dataclasses.replace(base, directory=str(tmp_path / name), data=data, **changes) for name in "12")
    Pair("train", write_config(tmp_path / "pairs.py", two)).succeed()
    train(one, progress=False)
    assert_near(losses(two.directory), losses(one.directory))
    (found,), (wanted,) = (pathlib.Path(run.directory, "reference").iterdir() for run in (two, one))
    assert found.name == wanted.name
    np.testing.assert_allclose(np.load(found), np.load(wanted), rtol=1e-5)


# ------------------------------------------------------------------------------------------------ generation, data


def test_grpo_is_that_of_one_process(base, tmp_path):
    """Both processes draw all pictures on four devices. Each asks its own reward workers about its share of prompts."""
    (tmp_path / "prompts.txt").write_text("text 0\ntext 1\ntext 2\n")
    reward = (
        "def red(prompts, pictures):\n    return [float(one[..., 0].mean() - one[..., 2].mean()) for one in pictures]"
    )
    (tmp_path / "rewards.py").write_text(reward)
    grpo = GrpoConfig(str(tmp_path / "prompts.txt"), f"{tmp_path}/rewards.py:red", n=4, area=16 * 16, guidance=2.0)
    data = DataConfig((), 48, packing=0)
    config = dataclasses.replace(base, grpo=grpo, data=data, batch_size=16, steps=3)
    file = tmp_path / "grpo.py"
    imports = "from emu3_jax.training.grpo_config import GrpoConfig"
    names = "from emu3_jax.training.config import ModelConfig, OptimizerConfig, TrainConfig"
    sources = "from emu3_jax.data.config import DataConfig"
    file.write_text(f"{imports}\n{names}\n{sources}\n\ndef config():\n    return {config!r}\n")
    Pair("train", file, "--set", f"directory={tmp_path}/two").succeed()
    emu3_jax.train(dataclasses.replace(config, directory=str(tmp_path / "one")), progress=False)
    # The losses are near 0, because the advantages of a prompt add up to 0.
    assert_near(*([norm for *_, norm in losses(tmp_path / name)] for name in ("two", "one")))
    rewards = [[line["reward"] for line in read_metrics(tmp_path / name)] for name in ("two", "one")]
    np.testing.assert_allclose(*rewards, atol=1e-6)
    assert rewards[0][0] != rewards[0][1]


def test_generation_is_that_of_one_process(whole, tmp_path):
    prompts = ("text 1", "text 2", "a third")
    said = Pair(
        "generate", *prompts, "--model", whole / "model", "--mesh", "fsdp=2,tensor=2", "--area", 32 * 32,
        "--seed", 3, "--save-tokens", "-o", tmp_path,
    ).succeed()  # fmt: skip
    assert said.splitlines() == [str(tmp_path / f"{index:03d}.png") for index in range(3)]
    model = emu3_jax.load(whole / "model")
    expected = model.generate_sequences(prompts, area=32 * 32, seed=3, progress=False)
    with np.load(tmp_path / "tokens.npz") as tokens:
        for index, generation in enumerate(expected):
            np.testing.assert_array_equal(tokens[str(index)], generation.ids)
            with Image.open(tmp_path / f"{index:03d}.png") as picture:
                assert np.abs(np.asarray(picture, int) - np.asarray(generation.image, int)).max() <= 1


def test_hosts_share_preparation(tiny_bundle, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    lines = []
    for index, array in enumerate(pixels):
        Image.fromarray(array).save(tmp_path / f"{index}.png")
        lines.append(json.dumps({"image": f"{index}.png", "text": f"picture {index}"}))
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("\n".join(lines) + "\n")
    arguments = ("prepare", manifest, "--model", tiny_bundle, "--area", 32 * 32, "--shards", 2, "--quiet")
    ends = Pair(*arguments, "-o", tmp_path / "two").end()
    assert [code for code, *_ in ends] == [0, 0], ends
    assert any("6 records in 2 shards" in out for _, out, _ in ends)
    assert main([*map(str, arguments), "-o", str(tmp_path / "one")]) == 0
    for file in (tmp_path / "one").glob("*.arrayrecord"):
        assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes()


# ------------------------------------------------------------------------------------------------ ends


def test_bad_input_ends_both(config_file, tmp_path):
    ends = Pair("train", config_file, "--set", f"directory={tmp_path / 'run'}", "--set", "batch_size=3").end()
    for code, out, errors in ends:
        assert (code, out) == (2, "")
        assert errors.startswith("emu3-jax: error: batch_size is 3") and errors.count("\n") == 1


def test_one_that_fails_ends_the_other(config_file, tmp_path):
    """The first process finds the directory in use; the second waits for it in vain."""
    import fcntl

    with open(tmp_path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (code, _, errors), (other_code, *_) = Pair("train", config_file, "--set", f"directory={tmp_path}").end()
    assert code == 2 and "is in use by" in errors
    assert other_code not in (0, None)


@pytest.mark.parametrize("index", ["0", "1"])
def test_processes_that_never_come(config_file, index):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    names = (distributed.COORDINATOR, distributed.COUNT, distributed.INDEX, "EMU3_START_TIMEOUT")
    environment = {**os.environ, **dict(zip(names, (address, "2", index, "1"), strict=True))}
    command = [sys.executable, "-m", "emu3_jax.cli.main", "train", str(config_file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2
    assert f"did not meet at {address} (waited 1 s" in done.stderr
    assert [line for line in done.stderr.splitlines() if "error" in line] == done.stderr.splitlines()


# ------------------------------------------------------------------------------------------------ start-up

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
BY_HAND = {distributed.COORDINATOR: "a:1", distributed.COUNT: "2", distributed.INDEX: "1"}


@pytest.mark.parametrize(
    ("environment", "tpu_host", "expected"),
    [
        ({}, False, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, False, None),
        (BY_HAND, False, {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1}),
        ({**SLURM, "SLURM_NTASKS": "2"}, False, {"cluster_detection_method": "slurm"}),
        ({**SLURM, "SLURM_NTASKS": "1"}, False, None),
        ({"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}, False, None),  # sbatch's own shell
        ({**SLURM, "SLURM_NTASKS": "2", distributed.COUNT: "1"}, False, None),
        (
            {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1", "OMPI_COMM_WORLD_SIZE": "2"},
            False,
            {"cluster_detection_method": "ompi"},
        ),
        ({}, True, {"cluster_detection_method": "gcetpu"}),
        ({"TPU_SKIP_MDS_QUERY": "1"}, True, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, True, {"cluster_detection_method": "gketpu"}),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, True, None),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True, {"cluster_detection_method": "gketpu"}),
    ],
)
def test_who_is_one_of_several(environment, tpu_host, expected):
    assert distributed.arguments(environment, tpu_host) == expected


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({distributed.COORDINATOR: ""}, "JAX_COORDINATOR_ADDRESS is not: set JAX_COORDINATOR_ADDRESS=HOST:PORT"),
        ({distributed.COORDINATOR: "a"}, "is 'a': it must be HOST:PORT"),
        ({distributed.INDEX: "2"}, "JAX_PROCESS_ID is 2: with 2 processes, the highest is 1"),
        ({distributed.INDEX: "x"}, "JAX_PROCESS_ID is 'x': it must be a whole number >= 0"),
        ({distributed.COUNT: "0"}, "JAX_NUM_PROCESSES is '0': it must be a whole number >= 1"),
        ({distributed.COUNT: ""}, "JAX_NUM_PROCESSES is not"),
    ],
)
def test_variables_that_are_not_legal(change, reason):
    with pytest.raises(Emu3Error, match=reason):
        distributed.arguments({**BY_HAND, **change}, False)


def test_every_detection_is_one_that_jax_knows():
    from jax._src.clusters import ClusterEnv

    names = {cluster.name for cluster in ClusterEnv._cluster_types}
    assert {"slurm", "ompi", "gketpu", "gcetpu"} <= names

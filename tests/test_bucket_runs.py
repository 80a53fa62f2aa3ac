"""Runs in buckets, over a stand-in for Cloud Storage: they go on after a kill, are shared by hosts, and are locked."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from bucket_cases import STEPS, assert_same_arrays, digests, photos, run, stored, write_config
from gcs_stand_in import Store
from two_processes import Pair

import emu3_jax
from emu3_jax import Emu3Error, storage
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.training.metrics import read_metrics
from emu3_jax.training.run_directory import newest_checkpoint

pytest.importorskip("gcsfs", reason="the extra gcs is not installed")
pytestmark = [
    pytest.mark.compiled_quickly,
    pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning"),  # by gcsfs, of each piece of a file
]


# ------------------------------------------------------------------------------------------------ runs


def losses(directory) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(pathlib.Path(directory)) if line["group"] == "train"]


def losses_there(store: Store, tmp_path) -> list[tuple[int, float]]:
    storage.download("gs://bucket/run/metrics.jsonl", tmp_path / "there" / "metrics.jsonl")
    return losses(tmp_path / "there")


@pytest.fixture
def trained(bucket, tiny_bundle, vouched) -> pathlib.Path:
    """The config of a run in the bucket, of a bundle and data there. The same run was made here, in `run`."""
    source = photos(pathlib.Path("photos"), 24)
    run("prepare", source, "--model", tiny_bundle, "--keep-size", "-o", "gs://bucket/data", "--quiet")
    run("prepare", source, "--model", tiny_bundle, "--keep-size", "-o", "data", "--quiet")
    storage.upload(vouched, "gs://bucket/tiny")
    run("train", write_config(vouched, "data", "run"), "--quiet")
    return write_config("gs://bucket/tiny", "gs://bucket/data", "gs://bucket/run")


def start(*words) -> subprocess.Popen:
    command = [sys.executable, "-m", "emu3_jax", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_model(bucket, trained, tmp_path, capsys):
    here = {}

    def at_the_checkpoint_of_step_4(method, _, name):
        """Kills the run when some of its checkpoint is there."""
        its = "run/checkpoints/4/"
        if "here" in here and method == "POST" and name.startswith(its) and bucket.names("bucket", its):
            here.pop("here").send_signal(signal.SIGKILL)

    bucket.refuse = at_the_checkpoint_of_step_4
    here["here"] = process = start("train", trained, "--quiet")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, errors
    bucket.refuse = lambda *_: None
    names = bucket.names("bucket", "run/")
    assert "lock" in names and "checkpoints/4/commit_success.txt" not in names
    assert "checkpoints/2/commit_success.txt" in names and any(name.startswith("checkpoints/4/") for name in names)
    assert newest_checkpoint(storage.place("gs://bucket/run"))[0] == 2
    written = losses_there(bucket, tmp_path)
    assert written == losses("run")[: len(written)] and len(written) in (2, 4)

    run("train", trained, "--quiet")
    assert capsys.readouterr().out.splitlines()[-1] == f"gs://bucket/run/model: the model after {STEPS} steps"
    assert losses_there(bucket, tmp_path) == losses("run")
    names = bucket.names("bucket", "run/")
    kept = {name.split("/")[1] for name in names if name.startswith("checkpoints/") and name.count("/") > 1}
    assert kept == {"4", "6"}
    assert {"run.json", "samples/00000006/000.png"} <= set(names)
    assert all(any(name.startswith(f"{folder}/") for name in names) for folder in ("tensorboard", "profile"))
    assert_same_arrays("gs://bucket/run/model", "run/model")
    run("convert", "gs://bucket/run", "-o", "gs://bucket/converted", "--quiet")
    assert_same_arrays("gs://bucket/converted", "run/model")
    run("export", "gs://bucket/run/model", "-o", "gs://bucket/checkpoint", "--layout", "transformers", "--quiet")
    run("export", "run/model", "-o", "checkpoint", "--layout", "transformers", "--quiet")
    assert stored(bucket, "checkpoint") == digests(pathlib.Path("checkpoint"))
    # Once more: it is at its end, and writes its model anew.
    del bucket.buckets["bucket"]["run/model/SHA256SUMS"]
    run("train", trained, "--quiet")
    Bundle.open("gs://bucket/run/model", verify=True)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_hosts_share_data_and_a_run(bucket, vouched):
    """Both hosts prepare shares of the data, and write shares of the checkpoints."""
    source = photos(pathlib.Path("photos"), 24)
    storage.upload(vouched, "gs://bucket/tiny")
    words = ["prepare", source, "--model", vouched, "--keep-size", "--shards", 2, "--quiet"]
    for host in (1, 0):
        run(*words, "--host", host, "--hosts", 2, "-o", "gs://bucket/data")
    run(*words, "-o", "data")
    assert stored(bucket, "data") == digests(pathlib.Path("data"))
    changes = {"mesh": "fsdp=4", "batch_size": 4, "steps": 4, "samples": None, "profile": None}
    config = write_config("gs://bucket/tiny", "gs://bucket/data", "gs://bucket/run", **changes)
    assert Pair("train", config, "--quiet").succeed() == "gs://bucket/run/model: the model after 4 steps"
    assert newest_checkpoint(storage.place("gs://bucket/run"))[0] == 4
    emu3_jax.load("gs://bucket/run/model", verify=True)


# ------------------------------------------------------------------------------------------------ locks


@pytest.fixture
def quick_locks(monkeypatch):
    monkeypatch.setattr(storage.locks, "_BEAT", 0.05)
    monkeypatch.setattr(storage.locks, "_LOOK", 0.05)


def busy(holder: str) -> str:
    return f"in use by {holder}"


def hold(store: Store, **holder) -> None:
    store.put("bucket", "run/held", json.dumps(holder).encode())


def test_a_lock_that_is_renewed_is_respected(bucket, quick_locks, monkeypatch):
    monkeypatch.setattr(storage.locks, "_LOOKS", 1000)  # on a busy machine a renewal may take long
    with storage.held("gs://bucket/run/held", busy):
        with pytest.raises(Emu3Error, match="in use by this process"), storage.held("gs://bucket/run/held", busy):
            pass
        with monkeypatched_mine(), pytest.raises(Emu3Error, match="in use by process 1 on elsewhere"):
            found = bucket.buckets["bucket"]["run/held"]
            found.data = json.dumps({"host": "elsewhere", "process": 1}).encode()  # as if another host held it
            with storage.held("gs://bucket/run/held", busy):
                pass
        assert "run/held" in bucket.buckets["bucket"]
    assert bucket.names("bucket") == []


@contextlib.contextmanager
def monkeypatched_mine():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.locks, "_mine", set())
        yield


@pytest.mark.parametrize(
    "holder",
    [
        {"host": "elsewhere", "process": 1},
        {"host": os.uname().nodename, "process": 2**22 + 1},
        {"host": os.uname().nodename, "process": os.getpid()},
        {"process": []},
    ],
)
def test_a_lock_that_was_left_behind_is_taken_over(holder, bucket, quick_locks):
    hold(bucket, **holder)
    before = bucket.buckets["bucket"]["run/held"].generation
    with storage.held("gs://bucket/run/held", busy):
        assert bucket.buckets["bucket"]["run/held"].generation > before
    assert bucket.names("bucket") == []


def test_a_lock_that_another_run_took_stays_its_own(bucket, quick_locks, caplog):
    with storage.held("gs://bucket/run/held", busy):
        hold(bucket, host="elsewhere", process=1)
        for _ in range(1000):
            if caplog.records:
                break
            time.sleep(0.05)
    assert "another run took this lock and may write to the same place" in caplog.text
    assert bucket.names("bucket") == ["run/held"]
    bucket.buckets["bucket"].clear()

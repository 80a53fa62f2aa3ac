"""Paths in buckets: every kind of result goes there and comes back the same, over a stand-in for Cloud Storage."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from gcs_stand_in import Store, serving
from PIL import Image
from test_two_processes import Pair

import emu3_jax
from emu3_jax import Emu3Error, files, storage
from emu3_jax.checkpoints.adapter import SavedAdapter, write_adapter
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.checkpoints.checksums import write_checksums
from emu3_jax.checkpoints.parts import read_array
from emu3_jax.cli.main import main
from emu3_jax.data.shards import PreparedData
from emu3_jax.evaluation import run as evaluation
from emu3_jax.models.adapters import MATRICES, Adapter
from emu3_jax.training.config import SampleConfig
from emu3_jax.training.metrics import read_metrics
from emu3_jax.training.run_directory import newest_checkpoint

pytest.importorskip("gcsfs", reason="the extra gcs is not installed")
pytestmark = [
    pytest.mark.compiled_quickly,
    pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning"),  # by gcsfs, of each piece of a file
]

STEPS = 6


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The server; clients in this process and in those that it starts find it."""
    with pytest.MonkeyPatch.context() as patch, serving() as served:
        patch.setenv("STORAGE_EMULATOR_HOST", served.url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", served.url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
        patch.setenv("EMU3_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield served


@pytest.fixture
def bucket(store, tmp_path, monkeypatch):
    """An empty bucket, `gs://bucket`. At the end no lock is left, and nothing local named after an address."""
    monkeypatch.chdir(tmp_path)
    store.bucket("bucket")
    yield store
    store.refuse = lambda *_: None
    assert [name for name in store.names("bucket") if "lock" in name] == []
    assert [name for name in os.listdir(tmp_path) if ":" in name or name == "gs"] == []


@pytest.fixture(scope="module")
def vouched(tiny_bundle, tmp_path_factory) -> pathlib.Path:
    """The tiny bundle with its checksums."""
    copy = tmp_path_factory.mktemp("vouched") / "tiny"
    shutil.copytree(tiny_bundle, copy)
    write_checksums(copy)
    return copy


def photos(directory: pathlib.Path, count: int = 5) -> pathlib.Path:
    directory.mkdir()
    draw = np.random.default_rng(0)
    for index in range(count):
        Image.fromarray(draw.integers(0, 256, (24, 24, 3), np.uint8)).save(directory / f"{index}.png")
        (directory / f"{index}.txt").write_text(f"photo {index}")
    return directory


def digests(directory: pathlib.Path) -> dict[str, str]:
    found = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def stored(store: Store, prefix: str) -> dict[str, str]:
    names = store.names("bucket", f"{prefix}/")
    return {name: hashlib.sha256(store.read("bucket", f"{prefix}/{name}")).hexdigest() for name in names}


def run(*words) -> None:
    assert main([str(word) for word in words]) == 0


def assert_same_arrays(first, second) -> None:
    """Two bundles have the same weights."""
    for part in ("decoder", "vision"):
        ours, theirs = ({param.path: a for param, a in Bundle.open(p).arrays(part)} for p in (first, second))
        assert ours.keys() == theirs.keys()
        for path, array in ours.items():
            np.testing.assert_array_equal(array, theirs[path])


def line_of(capsys, *words) -> str:
    """The one line of a command that must fail."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and len(line) <= 320, line
    return line


# ------------------------------------------------------------------------------------------------ outputs


def test_pictures_and_codes_go_there(bucket, tiny_bundle, capsys):
    words = ["--model", tiny_bundle, "--quiet"]
    for out in ("out", "gs://bucket/a/out"):
        run("generate", "a cat", "a dog", "--save-tokens", *words, "-o", out)
    assert capsys.readouterr().out.splitlines()[2:] == ["gs://bucket/a/out/000.png", "gs://bucket/a/out/001.png"]
    assert stored(bucket, "a/out") == digests(pathlib.Path("out")) and len(stored(bucket, "a/out")) == 3
    run("tokenize", "out/000.png", "out/001.png", *words, "-o", "codes.npz")
    run("tokenize", "out/000.png", "out/001.png", *words, "-o", "gs://bucket/codes.npz")
    assert bucket.read("bucket", "codes.npz") == pathlib.Path("codes.npz").read_bytes()
    run("detokenize", "codes.npz", *words, "-o", "back")
    run("detokenize", "codes.npz", *words, "-o", "gs://bucket/back")
    assert stored(bucket, "back") == digests(pathlib.Path("back"))
    for command in (
        ("generate", "a cow", "-o", "gs://bucket/a/out"),
        ("tokenize", "x.png", "-o", "gs://bucket/codes.npz"),
    ):
        line = line_of(capsys, *command, "--model", "absent", "--no-clobber")
        assert line.startswith(f"emu3-jax: error: {command[-1].removesuffix('out')}") and "exists already" in line
    run("generate", "a cow", *words, "-o", "gs://bucket/a/out")  # of the same names: replaced, as in a folder
    assert capsys.readouterr().err == "emu3-jax: replaced gs://bucket/a/out/000.png\n"
    assert stored(bucket, "a/out").keys() == {"000.png", "001.png", "tokens.npz"}
    assert stored(bucket, "a/out")["001.png"] == digests(pathlib.Path("out"))["001.png"]


def test_bundles_and_checkpoints_go_there_and_back(bucket, tiny_bundle, capsys):
    run("export", tiny_bundle, "-o", "published", "--layout", "upstream", "--quiet")
    sources = ["published/language_model", "published/vision_tokenizer"]
    run("convert", *sources, "-o", "gs://bucket/bundle", "--quiet")
    names = {name.split("/")[0] for name in stored(bucket, "bundle")}
    assert names == {"decoder", "vision", "tokenizer", "SHA256SUMS"}
    puts = [name for method, _, name in bucket.requests if method == "POST" and name.startswith("bundle/")]
    assert puts[-1] == "bundle/SHA256SUMS" and {name.split("/")[-1] for name in puts[-4:-1]} == {"config.json"}
    assert "exists already" in line_of(capsys, "convert", *sources, "-o", "gs://bucket/bundle", "--quiet")
    assert "exists already" in line_of(capsys, "convert", *sources, "-o", "gs://bucket/bundle/decoder", "--quiet")

    run("export", "gs://bucket/bundle", "-o", "gs://bucket/checkpoint", "--layout", "upstream", "--quiet")
    run("export", "gs://bucket/bundle", "--verify", "-o", "checkpoint", "--layout", "upstream", "--quiet")
    assert stored(bucket, "checkpoint") == digests(pathlib.Path("checkpoint")) == digests(pathlib.Path("published"))
    parts = [f"gs://bucket/checkpoint/{part}" for part in ("language_model", "vision_tokenizer")]
    run("convert", *parts, "-o", "again", "--quiet")
    assert_same_arrays("again", tiny_bundle)


def test_quantised_bundles_go_there_and_are_read_there(bucket, tiny_bundle, capsys):
    run("export", tiny_bundle, "-o", "published", "--layout", "upstream", "--quiet")
    run("convert", "published/language_model", "-o", "gs://bucket/at-once", "--quantize", "int8", "--quiet")
    run("convert", "published/language_model", "-o", "gs://bucket/full", "--quiet")
    run("quantize", "gs://bucket/full", "-o", "gs://bucket/after", "--verify", "--quiet")
    local = emu3_jax.load(tiny_bundle, quantize="int8").language
    for name in ("at-once", "after"):
        found = emu3_jax.load(f"gs://bucket/{name}").language
        jax.tree.map(np.testing.assert_array_equal, found.params, local.params)
        assert found.quantize == "int8" and stored(bucket, name).keys() >= {"SHA256SUMS", "decoder/config.json"}
    line = line_of(capsys, "quantize", "gs://bucket/after", "-o", "gs://bucket/again", "--quiet")
    assert "gs://bucket/after is quantised (int8)" in line and not stored(bucket, "again")
    assert "exists already" in line_of(capsys, "quantize", "gs://bucket/full", "-o", "gs://bucket/after", "--quiet")


def test_prepared_data_goes_there(bucket, tiny_bundle, capsys):
    source = photos(pathlib.Path("photos"), 40)
    words = ["prepare", source, "--model", tiny_bundle, "--keep-size", "--shards", 2, "--validation", 0.2, "--quiet"]
    run(*words, "-o", "data")
    run(*words, "-o", "gs://bucket/data")
    said = capsys.readouterr().out.splitlines()
    assert said[2:] == [line.replace("data", "gs://bucket/data", 1) for line in said[:2]]
    assert stored(bucket, "data") == digests(pathlib.Path("data"))
    assert len(PreparedData(storage.place("gs://bucket/data"))) == len(PreparedData(pathlib.Path("data")))
    # What is finished is kept, and a shard that is missing is made again.
    del bucket.buckets["bucket"]["data/shard-00001-of-00002.arrayrecord"]
    bucket.requests.clear()
    run(*words, "-o", "gs://bucket/data")
    assert stored(bucket, "data") == digests(pathlib.Path("data"))
    written = [name for method, _, name in bucket.requests if method == "POST" and name.endswith(".arrayrecord")]
    assert written == ["data/shard-00001-of-00002.arrayrecord"]
    line = line_of(
        capsys, "prepare", source, "--model", tiny_bundle, "--shards", 2, "-o", "gs://bucket/data", "--quiet"
    )
    assert "gs://bucket/data holds data prepared from another source" in line


def test_evaluations_go_there(bucket):
    evaluation.check_directory("gs://bucket/evaluation")
    evaluation.write("gs://bucket/evaluation", {"figure": 1.0}, "<html>")
    assert json.loads(bucket.read("bucket", "evaluation/evaluation.json")) == {"figure": 1.0}
    assert bucket.read("bucket", "evaluation/index.html") == b"<html>"
    bucket.put("bucket", "file", b"")
    with pytest.raises(Emu3Error, match=r"gs://bucket/file is a file: choose a directory"):
        evaluation.check_directory("gs://bucket/file")


def test_a_failed_upload_leaves_nothing_new(bucket, tmp_path):
    bucket.put("bucket", "out/b", b"old")
    bucket.refuse = lambda method, _, name: 403 if method == "POST" and name == "out/config.json" else None
    with (
        pytest.raises(Emu3Error, match=r"^gs://bucket/out: access is denied: log in"),
        files.files_into("gs://bucket/out") as new,
    ):
        for name in ("a", "b", "config.json"):
            (new / name).write_text(name)
    assert bucket.names("bucket") == ["out/b"]
    with pytest.raises(ValueError, match="of the caller"), files.new_directory("gs://bucket/new", 0) as new:
        (new / "a").write_text("a")
        raise ValueError("of the caller")
    assert bucket.names("bucket") == ["out/b"] and not new.exists()


def test_places_that_are_taken(bucket):
    bucket.put("bucket", "folder/a", b"")
    bucket.put("bucket", "file", b"")
    with pytest.raises(Emu3Error, match="gs://bucket/folder: it is a directory"), files.new_file("gs://bucket/folder"):
        pass
    for write in (files.files_into, files.shared_directory):
        with pytest.raises(Emu3Error, match="gs://bucket/file is a file"), write("gs://bucket/file"):
            pass
    for name in ("folder", "file"):
        with pytest.raises(Emu3Error, match="exists already"), files.new_directory(f"gs://bucket/{name}", 0):
            pass
    reason = r"the local copy of new needs 1000000.00 GB: free space or set TMPDIR"
    with pytest.raises(Emu3Error, match=reason), files.new_directory("gs://bucket/new", 10**15):
        pass


def test_large_files_go_in_pieces(bucket, tmp_path):
    data = np.random.default_rng(0).bytes(60 << 20)
    (tmp_path / "large").write_bytes(data)
    storage.upload(tmp_path / "large", "gs://bucket/large")
    assert bucket.read("bucket", "large") == data
    storage.download("gs://bucket/large", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data


# ------------------------------------------------------------------------------------------------ inputs


def cached(store: Store) -> list[str]:
    """The files of all copies, by their paths in the bucket."""
    copies = pathlib.Path(os.environ["EMU3_JAX_CACHE"], "buckets")
    return sorted("/".join(path.relative_to(copies).parts[1:]) for path in copies.rglob("*") if path.is_file())


@pytest.fixture
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EMU3_JAX_CACHE", str(tmp_path / "cache"))


def test_weights_are_read_where_they_lie(bucket, cache, vouched):
    storage.upload(vouched, "gs://bucket/tiny")
    model = emu3_jax.load("gs://bucket/tiny")
    assert model.name == "tiny"
    assert not [name for name in cached(bucket) if "/weights/" in name] and len(cached(bucket)) == 6
    here = emu3_jax.load(vouched)
    assert_same_arrays("gs://bucket/tiny", vouched)
    assert np.array_equal(*(m.generate(["a"], seed=1, progress=False)[0] for m in (model, here)))
    bucket.requests.clear()
    Bundle.open("gs://bucket/tiny/")
    assert [name for method, _, name in bucket.requests if name] == []  # only the listing


def test_a_bundle_that_changed_is_copied_anew(bucket, cache, vouched):
    storage.upload(vouched, "gs://bucket/tiny")
    assert Bundle.open("gs://bucket/tiny").template == "chat"
    config = json.loads(bucket.read("bucket", "tiny/tokenizer/config.json"))
    bucket.put("bucket", "tiny/tokenizer/config.json", json.dumps({**config, "template": "stage1"}).encode())
    assert Bundle.open("gs://bucket/tiny").template == "stage1"


def test_verify_reads_everything(bucket, cache, vouched, capsys):
    storage.upload(vouched, "gs://bucket/tiny")
    assert Bundle.open("gs://bucket/tiny", verify=True).path.is_relative_to(os.environ["EMU3_JAX_CACHE"])
    name = next(name for name in bucket.names("bucket") if "/decoder/weights/" in name and "/d/" in name)
    data = bytearray(bucket.read("bucket", name))
    data[len(data) // 2] ^= 1
    bucket.put("bucket", name, data)
    line = line_of(capsys, "generate", "a", "--model", "gs://bucket/tiny", "--verify", "-o", "out", "--quiet")
    assert "is damaged, its checksum differs" in line


def test_an_incomplete_bundle(bucket, cache, vouched, capsys):
    storage.upload(vouched, "gs://bucket/tiny")
    name = next(name for name in bucket.names("bucket") if "/decoder/weights/" in name and "/d/" in name)
    del bucket.buckets["bucket"][name]
    words = ("generate", "a", "--model", "gs://bucket/tiny", "-o", "out", "--quiet")
    line = line_of(capsys, *words)
    assert "gs://bucket/tiny/decoder/weights holds" in line and "config.json says" in line
    del bucket.buckets["bucket"]["tiny/vision/config.json"]  # as if its process had been killed
    assert "gs://bucket/tiny/vision has no config.json, so its upload did not end" in line_of(capsys, *words)


def test_no_access_is_no_damage(bucket, cache, vouched):
    storage.upload(vouched, "gs://bucket/tiny")
    opened = Bundle.open("gs://bucket/tiny")
    for read in (lambda: opened.load_decoder(), lambda: read_array(opened.weights("decoder"), ("embed", "embedding"))):
        # Of many arrays Orbax asks gcsfs for their list first; TensorStore alone asks for one.
        bucket.refuse = lambda method, _, name: 403 if "/decoder/weights/" in name else None
        with pytest.raises(Emu3Error, match=r"^gs://bucket/tiny/decoder/weights: access is denied: log in"):
            read()
    bucket.refuse = lambda *_: None
    assert opened.load_decoder()


def test_a_copy_is_whole_or_not_there(bucket, cache, tmp_path):
    bucket.put("bucket", "data/a", b"a" * 100)
    bucket.put("bucket", "data/b", b"b" * 100)
    bucket.put("bucket", "data/", b"")  # as the console makes folders
    bucket.refuse = lambda method, _, name: 403 if name == "data/b" else None
    with pytest.raises(Emu3Error, match=r"^gs://bucket/data: access is denied"):
        storage.fetched("gs://bucket/data")
    assert cached(bucket) == ["data/a"]
    bucket.refuse = lambda method, _, name: 403 if name == "data/a" else None  # which is not asked for again
    copy = storage.fetched("gs://bucket/data")
    assert (copy / "b").read_bytes() == b"b" * 100 and cached(bucket) == ["data/a", "data/b"]
    bucket.put("bucket", "evil/../../x", b"")
    with pytest.raises(Emu3Error, match=r"is not a legal path inside the directory"):
        storage.fetched("gs://bucket/evil")


def test_adapters_are_written_and_read_there(bucket, cache, vouched):
    bundle, adapter, draw = Bundle.open(vouched), Adapter(rank=3, base="float32"), np.random.default_rng(0)
    params = [param for param in bundle.params("decoder") if param.path[-1] in adapter.targets]
    sides = [side for param in params for side in param.low_rank(MATRICES[param.path[-1]].inputs, adapter.rank)]
    arrays = {side.path: draw.standard_normal(side.shape, np.float32) for side in sides}
    for target in ("adapter", "gs://bucket/run/adapter"):
        write_adapter(target, adapter, bundle.decoder_config, arrays.__getitem__, bundle=bundle, step=1)
        run("merge", vouched, "--adapter", target, "--verify", "-o", target.replace("adapter", "merged"), "--quiet")
    assert stored(bucket, "run/adapter") == digests(pathlib.Path("adapter"))
    assert SavedAdapter.open("gs://bucket/run/adapter", bundle).name == "run/adapter"
    assert_same_arrays("gs://bucket/run/merged", "merged")


# ------------------------------------------------------------------------------------------------ what is not there


@pytest.mark.parametrize("word", ["generate", "tokenize", "prepare", "convert", "export", "train"])
def test_absent_buckets_and_no_credentials(word, bucket, tiny_bundle, golden_checkpoint, capsys):
    photos(pathlib.Path("photos"), 2)
    bucket.bucket("private", private=True)
    for name, reason in (("absent", "bucket does not exist"), ("private", "gcloud auth application-default login")):
        out = ["-o", f"gs://{name}/out", "--quiet"]
        words = {
            "generate": ["a", "--model", tiny_bundle, *out],
            "tokenize": ["photos/0.png", "--model", tiny_bundle, "-o", f"gs://{name}/c.npz", "--quiet"],
            "prepare": ["photos", "--model", tiny_bundle, *out],
            "convert": [golden_checkpoint / "lm", *out],
            "export": [tiny_bundle, "--layout", "upstream", *out],
            "train": [write_config(tiny_bundle, "none", f"gs://{name}/run"), "--quiet"],
        }
        if word == "train":
            run("prepare", "photos", "--model", tiny_bundle, "--keep-size", "-o", "none", "--quiet")
        line = line_of(capsys, word, *words[word])
        assert reason in line and line.startswith(f"emu3-jax: error: gs://{name}/")
        for read in (
            ["generate", "a", "--model", f"gs://{name}/b"],
            ["export", f"gs://{name}/b", "--layout", "upstream"],
        ):
            line = line_of(capsys, *read, "-o", "out")
            assert reason in line and line.startswith(f"emu3-jax: error: gs://{name}/b: ")
    assert bucket.buckets["private"] == {}
    assert not pathlib.Path("out").exists()


@pytest.mark.parametrize(
    ("gcsfs", "tensorstore"),
    [("http://localhost:1", None), (None, "http://localhost:1"), ("http://localhost:1", "http://localhost:2")],
)
def test_emulators_are_named_to_both_libraries(gcsfs, tensorstore, monkeypatch):
    storage.requests.client.cache_clear()
    for name, value in (("STORAGE_EMULATOR_HOST", gcsfs), ("TENSORSTORE_GCS_HTTP_URL", tensorstore)):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    with pytest.raises(Emu3Error, match=r"'http://localhost:1'.*must name one emulator: set both .* or neither"):
        storage.place("gs://bucket/model")


def test_absent_objects(bucket, tiny_bundle, capsys):
    line = line_of(capsys, "generate", "a", "--model", "gs://bucket/none", "-o", "out")
    assert "gs://bucket/none: the bucket holds nothing with this name" in line
    line = line_of(capsys, "convert", "gs://bucket/none", "-o", "out")
    assert "gs://bucket/none: the bucket holds nothing with this name" in line
    config = write_config(tiny_bundle, "gs://bucket/none", "gs://bucket/run")
    assert "gs://bucket/none: the bucket holds nothing with this name" in line_of(capsys, "train", config, "--quiet")
    with pytest.raises(
        Emu3Error, match="gs://bucket/none: this bucket does not exist, or holds nothing with this name"
    ):
        storage.download("gs://bucket/none", pathlib.Path("x"))


# ------------------------------------------------------------------------------------------------ runs


def write_config(bundle, data, directory, **changes) -> pathlib.Path:
    """A config file of a short run."""
    fields = {
        "steps": STEPS, "checkpoint_every": 2, "batch_size": 2, "mesh": "fsdp=1", "profile": (1, 1),
        "samples": SampleConfig(("a",), every=STEPS), **changes,
    }  # fmt: skip
    pathlib.Path("config.py").write_text(
        f"""
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import TextToImage
from emu3_jax.training.config import ModelConfig, OptimizerConfig, SampleConfig, TrainConfig

def config():
    return TrainConfig(
        directory={str(directory)!r},
        model=ModelConfig({str(bundle)!r}, dtype="float32"),
        data=DataConfig((Source({str(data)!r}, TextToImage()),), sequence_length=64, packing=2),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        keep=2,
        **{fields!r},
    )
"""
    )
    return pathlib.Path("config.py")


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

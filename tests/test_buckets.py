"""Paths in buckets: every kind of result goes there and comes back the same, over a stand-in for Cloud Storage."""

import json
import os
import pathlib

import jax
import numpy as np
import pytest
from bucket_cases import assert_same_arrays, digests, line_of, photos, run, stored, write_config
from gcs_stand_in import Store

import emu3_jax
from emu3_jax import Emu3Error, files, storage
from emu3_jax.checkpoints.adapter import SavedAdapter, write_adapter
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.checkpoints.parts import read_array
from emu3_jax.data.shards import PreparedData
from emu3_jax.evaluation import run as evaluation
from emu3_jax.models.adapters import MATRICES, Adapter

pytest.importorskip("gcsfs", reason="the extra gcs is not installed")
pytestmark = [
    pytest.mark.compiled_quickly,
    pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning"),  # by gcsfs, of each piece of a file
]


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


def test_a_shard_is_copied_when_it_is_read(bucket, cache, tiny_bundle):
    source = photos(pathlib.Path("photos"), 12)
    run("prepare", source, "--model", tiny_bundle, "--keep-size", "--shards", 3, "--quiet", "-o", "gs://bucket/data")
    data = PreparedData(storage.place("gs://bucket/data"))
    assert cached(bucket) == ["data/index.json"]
    names = [data[0].name, data[3].name]
    assert cached(bucket) == ["data/index.json", "data/shard-00000-of-00003.arrayrecord"]
    bucket.refuse = lambda method, _, name: 403 if name.startswith("data/shard-00001") else None
    with pytest.raises(Emu3Error, match=r"^gs://bucket/data: access is denied"):
        data[4]
    bucket.refuse = lambda *_: None
    assert len({*names, data[4].name, data[11].name}) == 4 and len(cached(bucket)) == 4
    assert [data[0].name, data[3].name] == names
    # A shard that is cut in the bucket is found before anything is copied.
    shard = bucket.read("bucket", "data/shard-00002-of-00003.arrayrecord")
    bucket.put("bucket", "data/shard-00002-of-00003.arrayrecord", shard[:100])
    with pytest.raises(Emu3Error, match=r"shard-00002-of-00003.arrayrecord has 100 bytes, but index.json says"):
        PreparedData(storage.place("gs://bucket/data"))


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

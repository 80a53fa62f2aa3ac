"""`emu3-jax sample`: pictures as `generate` draws them, with log-probabilities; shards, resuming, hosts, bad input."""

import hashlib
import os
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

import emu3_jax
from emu3_jax import Emu3Error, storage
from emu3_jax.cli.main import main
from emu3_jax.data.pairs import PreparedPairs
from emu3_jax.data.shards import PreparedData, write_json
from emu3_jax.generation.language import Batching
from emu3_jax.preference import sampling
from emu3_jax.preference.samples import DrawnSample, Samples
from emu3_jax.preference.sampling import Request, sample, weights_digest

pytestmark = pytest.mark.compiled_quickly

PROMPTS = ("a red star", "a blue heart", "a green cat")
OPTIONS = ("-n", "2", "--guidance", "1", "3", "--seed", "5", "--batch-size", "4", "--shards", "3", "--quiet")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> pathlib.Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n\n".join(PROMPTS) + "\n")
    return file


@pytest.fixture(scope="module")
def command(tiny_bundle, prompts):
    """Runs `emu3-jax sample` on the tiny bundle; returns its exit code."""

    def run(output: pathlib.Path, *options: str, file: pathlib.Path = prompts) -> int:
        return main(["sample", str(file), *OPTIONS, "--model", str(tiny_bundle), "-o", str(output), *options])

    return run


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, command) -> pathlib.Path:
    output = tmp_path_factory.mktemp("samples") / "samples"
    assert command(output, "--png") == 0
    return output


def contents(directory: pathlib.Path) -> dict[str, str]:
    """Hashes of all files."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_samples_are_the_pictures_of_generate(drawn, tiny_bundle):
    samples, model = Samples(drawn), emu3_jax.load(tiny_bundle)
    assert len(samples) == 12 and [len(group) for group in samples.groups()] == [4, 4, 4]
    for scale, first in ((1.0, 0), (3.0, 2)):
        made = model.generate_sequences(PROMPTS, n=2, guidance=scale, seed=5, batch_size=4)
        for index, generation in enumerate(made):
            one = samples[index // 2 * 4 + first + index % 2]
            np.testing.assert_array_equal(one.codes, generation.codes)
            info = generation.image.info
            assert (one.prompt, one.group, one.guidance) == (PROMPTS[index // 2], index // 2, scale)
            assert (one.seed, one.number) == (5 + index, index // 2 * 4 + first + index % 2)
            picture = Image.open(drawn / "png" / f"{one.number:06d}.png")
            np.testing.assert_array_equal(np.asarray(picture), np.asarray(generation.image))
            assert picture.info == {name: value for name, value in info.items() if name != "passes"}
            # 64 codes are fewer than the top k: without guidance both distributions are the same.
            assert np.allclose(one.log_probs, one.model_log_probs, atol=1e-5) == (scale == 1.0)
            assert one.log_probs.shape == one.codes.shape and one.log_prob == pytest.approx(one.log_probs.sum(), 1e-5)
            assert one.model_log_prob < 0
    assert sorted(os.listdir(drawn / "png")) == [f"{number:06d}.png" for number in range(12)]
    assert weights_digest(model.language) != weights_digest(emu3_jax.load(tiny_bundle, dtype="bfloat16").language)


def test_a_killed_run_goes_on_and_ends_equal(drawn, command, tmp_path, monkeypatch, capsys):
    output = tmp_path / "samples"
    measure, shards = sampling.visual_log_probs, []

    def stop(*arguments, **options):
        shards.append(1)
        if len(shards) > 2:  # after both scales of the first shard
            raise KeyboardInterrupt
        return measure(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(sampling, "visual_log_probs", stop)
        assert command(output, "--png") == 130
    assert [file.name for file in sorted(output.glob("shard-*"))] == [
        "shard-00000-of-00003.arrayrecord",
        "shard-00000-of-00003.json",
    ]
    monkeypatch.setattr(sampling, "visual_log_probs", lambda *a, **o: shards.append(2) or measure(*a, **o))
    assert command(output, "--png") == 0
    assert shards.count(2) == 4 and contents(output) == contents(drawn)
    # Nothing is drawn again, only a picture that is missing is written.
    (output / "png" / "000004.png").unlink()
    assert command(output, "--png") == 0
    assert shards.count(2) == 4 and contents(output) == contents(drawn)
    assert f"{output}: 12 samples of 3 prompts\n" in capsys.readouterr().out
    # Another request does not mix with these samples.
    assert command(output, "--seed", "6") == 2
    line = "holds samples of other prompts, of other options or of another model: choose another directory"
    assert line in capsys.readouterr().err
    assert contents(output) == contents(drawn)


def test_two_hosts_share_the_shards(drawn, command, tmp_path, capsys):
    output = tmp_path / "samples"
    assert command(output, "--host", "1", "--hosts", "2") == 0
    assert "2 shards of other hosts are not written yet" in capsys.readouterr().out
    assert not (output / "index.json").exists()
    with pytest.raises(Emu3Error, match=r"has no index\.json: give a directory that emu3-jax sample wrote, or"):
        Samples(output)
    assert command(output, "--host", "0", "--hosts", "2") == 0
    expected = {name: digest for name, digest in contents(drawn).items() if not name.startswith("png/")}
    assert contents(output) == expected


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--guidance", "3", "3"), "guidance is [3.0, 3.0]: give at least one scale, and none twice"),
        (("--guidance", "-1"), "guidance is -1.0: it must be a number from 0 to 1e9"),
        (("--seed", "4294967295"), "seed is 4294967296: it must be a whole number from 0 to 2**32 - 1"),
        (("--shards", "4"), "shards is 4: it must be 1 to 3, the number of prompts"),
        (("-n", "100000", "--guidance", "1", "2", "3", "4"), "3 prompts x 100000 pictures x 4 guidance scales are"),
        (("--host", "2", "--hosts", "2"), "host is 2 of 2: hosts must be at least 1"),
        (("--ratio", "nonsense"), "ratio"),
        (("--mesh", "tensor=64"), "mesh tensor=64 needs 64 devices, but only 8 are available"),
        (("--negative", "<|image start|>"), "control token"),
    ],
)
def test_bad_options_are_named_and_nothing_is_written(options, line, command, tmp_path, capsys):
    assert command(tmp_path / "samples", *options) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("emu3-jax: error: ") and line in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_bad_prompts_and_directories_are_named(drawn, command, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n" + "word " * 300 + "\n")
    assert command(tmp_path / "samples", file=file) == 2
    assert f"{file} line 3: " in capsys.readouterr().err
    file.write_text("a dog\n\na <|image token|> cat\n")
    assert command(tmp_path / "samples", file=file) == 2
    assert f"{file} line 3: the text contains the special token <|image token|>" in capsys.readouterr().err
    assert command(tmp_path / "samples", file=tmp_path / "none.txt") == 2
    assert "there is no such file" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["prompts.txt"]
    with pytest.raises(Emu3Error, match=r"holds samples \(emu3-jax sample wrote it\), but records are needed"):
        PreparedData(drawn)


def test_damaged_samples_are_named(drawn, tmp_path):
    one = Samples(drawn)[3]
    data = one.to_bytes()
    again = DrawnSample.from_bytes(data)
    assert again.to_bytes() == data and again.prompt == one.prompt
    np.testing.assert_array_equal(again.log_probs, one.log_probs)
    for damaged in (data[:-1], data + b"x", data.replace(b'"seed": ', b'"seed": -'), b"{}\n", b"\xff"):
        with pytest.raises(Emu3Error, match=r"the (sample|record) is damaged"):
            DrawnSample.from_bytes(damaged)
    copy = tmp_path / "copy"
    shutil.copytree(drawn, copy)
    shard = copy / "shard-00001-of-00003.arrayrecord"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(Emu3Error, match="delete this shard and run the same emu3-jax sample again"):
        Samples(copy)


def test_requests_say_what_is_wrong(tiny_bundle, tmp_path):
    model = emu3_jax.load(tiny_bundle)
    with pytest.raises(Emu3Error, match="n is 0: it must be a whole number >= 1"):
        Request(["x"], 0)
    with pytest.raises(Emu3Error, match="zipar changes the distribution that tokens are sampled from"):
        sample(model, Request(["x"], 1), tmp_path / "x", batching=Batching(zipar=2))
    with pytest.raises(Emu3Error, match="pictures are written to local directories only"):
        sample(model, Request(["x"], 1), "gs://bucket/x", png=True)


@pytest.mark.slow
def test_a_mesh_and_a_bucket_give_the_same(store, drawn, command, tiny_bundle, capsys, tmp_path, monkeypatch):
    """The whole way in a bucket: samples of a model on four devices, rewards beside them, pairs."""
    store.bucket("bucket")
    monkeypatch.setenv("EMU3_JAX_CACHE", str(tmp_path))
    output = "gs://bucket/samples"
    assert command(output, "--mesh", "data=2,tensor=2") == 0
    found, expected = Samples(storage.place(output)), Samples(drawn)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.codes, other.codes)
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-4)
    assert main(["score", output, "--reward", "procedural", "--model", str(tiny_bundle), "--quiet"]) == 2
    assert "all 3 prompts were skipped" in capsys.readouterr().err
    rewards = {group: [float(group), 1.0, 2.0, -1.0] for group in range(3)}
    for number in range(3):
        data = {
            "format": 1, "samples": found.index.job, "reward": {}, "rewards": {number: rewards[number]}, "skipped": {},
        }  # fmt: skip
        write_json(storage.place(f"{output}/rewards/mine/shard-{number:05d}-of-00003.json"), data)
    assert main(["pairs", output, "-o", "gs://bucket/pairs"]) == 0
    pairs = PreparedPairs(storage.place("gs://bucket/pairs"))
    assert [pair.margin for pair in (pairs[index] for index in range(3))] == [3.0, 3.0, 3.0]

"""Training through the command line: data of another vision tokenizer, and records that are skipped."""

import json
import pathlib

import numpy as np
import pytest
import tiny_bundle as tiny
from PIL import Image

from emu3_jax.benchmarks.vision import random_weights
from emu3_jax.checkpoints.bundle import Bundle, LazyArray, write_part
from emu3_jax.cli.main import main
from emu3_jax.data.encoder import bundle_codebook
from emu3_jax.models.quantizer import CODEBOOK
from emu3_jax.training.config import load_config
from emu3_jax.training.loop import train
from emu3_jax.training.metrics import read_metrics

LENGTH = 24
CONFIG = """
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import {task}
from emu3_jax.training.config import ModelConfig, OptimizerConfig, SampleConfig, TrainConfig


def config():
    return TrainConfig(
        directory="{root}/run",
        model=ModelConfig("{bundle}", dtype="float32", remat="none"),
        data=DataConfig((Source("{root}/{data}", {task}()),), sequence_length=128, packing=0),
        batch_size=1,
        steps=4,
        optimizer=OptimizerConfig(warmup_steps=1),
        mesh="fsdp=1",
        evaluation=(("held out", Source("{root}/{data}", {task}())),),
        samples={samples},
    )
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_bundle) -> pathlib.Path:
    """A folder with data `pictures` and `texts` of the tiny bundle, and `foreign` of the bundle `theirs`."""
    root = tmp_path_factory.mktemp("guards")
    pixels = np.random.default_rng(0).integers(0, 256, (tiny.SIDE, tiny.SIDE, 3), np.uint8)
    Image.fromarray(pixels).save(root / "picture.png")
    # Two of three texts are longer than a row of `LENGTH` tokens.
    texts = ["short", "long " * LENGTH, "longer " * 2 * LENGTH]
    manifests = {"pictures": [{"image": "picture.png", "text": "a"}], "texts": [{"text": text} for text in texts]}
    for name, lines in manifests.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    weights = random_weights(tiny.VISION)
    weights[CODEBOOK] = -weights[CODEBOOK]
    (root / "theirs").mkdir()
    config = {"vision": tiny.VISION.to_dict(), "image": tiny.IMAGE.to_dict(), "num_batches_tracked": {}}
    lazy = [LazyArray(path, x.shape, x.dtype, lambda x=x: x) for path, x in weights.items()]
    write_part(root / "theirs" / "vision", config, lazy)
    for manifest, model, name in (
        ("pictures", tiny_bundle, "pictures"),
        ("pictures", root / "theirs", "foreign"),
        ("texts", tiny_bundle, "texts"),
    ):
        command = ["prepare", f"{root}/{manifest}.jsonl", "--model", str(model), "--keep-size", "--quiet"]
        assert main([*command, "-o", f"{root}/{name}"]) == 0
    return root


@pytest.fixture
def command(root, tiny_bundle, tmp_path):
    """Makes the arguments of a command that trains in `tmp_path/run`."""

    def arguments(task="TextToImage", data="pictures", bundle=tiny_bundle, samples="None", **fields) -> list[str]:
        (tmp_path / "config.py").write_text(
            CONFIG.format(root=root, bundle=bundle, task=task, data=data, samples=samples)
        )
        settings = {"directory": tmp_path / "run", **fields}
        return ["train", f"{tmp_path}/config.py", *(f"--set={name}={value}" for name, value in settings.items())]

    return arguments


@pytest.mark.parametrize("place", ["data.sources.0.path", "evaluation.0.1.path"])
def test_data_of_another_vision_tokenizer(command, root, tiny_bundle, tmp_path, capsys, place):
    assert main(command(**{place: f"{root}/foreign"})) == 2
    said = capsys.readouterr()
    ours, theirs = (bundle_codebook(Bundle.open(bundle)).sha256[:12] for bundle in (tiny_bundle, root / "theirs"))
    assert ours != theirs and said.out == "" and said.err.count("\n") == 1
    assert f"{root}/foreign was prepared with another vision tokenizer" in said.err
    assert f"the checksum of its codebook is {theirs}, that of the model's is {ours}; prepare the data" in said.err
    assert not (tmp_path / "run").exists()


def test_samples_without_a_vision_tokenizer(command, tiny_bundle, tmp_path, capsys):
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for part in ("decoder", "tokenizer"):
        (bundle / part).symlink_to(tiny_bundle / part)
    assert main(command(bundle=bundle, samples="SampleConfig(('a',))")) == 2
    said = capsys.readouterr().err
    assert "bundle has no vision part: make a bundle with it" in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_their_own_data_trains_and_skips_nothing(command, tiny_bundle, tmp_path, capsys):
    assert main(command(steps=2)) == 0
    model = tmp_path / "run" / "model"
    assert capsys.readouterr().out == f"{model}: the model after 2 steps\n"
    assert all("skipped" not in line for line in read_metrics(tmp_path / "run"))
    assert bundle_codebook(Bundle.open(model)) == bundle_codebook(Bundle.open(tiny_bundle))


def test_skipped_records_are_told(command, tmp_path, capsys):
    fields = {"data.sequence_length": LENGTH, "data.too_long": "skip", "data.packing": 2, "log_every": 2}
    arguments = command("TextOnly", "texts", **fields)
    assert main([*arguments, "--set=steps=2"]) == 0
    directory = tmp_path / "run"
    counts = {line["step"]: line["skipped"] for line in read_metrics(directory) if line["group"] == "train"}
    assert list(counts) == [2] and counts[2] >= 2
    assert f"{directory}: {counts[2]:.0f} records were longer than {LENGTH} tokens and were skipped" in (
        capsys.readouterr().out
    )
    # The run goes on, and so does the count.
    _, file, *overrides = arguments
    outcome = train(load_config(file, [override.removeprefix("--set=") for override in overrides]), progress=True)
    lines = read_metrics(directory)
    counts |= {line["step"]: line["skipped"] for line in lines if line["group"] == "train"}
    assert list(counts) == [2, 4] and counts[2] < counts[4] == outcome.skipped
    assert [line["skipped"] for line in lines if line["group"] == "evaluation/held out"] == [2, 2]
    shown = capsys.readouterr().err
    assert f"tokens/s, {counts[4]:.0f} skipped" in shown
    assert f"step 4, held out: 2 records longer than {LENGTH} tokens skipped" in shown

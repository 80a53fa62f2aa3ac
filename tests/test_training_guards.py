"""Training through the command line: foreign data, records that are skipped, and what a run says."""

import contextlib
import json
import math
import pathlib
import re
import shutil
import signal

import numpy as np
import pytest
import tiny_bundle as tiny
from PIL import Image

from emu3_jax.benchmarks.vision import random_weights
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.checkpoints.parts import LazyArray, write_part
from emu3_jax.cli.main import main
from emu3_jax.data.encoder import bundle_codebook
from emu3_jax.models.quantizer import CODEBOOK
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.rules import use_mesh
from emu3_jax.training import decoder_job
from emu3_jax.training.config import load_config
from emu3_jax.training.loop import train
from emu3_jax.training.metrics import read_metrics

pytestmark = pytest.mark.compiled_quickly

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
    assert (
        f"the data's codebook has checksum {theirs}, but the model's codebook has {ours}; prepare the data" in said.err
    )
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


def test_samples_of_an_area_near_no_picture(command, tmp_path, capsys):
    """Known before the first step."""
    assert main(command(samples="SampleConfig(('a',), area=7)")) == 2
    said = capsys.readouterr().err
    assert "samples.area is 7: at ratio 1:1 it must be at least 144 pixels" in said and said.count("\n") == 1
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
    outcome = train(config_of(arguments), progress=True)
    lines = read_metrics(directory)
    counts |= {line["step"]: line["skipped"] for line in lines if line["group"] == "train"}
    assert list(counts) == [2, 4] and counts[2] < counts[4] == outcome.skipped
    assert [line["skipped"] for line in lines if line["group"] == "evaluation/held out"] == [2, 2]
    shown = capsys.readouterr().err
    assert f"tokens/s, {counts[4]:.0f} skipped" in shown
    said = rf"step 4, held out: loss [\d.]+ \(text [\d.]+\), 2 records longer than {LENGTH} tokens skipped\n"
    assert re.search(said, shown)


# ------------------------------------------------------------------------------------------------ what a run says


def config_of(arguments):
    """The config that the arguments of a command describe."""
    _, file, *overrides = arguments
    return load_config(file, [override.removeprefix("--set=") for override in overrides])


def log_of(capsys) -> list[str]:
    """The lines of a log without their dates, and with marks for what differs between machines."""
    lines = []
    for line in capsys.readouterr().err.splitlines():
        date, text = line[:20], line[20:]
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", date), line
        text = re.sub(r"\d+\.\d\d MiB", "SIZE", text)
        text = re.sub(r"\b\d+ (s|min|h)( \d+ (s|min))?\b", "TIME", text)
        text = re.sub(r"\d+\.\d{4}", "LOSS", re.sub(r"[\d,]+ tokens/s", "SPEED", text))
        lines.append(text)
    return lines


def test_what_a_run_says_in_a_log(command, tiny_bundle, root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(decoder_job, "peak_flops", lambda kind: 1e12)
    run = tmp_path / "run"
    arguments = command(log_every=2, evaluate_every=4, checkpoint_every=2)
    count = sum(math.prod(param.shape) for param in Bundle.open(tiny_bundle).params("decoder"))
    beginning = [
        f"trained: all {count:,} parameters",
        "a step: 1 row of 128 tokens, up to 128 tokens",
        f"data: 1 record in {root}/pictures",
        "evaluation every 4 steps: held out (1 record)",
        "devices: 1 (cpu)",
        "memory: SIZE of each device, plus activations",
        "memory by part: parameters SIZE, optimizer SIZE, gradients SIZE",
    ]
    first = "the first step took TIME, compilation included; a step takes SIZE of each device"
    ending = [
        "step 4 of 4: loss LOSS (vision LOSS), SPEED, MFU",
        "step 4, held out: loss LOSS (vision LOSS)",
        f"train: done in TIME, the model is {run}/model",
        f"to use it: emu3-jax generate a --model {run}/model -o out/pictures",
    ]
    step_2 = "step 2 of 4: loss LOSS (vision LOSS), SPEED, MFU, time left TIME"

    assert main(arguments) == 0
    lines = [re.sub(r"MFU [\d.]+%", "MFU", line) for line in log_of(capsys)]
    assert lines == [f"train: 4 steps, in {run}", *beginning, first, step_2, *ending]

    shutil.rmtree(run / "checkpoints" / "4")
    assert main(arguments) == 0
    lines = [re.sub(r"MFU [\d.]+%", "MFU", line) for line in log_of(capsys)]
    goes_on = f"train: {run} resumes from step 2, 2 steps left, about TIME at the earlier pace"
    assert lines == [goes_on, *beginning, first, *ending]

    shutil.rmtree(run / "checkpoints" / "4")
    assert main([*arguments, "--quiet"]) == 0
    assert capsys.readouterr() == (f"{run}/model: the model after 4 steps\n", "")
    # Users of the package see nothing in a log.
    assert train(config_of(arguments)).step == 4
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("task", "data", "usage"),
    [
        ("TextToImage", "pictures", "generate a --model 'out/my run/model' -o out/pictures"),
        ("NextFrame", "pictures", "video a --model 'out/my run/model' -o out/clips"),
        ("ImageToText", "pictures", "chat PICTURE --prompt 'Please describe the image' --model 'out/my run/model'"),
        ("TextOnly", "texts", "doctor 'out/my run/model'"),
    ],
)
def test_how_a_model_is_used_follows_from_its_task(command, tiny_bundle, task, data, usage):
    bundle, mesh = Bundle.open(tiny_bundle), make_mesh("fsdp=1")
    config = config_of(command(task, data))
    with use_mesh(mesh), contextlib.closing(decoder_job.DecoderJob(config, bundle, bundle.decoder_config, mesh)) as job:
        assert job.usage(pathlib.Path("out/my run/model")) == f"emu3-jax {usage}"
        job.product = "adapter"
        options = f"--model {tiny_bundle} --adapter 'out/my run/adapter'"
        usage = usage.replace("--model 'out/my run/model'", options)
        usage = re.sub("^doctor .+", f"merge {tiny_bundle} --adapter 'out/my run/adapter' -o out/merged", usage)
        assert job.usage(pathlib.Path("out/my run/adapter")) == f"emu3-jax {usage}"


def test_a_run_that_is_stopped_says_how_it_goes_on(command, tmp_path, capsys, monkeypatch):
    step = decoder_job.DecoderJob.step

    def interrupted(job, state, batch):
        signal.raise_signal(signal.SIGTERM)
        return step(job, state, batch)

    monkeypatch.setattr(decoder_job.DecoderJob, "step", interrupted)
    assert main(command()) == 143
    assert log_of(capsys)[-2:] == [
        f"train: stopped after TIME with a checkpoint of step 1 in {tmp_path}/run",
        "to resume: run the same command again",
    ]

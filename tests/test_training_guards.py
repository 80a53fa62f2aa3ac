"""Training through the command line: data of another vision tokenizer, and records that are skipped."""

import base64
import functools
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from emu3_jax.checkpoints.bundle import VOCABULARY, Bundle, LazyArray, write_config, write_part
from emu3_jax.checkpoints.layouts import vision_params
from emu3_jax.cli.main import main
from emu3_jax.config import ImageConfig, VisionConfig
from emu3_jax.data.encoder import bundle_codebook
from emu3_jax.text.tokenizer import Tokenizer, special_tokens
from emu3_jax.training.metrics import read_metrics

RANKS, LENGTH = 512, 24
VISION = VisionConfig(
    codebook_size=64,
    temporal_factor=2,
    base_channels=32,
    channel_multipliers=(1, 1),
    num_res_blocks=1,
    attention_stages=(),
)
CONFIG = """
from emu3_jax.config import DecoderConfig
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import TextOnly, TextToImage
from emu3_jax.text.tokenizer import special_tokens
from emu3_jax.training.config import ModelConfig, OptimizerConfig, SampleConfig, TrainConfig


def config():
    tokens = special_tokens({ranks}, {codes})
    decoder = DecoderConfig(
        vocab_size=tokens.visual_end, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, num_kv_heads=1,
        max_positions=512, image_area=16 * 16, tokens=tokens,
    )
    return TrainConfig(
        directory="{root}/run",
        model=ModelConfig("{root}/ours", decoder, random=True, dtype="float32", remat="none"),
        data=DataConfig((Source("{root}/pictures", TextToImage()),), sequence_length=128, packing=0),
        batch_size=1,
        steps=4,
        optimizer=OptimizerConfig(warmup_steps=1),
        mesh="fsdp=1",
        evaluation=(("held out", Source("{root}/pictures", TextToImage())),),
    )
"""


def write_bundle(root: pathlib.Path, vocabulary: pathlib.Path, seed: int) -> None:
    """A vision tokenizer with random weights, and a vocabulary of 512 ranks."""
    root.mkdir()
    rng = np.random.default_rng(seed)
    weights = {p.path: 0.3 * rng.standard_normal(p.shape, np.float32) for p in vision_params(VISION)}
    lazy = [LazyArray(path, a.shape, a.dtype, functools.partial(np.asarray, a)) for path, a in weights.items()]
    image = ImageConfig(min_pixels=16 * 16, max_pixels=16 * 16)
    config = {"vision": VISION.to_dict(), "image": image.to_dict(), "num_batches_tracked": {}}
    write_part(root / "vision", config, lazy)
    write_config(root / "tokenizer", {"template": "chat"})
    lines = vocabulary.read_bytes().splitlines()[:RANKS]
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    Tokenizer(ranks, special_tokens(RANKS, VISION.codebook_size)).to_file(root / "tokenizer" / VOCABULARY)


@pytest.fixture(scope="module")
def root(tmp_path_factory, vocabulary) -> pathlib.Path:
    """A folder with bundles `ours` and `theirs`, data `pictures`, `foreign` and `texts`, and `config.py`."""
    root = tmp_path_factory.mktemp("guards")
    rng = np.random.default_rng(0)
    lines = []
    for number in range(2):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(root / f"{number}.png")
        lines.append({"image": f"{number}.png", "text": "a picture"})
    (root / "pictures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    # Two of three texts are longer than a row of `LENGTH` tokens.
    texts = ["short", "long " * LENGTH, "longer " * 2 * LENGTH]
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for seed, name in enumerate(("ours", "theirs")):
        write_bundle(root / name, vocabulary, seed)
    for manifest, model, name in (
        ("pictures", "ours", "pictures"),
        ("pictures", "theirs", "foreign"),
        ("texts", "ours", "texts"),
    ):
        command = ["prepare", f"{root}/{manifest}.jsonl", "--model", f"{root}/{model}", "--keep-size", "--quiet"]
        assert main([*command, "-o", f"{root}/{name}"]) == 0
    (root / "config.py").write_text(CONFIG.format(root=root, ranks=RANKS, codes=VISION.codebook_size))
    return root


def train(root: pathlib.Path, **fields) -> int:
    """The exit code of `emu3-jax train` with these fields."""
    return main(["train", f"{root}/config.py", "--quiet", *(f"--set={name}={x}" for name, x in fields.items())])


@pytest.mark.parametrize("place", ["data.sources.0.path", "evaluation.0.1.path"])
def test_data_of_another_vision_tokenizer(root, tmp_path, capsys, place):
    assert train(root, directory=tmp_path / "run", **{place: f"{root}/foreign"}) == 2
    said = capsys.readouterr()
    ours, theirs = (bundle_codebook(Bundle.open(root / name)).sha256[:12] for name in ("ours", "theirs"))
    assert ours != theirs and said.out == "" and said.err.count("\n") == 1
    assert f"{root}/foreign was prepared with another vision tokenizer" in said.err
    assert f"the checksum of its codebook is {theirs}, that of the model's is {ours}; prepare the data" in said.err
    assert not (tmp_path / "run").exists()


def test_samples_without_a_vision_tokenizer(root, tmp_path, capsys):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "tokenizer").symlink_to(root / "ours" / "tokenizer")
    text = (root / "config.py").read_text().replace(f"({RANKS}, {VISION.codebook_size})", f"({RANKS}, 32768)")
    (tmp_path / "config.py").write_text(text.replace("evaluation=", "samples=SampleConfig(('a',)), evaluation="))
    fields = {"directory": tmp_path / "run", "model.bundle": tmp_path / "bundle"}
    assert train(tmp_path, **fields) == 2
    said = capsys.readouterr().err
    assert "bundle has no vision part: make a bundle with it" in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_their_own_data_trains_and_skips_nothing(root, tmp_path, capsys):
    assert train(root, directory=tmp_path, steps=2) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'model'}: the model after 2 steps\n"
    assert all("skipped" not in line for line in read_metrics(tmp_path))
    assert bundle_codebook(Bundle.open(tmp_path / "model")) == bundle_codebook(Bundle.open(root / "ours"))


def test_skipped_records_are_told(root, tmp_path, capsys):
    fields = {
        "directory": tmp_path, "data.sequence_length": LENGTH, "data.too_long": "skip", "data.packing": 2,
        "data.sources.0.path": f"{root}/texts", "evaluation.0.1.path": f"{root}/texts", "log_every": 2,
    }  # fmt: skip
    (tmp_path / "config.py").write_text((root / "config.py").read_text().replace("TextToImage())", "TextOnly())"))
    assert train(tmp_path, **fields, steps=2) == 0
    assert train(tmp_path, **fields) == 0  # goes on, and so does the count
    lines = read_metrics(tmp_path)
    counts = {line["step"]: line["skipped"] for line in lines if line["group"] == "train"}
    assert list(counts) == [2, 4] and 2 <= counts[2] < counts[4]
    assert [line["skipped"] for line in lines if line["group"] == "evaluation/held out"] == [2, 2]
    told = [line for line in capsys.readouterr().out.splitlines() if "were skipped" in line]
    assert told == [
        f"{tmp_path}: {counts[step]:.0f} records were longer than {LENGTH} tokens and were skipped (counted once an "
        "epoch); raise data.sequence_length to train on them"
        for step in (2, 4)
    ]

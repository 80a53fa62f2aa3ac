"""Readers of data that people bring: whatever the bytes, each gives a result or an `Emu3Error`, and nothing else.

Inputs are drawn from valid ones, with values replaced, bytes changed, and ends cut.
"""

import functools
import json
import os
import pathlib
import shutil
import tempfile

import numpy as np
import pytest
from hostile import ODD, damaged, examples, gives_or_refuses, json_like, odd
from hypothesis import given
from hypothesis import strategies as st
from prepare_entries import Entries

from emu3_jax import Emu3Error
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.checkpoints.checksums import CHECKSUMS, compare_checksums, read_checksums, write_checksums
from emu3_jax.config import DecoderConfig, ImageConfig, SpecialTokens, VisionConfig
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.manifest import Manifest
from emu3_jax.data.pairs import Pair
from emu3_jax.data.prepare import prepare
from emu3_jax.data.records import Record, Turn
from emu3_jax.data.sequences import TextToImage
from emu3_jax.data.shards import Codebook, Index, PreparedData
from emu3_jax.evaluation.config import EvaluateConfig
from emu3_jax.evaluation.items import Data
from emu3_jax.evaluation.judge import _load, _shapes
from emu3_jax.models.adapters import Adapter
from emu3_jax.training.config import ModelConfig, OptimizerConfig, SampleConfig, TrainConfig, load_config
from emu3_jax.training.metrics import read_metrics
from emu3_jax.training.overrides import override
from emu3_jax.training.run_directory import Identity, read_identity, write_identity
from emu3_jax.training.vision_config import PixelConfig, VisionTrainConfig
from emu3_jax.training.vision_export import export_vision_run
from emu3_jax.training.weights import export_run

many = examples(120)


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield pathlib.Path(name)


# ------------------------------------------------------------------------------------------------ manifests, records

LINE = {
    "image": "a.png", "text": "A", "name": "n",
    "conversation": [{"role": "user", "text": "q"}, {"role": "assistant", "text": "a"}],
}  # fmt: skip


@many
@given(st.lists(json_like(LINE), min_size=1, max_size=3))
def test_manifest_lines(folder, lines):
    file = folder / "m.jsonl"
    file.write_bytes(b"\n".join(lines))
    manifest = gives_or_refuses(lambda: Manifest(file))
    for index in range(len(manifest) if manifest else 0):
        entry = gives_or_refuses(functools.partial(manifest.__getitem__, index))
        if entry is not None:
            assert entry.text or entry.conversation or entry.image or entry.clip
            for path in (entry.image, entry.clip):
                assert path is None or (path.name and "\0" not in str(path))


RECORD = Record("n", "text", np.arange(12, dtype=np.int32).reshape(3, 4), (Turn("user", "q"), Turn("assistant", "a")))
HEADER = json.loads(RECORD.to_bytes().split(b"\n")[0])


@many
@given(damaged(RECORD.to_bytes()) | json_like(HEADER).map(lambda text: text + b"\n" + bytes(24)))
def test_records(data):
    record = gives_or_refuses(lambda: Record.from_bytes(data))
    if record is not None:
        assert isinstance(record.name, str) and isinstance(record.text, str)
        assert record.codes is None or (record.codes.dtype == np.int32 and record.codes.nbytes <= 2 * len(data))


PAIR = Pair("n", "text", np.array([1, 70_000], np.int32), np.array([2], np.int32), 0.5, (RECORD.codes,))


PAIR_HEADER = json.loads(PAIR.to_bytes().split(b"\n")[0])


@many
@given(damaged(PAIR.to_bytes()) | json_like(PAIR_HEADER).map(lambda text: text + b"\n" + bytes(36)))
def test_pairs(data):
    pair = gives_or_refuses(lambda: Pair.from_bytes(data))
    if pair is not None:
        assert isinstance(pair.name, str) and isinstance(pair.prompt, str) and pair.chosen.ndim == pair.rejected.ndim
        assert all(tokens.dtype == np.int32 for tokens in (pair.chosen, pair.rejected, *pair.pictures))


@pytest.fixture(scope="module")
def prepared(folder):
    prepare(Entries(4), folder / "good", Codebook(32768, "0" * 64), shards=2)
    return shutil.copytree(folder / "good", folder / "prepared")


@pytest.mark.parametrize("name", ["index.json", "shard-00001-of-00002.json"])
@many
@given(data=st.data())
def test_indexes_and_vouchers(prepared, name, data):
    good = (prepared / name).read_bytes()
    try:
        (prepared / name).write_bytes(data.draw(json_like(json.loads(good))))
        gives_or_refuses(lambda: Index.read(prepared))
        opened = gives_or_refuses(lambda: PreparedData(prepared))
        for index in range(min(len(opened), 6) if opened else 0):
            gives_or_refuses(functools.partial(opened.__getitem__, index))
        gives_or_refuses(lambda: prepare(Entries(4), prepared, Codebook(32768, "0" * 64), shards=2))
        assert {file.parent for file in prepared.iterdir()} == {prepared}
    finally:
        shutil.rmtree(prepared)
        shutil.copytree(prepared.with_name("good"), prepared)


@many
@given(data=st.data())
def test_shards(prepared, data):
    file = prepared / "shard-00000-of-00002.arrayrecord"
    good = file.read_bytes()
    changed = bytearray(good)
    for _ in range(data.draw(st.integers(1, 8))):
        changed[data.draw(st.integers(0, len(good) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        file.write_bytes(changed)
        opened = gives_or_refuses(lambda: PreparedData(prepared))
        for index in range(len(opened) if opened else 0):
            gives_or_refuses(functools.partial(opened.__getitem__, index))
    finally:
        file.write_bytes(good)


# ------------------------------------------------------------------------------------------------ bundles


@pytest.fixture(scope="module")
def bundle(folder, tiny_bundle):
    """A copy; only `config.json` of its parts is changed."""
    copy = shutil.copytree(tiny_bundle, folder / "bundle")
    write_checksums(copy)
    return copy


@pytest.mark.parametrize("part", ["decoder", "vision", "tokenizer"])
@many
@given(data=st.data())
def test_configs_of_bundles(bundle, part, data):
    file = bundle / part / "config.json"
    good = file.read_bytes()
    try:
        file.write_bytes(data.draw(json_like(json.loads(good))))
        opened = gives_or_refuses(lambda: Bundle.open(bundle))
        if opened is not None and part != "tokenizer" and opened.has(part):
            gives_or_refuses(lambda: opened.stored(part))
    finally:
        file.write_bytes(good)


@many
@given(data=st.data())
def test_checksums(bundle, data):
    file = bundle / CHECKSUMS
    good = file.read_bytes()
    lines = good.decode().splitlines()
    name = st.text(max_size=30) | st.sampled_from([value for value in ODD if isinstance(value, str)])
    line = st.builds(lambda digest, path: f"{digest}  {path}", st.sampled_from(["0" * 64, "0" * 63, "g" * 64]), name)
    other = st.lists(line | st.sampled_from(lines), max_size=4).map("\n".join)
    try:
        text = data.draw(damaged(good) | other.map(lambda s: s.encode(errors="surrogatepass")))
        file.write_bytes(text)
        for path in gives_or_refuses(lambda: read_checksums(file)) or ():
            assert os.path.normpath(path) == path and not path.startswith(("/", ".."))
        gives_or_refuses(lambda: compare_checksums(bundle, progress=False))
    finally:
        file.write_bytes(good)


# ------------------------------------------------------------------------------------------------ runs

SMALL = DecoderConfig(
    vocab_size=60, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2, num_kv_heads=1, max_positions=64,
    tokens=SpecialTokens(1, 2, 3, 4, 5, 6, 7, 8, 10, 50),
)  # fmt: skip
IDENTITIES = [
    Identity(
        {"decoder": SMALL.to_dict(), "adapter": {"rank": 2, "alpha": 1.0, "targets": ["qkv"], "base": "nf4"}},
        {"bundle": "/nowhere"},
    ),
    Identity({"vision": VisionConfig().to_dict()}, {"image": ImageConfig().to_dict(), "export_dtype": "float32"}),
]


@pytest.mark.parametrize("number", [0, 1])
@many
@given(data=st.data())
def test_run_json(folder, number, data):
    identity, run = IDENTITIES[number], folder / f"run-{number}"
    (run / "checkpoints" / "1").mkdir(parents=True, exist_ok=True)
    good = {"format": 1, **identity.fixed, **identity.other}
    (run / "run.json").write_bytes(data.draw(json_like(good)))
    gives_or_refuses(lambda: read_identity(run))
    gives_or_refuses(lambda: write_identity(run, identity))
    gives_or_refuses(lambda: (export_run, export_vision_run)[number](run, folder / "exported"))
    assert not (folder / "exported").exists()


METRICS = {"step": 1, "group": "train", "loss": 2.5}


@many
@given(st.lists(json_like(METRICS) | damaged(json.dumps(METRICS).encode()), max_size=4))
def test_metrics(folder, lines):
    (folder / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert all(isinstance(line["step"], int) for line in gives_or_refuses(lambda: read_metrics(folder)))


# ------------------------------------------------------------------------------------------------ --set

CONFIGS = {
    "train": TrainConfig(
        "d", ModelConfig("b", SMALL), DataConfig((Source("s", TextToImage()),), 64), 4, 10,
        OptimizerConfig(0.1, 0.1, 1), adapter=Adapter(), evaluation=(("e", Source("s", TextToImage())),),
        samples=SampleConfig(("a",)), profile=(1, 2),
    ),
    "vision": VisionTrainConfig(
        "d", VisionConfig(), PixelConfig(("m",)), 10, optimizer=OptimizerConfig(warmup_steps=1), image=ImageConfig()
    ),
    "evaluate": EvaluateConfig("d"),
}  # fmt: skip


def fields(config, path=""):
    """The paths of all fields, as `--set` takes them."""
    named = vars(config).items() if hasattr(config, "__dataclass_fields__") else enumerate(config)
    for name, value in named:
        yield f"{path}{name}"
        if hasattr(value, "__dataclass_fields__") or isinstance(value, tuple):
            yield from fields(value, f"{path}{name}.")


PYTHON = [
    "", "None", "True", "-1", "0", "1", "1e999", "nan", "10**9**9", "9" * 5000, "1_000", "0x10", "1j", "b'a'", "'\\0'",
    "''", "'../x'", "'gs://b/x'", "[]", "()", "{}", "{1, 2}", "{[]: 1}", "(1, 2)", "((), ())", "[" * 2000, "(" * 300,
    "-" * 5000 + "1", "[" * 90 + "]" * 90, "...", "f''", "a b", "lambda: 1", "__import__('os')", "'\\ud800'", "\0", "²",
    "٣", "Adapter(rank=16)", "Adapter(rank=0)", "Adapter(rank=[])", "Adapter(**{})", "Source('s', TextToImage())",
    "SampleConfig()", "Source(" * 200, "1if 1else 2", "'\\d'", "x" * 5000, "1000000000",
    "1000000000000000000000", "(1000000000,) * 3",
]  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
@many
@given(data=st.data())
def test_overrides(folder, kind, data):
    path = data.draw(st.sampled_from(sorted(fields(CONFIGS[kind]))) | st.text(max_size=10))
    value = data.draw(st.sampled_from(PYTHON) | st.text(max_size=20) | odd.map(repr))
    file = folder / f"{kind}.py"
    file.write_text(f"import {__name__} as module\n\ndef config():\n    return module.CONFIGS[{kind!r}]\n")
    found = gives_or_refuses(lambda: load_config(file, [f"{path}={value}"]))
    assert found is None or type(found) is type(CONFIGS[kind])


@many
@given(damaged(b"def config():\n    return 5\n"))
def test_config_files(folder, text):
    (folder / "c.py").write_bytes(text)
    gives_or_refuses(lambda: load_config(folder / "c.py"))


def test_an_index_is_one_of_python_s_digits():
    for name in ("²", "٣", "-1", "01", "1_0", "9" * 30, ""):
        with pytest.raises(Emu3Error, match="is not an index from 0 to 1"):
            override(CONFIGS["train"], [f"profile.{name}=1"])


# ------------------------------------------------------------------------------------------------ evaluation

ITEM = {
    "name": "n", "file": "a.png", "kind": "procedural_picture", "style": "s", "concept": "c", "label": "l",
    "group": "g", "split": "train", "colour": "red", "shape": "square", "position": "left",
}  # fmt: skip


@many
@given(st.lists(json_like(ITEM) | damaged(json.dumps(ITEM).encode()), min_size=1, max_size=2))
def test_items(folder, lines):
    (folder / "items.jsonl").write_bytes(b"\n".join(lines))
    data = gives_or_refuses(lambda: Data(folder))
    for item in data.items if data else ():
        assert (folder / item.file).resolve().is_relative_to(folder.resolve())


@pytest.fixture(scope="module")
def judge(folder):
    zeros = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in _shapes(8, 3, (8, 8, 3)).items()}
    np.savez(folder / "judge.npz", **zeros)
    return folder / "judge.npz"


@many
@given(data=st.data())
def test_judges(judge, data):
    good = judge.read_bytes()
    with np.load(judge) as arrays:
        names = arrays.files
    try:
        judge.write_bytes(data.draw(damaged(good)))
        gives_or_refuses(lambda: _load(judge, 8, 3, (8, 8, 3)))
        if data.draw(st.booleans()):
            other = data.draw(st.sampled_from([np.zeros((3, 1000)), np.array([None]), np.float32(1), np.array("x")]))
            np.savez_compressed(judge, **{name: other for name in names})
            assert gives_or_refuses(lambda: _load(judge, 8, 3, (8, 8, 3))) is None
    finally:
        judge.write_bytes(good)

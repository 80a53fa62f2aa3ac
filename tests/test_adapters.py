"""Adapters by themselves: written by training, loaded, merged, and what is refused. PEFT itself is in test_peft.py."""

import dataclasses
import json
import os
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from config_files import write_config
from flax import traverse_util
from PIL import Image
from prepare_entries import Entries
from safetensors.numpy import load_file, save_file
from tiny_bundle import CODES, DECODER

import emu3_jax
from emu3_jax import Emu3Error
from emu3_jax.checkpoints.adapter import CONFIG, OWN, WEIGHTS, SavedAdapter
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.checkpoints.layouts import decoder_params
from emu3_jax.checkpoints.merged import load_merged, merge_bundle
from emu3_jax.checkpoints.parts import read_array
from emu3_jax.cli.main import main
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.encoder import bundle_codebook
from emu3_jax.data.prepare import prepare
from emu3_jax.data.sequences import TextToImage
from emu3_jax.models.adapters import MATRICES, QUANTISED, Adapter
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.rules import decoder_shardings, use_mesh
from emu3_jax.training.config import ModelConfig, OptimizerConfig, TrainConfig
from emu3_jax.training.run_directory import newest_checkpoint
from emu3_jax.training.weights import export_adapter, export_run

pytestmark = pytest.mark.compiled_quickly

PREFIX = "base_model.model.model.text_model."
NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
         "mlp.down_proj")  # fmt: skip


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def config(tiny_bundle, tmp_path_factory) -> TrainConfig:
    directory = tmp_path_factory.mktemp("adapters")
    prepare(Entries(codes=CODES), directory / "data", bundle_codebook(Bundle.open(tiny_bundle)), shards=1)
    return TrainConfig(
        directory=str(directory / "photos"),
        model=ModelConfig(str(tiny_bundle), dtype="float32"),
        data=DataConfig((Source(str(directory / "data"), TextToImage()),), sequence_length=64),
        batch_size=2,
        steps=2,
        adapter=Adapter(rank=3, alpha=7.0, base="float32"),
        optimizer=OptimizerConfig(learning_rate=0.1, warmup_steps=0),
        mesh="fsdp=2",
    )


@pytest.fixture(scope="module")
def config_file(config, tmp_path_factory) -> pathlib.Path:
    return write_config(tmp_path_factory.mktemp("config") / "lora.py", config)


@pytest.fixture(scope="module")
def trained(config, config_file) -> pathlib.Path:
    """The directory of a run that wrote its adapter alone."""
    assert run("train", config_file, "--adapter-only", "--quiet") == 0
    return pathlib.Path(config.directory)


@pytest.fixture(scope="module")
def adapter(trained) -> pathlib.Path:
    """Not to be changed."""
    return trained / "adapter"


@pytest.fixture
def copy(adapter, tmp_path) -> pathlib.Path:
    return shutil.copytree(adapter, tmp_path / "copy")


def leaves(params) -> dict[tuple[str, ...], np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(params).items()}


def assert_same_bits(found, wanted) -> None:
    assert found.keys() == wanted.keys()
    for path, array in wanted.items():
        assert (found[path].dtype, found[path].shape) == (array.dtype, array.shape), path
        assert found[path].tobytes() == array.tobytes(), path


# ------------------------------------------------------------------------------------------------ written and read


def test_training_writes_the_adapter_alone(trained, adapter):
    assert sorted(os.listdir(adapter)) == [
        "SHA256SUMS", "adapter_config.json", "adapter_model.safetensors", "emu3_adapter.json"
    ]  # fmt: skip
    assert not (trained / "model").exists()
    own = json.loads((adapter / "emu3_adapter.json").read_text())
    assert (own["base"], own["bundle"], own["step"]) == ("float32", "tiny", 2)
    assert own["decoder"] == json.loads(json.dumps(DECODER.to_dict()))
    tensors = load_file(adapter / "adapter_model.safetensors")
    modules = [f"{PREFIX}layers.{layer}.{name}" for layer in range(2) for name in NAMES]
    assert set(tensors) == {f"{module}.lora_{side}.weight" for module in modules for side in "AB"}
    assert all(np.abs(array).max() > 0 for array in tensors.values())
    q, k, v = (tensors[f"{modules[i]}.lora_A.weight"] for i in range(3))
    assert q.tobytes() == k.tobytes() == v.tobytes()


def test_a_run_as_a_bundle_or_as_its_adapter(trained, adapter, tmp_path, capsys):
    assert run("convert", trained, "-o", tmp_path / "again", "--adapter-only") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'again'}: the adapter after step 2\n"
    for file in adapter.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    assert run("convert", trained, "-o", tmp_path / "bundle") == 0
    assert Bundle.open(tmp_path / "bundle", verify=True).has("decoder")


def test_there_and_back_bit_for_bit(trained, adapter, tiny_bundle):
    _, state = newest_checkpoint(trained)
    saved = SavedAdapter.open(adapter, Bundle.open(tiny_bundle), verify=True)
    for layer in range(2):
        for module, names in {"attention": ("qkv", "out"), "mlp": ("gate_up", "down")}.items():
            for name in names:
                pair = saved.low_rank((f"layers_{layer}", module, name))
                assert pair.scale == Adapter(rank=3, alpha=7.0).scale
                for side, array in (("a", pair.a), ("b", pair.b)):
                    wanted = read_array(state, ("params", "layers", module, f"{name}_{side}"), layer)
                    assert (array.dtype, array.shape, array.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes())
    assert saved.low_rank(("norm", "scale")) is None


# ------------------------------------------------------------------------------------------------ merged


@pytest.mark.parametrize(
    ("base", "dtype"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "bfloat16"), ("nf4", "float32")]
)
def test_merging_at_loading_is_merging_by_training(trained, tiny_bundle, tmp_path, base, dtype):
    """A checkpoint holds the adapter alone, so one run stands for those beside any base."""
    (tmp_path / "checkpoints").symlink_to(trained / "checkpoints")
    identity = json.loads((trained / "run.json").read_text())
    identity["adapter"] |= {"base": base, "targets": ["qkv", "down"]}
    identity["decoder"] |= {"dtype": dtype, "max_positions": 512}
    (tmp_path / "run.json").write_text(json.dumps(identity))
    export_run(tmp_path, tmp_path / "model")
    export_adapter(tmp_path, tmp_path / "adapter")
    frozen, merged = Bundle.open(tiny_bundle), Bundle.open(tmp_path / "model", verify=True)
    saved = SavedAdapter.open(tmp_path / "adapter", frozen)
    assert saved.decoder == merged.decoder_config == dataclasses.replace(DECODER, dtype=dtype, max_positions=512)
    wanted, plain = leaves(merged.load_decoder()), leaves(frozen.load_decoder(dtype=dtype))
    assert_same_bits(leaves(load_merged(frozen, saved, None)), wanted)
    changed = {path[-1] for path in wanted if wanted[path].tobytes() != plain[path].tobytes()}
    rounded = base != "float32" and dtype == "float32"  # to bfloat16
    kept = set(MATRICES) if base in QUANTISED or rounded else {"qkv", "down"}
    assert changed == kept | ({"embedding", "kernel", "scale"} if rounded else set())
    merge_bundle(frozen, tmp_path / "adapter", tmp_path / "new", progress=False)
    assert_same_bits(leaves(Bundle.open(tmp_path / "new", verify=True).load_decoder()), wanted)


@pytest.mark.parametrize(("sizes", "quantize"), [("fsdp=2,tensor=2", None), (None, "int8"), ("tensor=2", "fp8")])
def test_merging_on_meshes_and_before_quantisation(adapter, tiny_bundle, tmp_path, sizes, quantize):
    """Also while another mesh is in use, as it is when a run ends."""
    bundle = Bundle.open(tiny_bundle)
    with use_mesh(make_mesh("fsdp=8")):
        merge_bundle(bundle, adapter, tmp_path / "new", progress=False)
    places = decoder_shardings(DECODER, make_mesh(sizes)) if sizes else None
    wanted = Bundle.open(tmp_path / "new").load_decoder(places, quantize=quantize)
    found = load_merged(bundle, SavedAdapter.open(adapter, bundle), places, quantize=quantize)
    assert_same_bits(leaves(found), leaves(wanted))
    same = jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim), found, wanted)
    assert jax.tree.all(same)


def test_the_command_merge(adapter, tiny_bundle, tmp_path, capsys):
    merge = ("merge", tiny_bundle, "--adapter", adapter, "--quiet", "-o", tmp_path / "new")
    assert run(*merge, "--dtype", "bfloat16") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'new'}\n"
    assert sorted(os.listdir(tmp_path / "new")) == ["SHA256SUMS", "decoder", "tokenizer", "vision"]
    assert Bundle.open(tmp_path / "new", verify=True).decoder_config == dataclasses.replace(DECODER, dtype="bfloat16")
    assert run(*merge) == 2
    assert "new exists already" in capsys.readouterr().err


@pytest.mark.slow
def test_commands_that_use_an_adapter(adapter, tiny_bundle, tmp_path, capsys):
    merge_bundle(Bundle.open(tiny_bundle), adapter, tmp_path / "merged", progress=False)
    model, merged = emu3_jax.load(tiny_bundle, adapter=adapter), emu3_jax.load(tmp_path / "merged")
    assert_same_bits(leaves(model.language.params), leaves(merged.language.params))
    assert model.language.config == merged.language.config
    draw = ("generate", "a dot", "--seed", "3", "--quiet")
    assert run(*draw, "--model", tmp_path / "merged", "-o", tmp_path / "a") == 0
    assert run(*draw, "--model", tiny_bundle, "--adapter", adapter, "-o", tmp_path / "b") == 0
    with Image.open(tmp_path / "a" / "000.png") as wanted, Image.open(tmp_path / "b" / "000.png") as found:
        np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))
        assert (wanted.text["model"], found.text["model"]) == ("merged", "tiny + photos/adapter")
    capsys.readouterr()
    chat = ("chat", tmp_path / "a" / "000.png", "--prompt", "what?", "--max-new-tokens", "4", "--quiet", "--model")
    assert run(*chat, tmp_path / "merged") == run(*chat, tiny_bundle, "--adapter", adapter) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_an_evaluation_names_the_adapter(adapter, tiny_bundle, tmp_path, monkeypatch, capsys):
    file = tmp_path / "evaluate.py"
    file.write_text(
        "from emu3_jax.evaluation.config import EvaluateConfig\n\n\ndef config():\n"
        f"    return EvaluateConfig('e', model={str(tiny_bundle)!r}, adapter='nowhere', data={str(tmp_path)!r})\n"
    )
    monkeypatch.setattr("emu3_jax.evaluation.items.Data.__init__", lambda *_: None)
    monkeypatch.setattr("emu3_jax.evaluation.run.evaluate", lambda model, *_: ({"model": model.name}, "<html></html>"))
    assert run("evaluate", file, "-o", tmp_path / "out", "--adapter", adapter, "--quiet") == 0
    assert json.loads(capsys.readouterr().out) == {"model": "tiny + photos/adapter"}
    assert run("evaluate", file, "-o", tmp_path / "no", "--quiet") == 2
    assert "nowhere is not a directory: give an adapter's" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ adapters of others


def write_foreign(
    directory: pathlib.Path, modules: dict[str, int], dtype=np.float32, **fields
) -> dict[str, np.ndarray]:
    """An adapter as PEFT keeps it, with A and B drawn for modules of the given ranks. Returns its tensors."""
    shapes = {w.name.removesuffix(".weight"): w.shape for p in decoder_params(DECODER) for w in p.weights}
    draw, tensors = np.random.default_rng(0), {}
    for module, rank in modules.items():
        outputs, inputs = shapes["model.layers" + module.split("layers", 1)[1]]
        tensors[f"{module}.lora_A.weight"] = draw.normal(size=(rank, inputs)).astype(dtype)
        tensors[f"{module}.lora_B.weight"] = draw.normal(size=(outputs, rank)).astype(dtype)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **fields}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return tensors


@pytest.mark.parametrize(
    ("prefix", "modules", "fields", "scales"),
    [
        # Upstream's names; different ranks and scales within one fused matrix.
        (
            "base_model.model.model.",
            {"layers.0.self_attn.q_proj": 2, "layers.0.self_attn.v_proj": 3},
            {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"layers.0.self_attn.v_proj": 5}},
            {"q_proj": 2.0, "v_proj": 5 / 3},
        ),
        # transformers 4's names, rank-stabilised.
        (
            "base_model.model.text_model.model.",
            {"layers.1.mlp.up_proj": 4, "layers.1.mlp.down_proj": 4},
            {"r": 4, "use_rslora": True},
            {"up_proj": 2.0, "down_proj": 2.0},
        ),
        (
            "",
            {"layers.1.self_attn.o_proj": 2, "layers.0.self_attn.k_proj": 2},
            {"lora_alpha": -1.5},
            {"o_proj": -0.75, "k_proj": -0.75},
        ),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_different_a_are_joined(tiny_bundle, tmp_path, prefix, modules, fields, scales, dtype):
    modules = {prefix + name: rank for name, rank in modules.items()}
    tensors = write_foreign(tmp_path / "foreign", modules, dtype, **fields)
    bundle = Bundle.open(tiny_bundle)
    saved = SavedAdapter.open(tmp_path / "foreign", bundle)
    assert (saved.base, saved.decoder, saved.name) == ("float32", bundle.decoder_config, "foreign")
    touched = set()
    for param, array in bundle.arrays("decoder"):
        merged = np.asarray(saved.merged(param.path, array, np.dtype(np.float32)))
        for weight, before, after in zip(param.weights, param.unpack(array), param.unpack(merged), strict=True):
            module = next((m for m in modules if f".{m}.weight".endswith(weight.name[len("model") :])), None)
            if module is None:
                assert after.tobytes() == before.tobytes(), weight.name
                continue
            touched.add(module)
            a, b = (np.float64(tensors[f"{module}.lora_{side}.weight"]) for side in "AB")
            wanted = before + scales[module.rsplit(".", 1)[1]] * (b @ a)
            np.testing.assert_allclose(after, wanted, atol=1e-5, rtol=1e-5)
    assert touched == set(modules)


def test_without_checksums_a_check_says_so(tiny_bundle, tmp_path, caplog):
    write_foreign(tmp_path / "foreign", {"layers.0.mlp.down_proj": 2})
    SavedAdapter.open(tmp_path / "foreign", Bundle.open(tiny_bundle), verify=True)
    assert [r.getMessage() for r in caplog.records] == [
        f"{tmp_path / 'foreign'} has no SHA256SUMS, so its files cannot be verified: adapters that PEFT wrote have none"
    ]


# ------------------------------------------------------------------------------------------------ bad input


def edit(file: pathlib.Path, **fields) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def edit_tensors(directory: pathlib.Path, change) -> None:
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


A, B = f"{PREFIX}layers.0.mlp.down_proj.lora_A.weight", f"{PREFIX}layers.0.mlp.down_proj.lora_B.weight"
Q = f"{PREFIX}layers.1.self_attn.q_proj.lora_B.weight"

# Fields of adapter_config.json.
BAD_CONFIGS = [
    ({"peft_type": "IA3"}, "peft_type is 'IA3': only LORA"),
    ({"peft_type": {}}, "peft_type is {}"),
    ({"use_dora": True}, "use_dora is True, which is not supported; merge it in PyTorch"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
    ({"lora_bias": True}, "lora_bias is True"),
    ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
    ({"bias": "all"}, "bias is 'all': the decoder has no biases"),
    (
        {"init_lora_weights": "pissa_niter_4"},
        "init_lora_weights is 'pissa_niter_4', which changes the frozen weights: save the adapter with path_initial",
    ),
    ({"init_lora_weights": 1}, "init_lora_weights is 1"),
    ({"use_rslora": "no"}, "use_rslora is 'no': it must be true or false"),
    ({"r": None}, "r is None: it must be a whole number from 1 to 65536"),
    ({"r": 10**400}, "r is 10000.*: it must be a whole number"),
    ({"r": 8}, "_proj' has rank 3, adapter_config.json says 8: the files are of two adapters"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan: it must be a number"),
    ({"lora_alpha": "7"}, "lora_alpha is '7'"),
    ({"lora_alpha": 1e300}, r"lora_alpha is 1e\+300"),
    ({"rank_pattern": [1]}, r"rank_pattern is \[1\]: it must be an object"),
    ({"alpha_pattern": {"(a+)+$": 1}}, "alpha_pattern has '.a.*', which is no module's plain name"),
    ({"alpha_pattern": {"q_proj": []}}, r"alpha_pattern of 'q_proj' is \[\]"),
]
# Fields of emu3_adapter.json.
BAD_OWN = [
    ({"format": 2}, "format is 2, this version reads 1"),
    ({"base": "fp4"}, "base is 'fp4': it must be one of float32, bfloat16"),
    ({"base": []}, r"base is \[\]"),
    ({"decoder": 3}, "decoder is 3: it must be an object"),
    ({"decoder": {"num_layers": -1}}, "emu3_adapter.json: config field num_layers is -1"),
    (
        {"decoder": {**DECODER.to_dict(), "num_layers": 3}},
        "copy is of another model: its decoder has num_layers 3, that of .*tiny 2: give the bundle .* .'tiny'.",
    ),
]
BAD_TENSORS = [
    (lambda t: t.pop(A), "layers.0.mlp.down_proj' has lora_B and not the other side"),
    (lambda t: t.clear(), "holds no adapter"),
    (lambda t: t[Q].fill(np.nan), "q_proj.lora_B.weight' has numbers that are not finite"),
    (
        lambda t: (t[A].fill(3e38), t[B].fill(3e38)),
        "merged weight layers_0/mlp/down: a number is too large for float32; give --dtype float32. If the dtype is",
    ),
    (lambda t: t.update({A: t[A][:2].copy()}), "lora_A of rank 2, lora_B of rank 3"),
    (lambda t: t.update({A: np.ones(3, np.float32)}), r"is float32 \[3\]: it must be"),
    (
        lambda t: t.update({A: t[A].astype(np.float64)}),
        r"is float64 \[3, 48\]: it must be a matrix",
    ),
    (
        lambda t: t.update({A: np.ones((3, 64), np.float32)}),
        "copy is of another model: its model.layers.0.mlp.down_proj has 64 inputs and 32 outputs, .*tiny 48 and 32",
    ),
    (
        lambda t: t.update({A.replace("layers.0", "layers.7"): t.pop(A), B.replace("layers.0", "layers.7"): t.pop(B)}),
        "copy is of another model: it adapts layer 7, counted from 0, and .*tiny has 2 layers",
    ),
    (
        lambda t: t.update({"base_model.model.lm_head.lora_A.weight": t.pop(A)}),
        "'base_model.model.lm_head.lora_A.weight' is no LoRA of a projection in the decoder's layers",
    ),
    (lambda t: t.update({A.replace("A.weight", "magnitude_vector"): t[A]}), "lora_magnitude_vector' is no LoRA"),
    (
        lambda t: t.update({"layers.00.mlp.down_proj.lora_A.weight": t[A].copy()}),
        "has two adapters of mlp.down_proj in layer 0, the second is",
    ),
]
BAD_FILES = [
    (shutil.rmtree, "copy is not a directory: give an adapter's"),
    (lambda d: (d / CONFIG).unlink(), "has no adapter_config.json, so it is no adapter: give a"),
    (lambda d: (d / CONFIG).write_text("[]"), "adapter_config.json: holds a JSON list"),
    # Without the file the adapter would count as one by PEFT, whose frozen weights were not rounded.
    (lambda d: ((d / OWN).unlink(), (d / OWN).symlink_to("absent")), "cannot read .*emu3_adapter.json: there is no"),
    (lambda d: (d / WEIGHTS).unlink(), "has no adapter_model.safetensors: download or copy it"),
    (lambda d: (d / WEIGHTS).write_bytes(b"x" * 50), "not a whole safetensors file"),
    (
        lambda d: (d / WEIGHTS).rename(d / "adapter_model.bin"),
        r"as a pickle, adapter_model.bin, which is not read: .* save it again \(save_pretrained",
    ),
]
BAD = [
    *((lambda d, f=fields: edit(d / CONFIG, **f), reason) for fields, reason in BAD_CONFIGS),
    *((lambda d, f=fields: edit(d / OWN, **f), reason) for fields, reason in BAD_OWN),
    *((lambda d, c=change: edit_tensors(d, c), reason) for change, reason in BAD_TENSORS),
    *BAD_FILES,
]


@pytest.mark.parametrize(("change", "reason"), BAD)
def test_bad_adapters(copy, tiny_bundle, tmp_path, capsys, change, reason):
    change(copy)
    assert run("merge", tiny_bundle, "--adapter", copy, "-o", tmp_path / "new", "--quiet") == 2
    with pytest.raises(Emu3Error, match=reason) as caught:
        emu3_jax.load(tiny_bundle, adapter=copy)
    error = capsys.readouterr().err
    assert error == f"emu3-jax: error: {caught.value}\n" and len(error) < 330
    assert set(os.listdir(tmp_path)) <= {"copy"}


def test_weights_too_large_for_float16(copy, tiny_bundle, tmp_path, capsys):
    edit_tensors(copy, lambda t: (t[A].fill(1e3), t[B].fill(1e3)))
    merge = ("merge", tiny_bundle, "--adapter", copy, "--quiet", "-o", tmp_path / "new")
    assert run(*merge, "--dtype", "float16") == 2
    assert "layers_0/mlp/down: a number is too large for float16; give --dtype float32" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["copy"]
    assert run(*merge) == 0


def test_what_is_no_adapter(trained, adapter, tiny_bundle, tmp_path, config_file, capsys):
    def error(*arguments) -> str:
        try:
            assert run(*arguments) == 2
        except SystemExit as stop:  # argparse's own errors
            assert stop.code == 2
        said = capsys.readouterr().err
        assert ": error: " in said and said.count("\n") == 1 and not os.listdir(tmp_path)
        return said

    merge = ("merge", tiny_bundle, "-o", tmp_path / "new", "--adapter")
    said = error(*merge, trained)  # a long path is shortened in its middle
    assert "so it is no adapter: it is a training run: give /" in said
    assert "/adapter, or run `emu3-jax convert /" in said and said.endswith(" --adapter-only`\n")
    assert "it is a bundle: give it as --model" in error(*merge, tiny_bundle)
    assert "addresses are not supported" in error(*merge, "s3://bucket/adapter")
    assert "is a LoRA adapter: give it as --adapter" in error("merge", adapter, *merge[2:], adapter)
    assert "is a LoRA adapter: merge it with `emu3-jax merge" in error("convert", adapter, "-o", tmp_path / "new")
    convert = ("convert", "-o", tmp_path / "new", "--adapter-only")
    assert "is not a training run: --adapter-only needs one" in error(*convert, tiny_bundle)
    assert "has no adapter; set adapter=Adapter(...), or leave --adapter-only out" in error(
        "train", config_file, "--adapter-only", "--set", "adapter=None", "--set", f"directory={tmp_path / 'run'}"
    )


def test_a_run_of_all_weights_has_no_adapter(trained, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(trained / "checkpoints")
    identity = json.loads((trained / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**identity, "adapter": None}))
    assert run("convert", tmp_path / "run", "-o", tmp_path / "new", "--adapter-only") == 2
    assert "trains all weights and has no adapter: leave --adapter-only out" in capsys.readouterr().err


def test_checksums_of_an_adapter(copy, tiny_bundle):
    edit(copy / "adapter_config.json", lora_alpha=1)
    bundle = Bundle.open(tiny_bundle)
    assert SavedAdapter.open(copy, bundle).low_rank(("layers_0", "mlp", "down")).scale == pytest.approx(1 / 3)
    with pytest.raises(Emu3Error, match=r"a file of the adapter is damaged, .*adapter_config.json; copy the"):
        SavedAdapter.open(copy, bundle, verify=True)

"""Quantised bundles: the arrays and pictures that quantising at loading gives, their size, damage and refusals."""

import dataclasses
import json
import shutil
import weakref

import jax
import ml_dtypes
import numpy as np
import pytest
from tiny_bundle import DECODER

import emu3_jax
from emu3_jax.checkpoints import dequantized, quantized
from emu3_jax.checkpoints.adapter import write_adapter
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.checkpoints.convert import convert
from emu3_jax.checkpoints.dequantized import full_bundle
from emu3_jax.checkpoints.doctor import doctor
from emu3_jax.checkpoints.export import export
from emu3_jax.checkpoints.layouts import decoder_params
from emu3_jax.checkpoints.merged import merge_bundle
from emu3_jax.checkpoints.parts import LazyArray, write_part
from emu3_jax.cli.main import main
from emu3_jax.errors import Emu3Error
from emu3_jax.generation import plan
from emu3_jax.models.adapters import Adapter
from emu3_jax.models.quantization import KINDS, is_quantised
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.rules import decoder_shardings

pytestmark = pytest.mark.compiled_quickly


@pytest.fixture(scope="module")
def quantised(tiny_bundle, tmp_path_factory):
    """The tiny bundle, quantised by the command, by kind; not to be changed."""
    root = tmp_path_factory.mktemp("quantised")
    for kind in KINDS:
        assert main(["quantize", str(tiny_bundle), "-o", str(root / kind), "--quantize", kind, "--quiet"]) == 0
    return root


def language(bundle, **options):
    return emu3_jax.load(bundle, **options).language


def assert_same_params(one, other) -> None:
    """Bit for bit, in the same dtypes, in the same places."""
    jax.tree.map(np.testing.assert_array_equal, one, other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and a.sharding.is_equivalent_to(b.sharding, a.ndim)


# ------------------------------------------------------------------------------------------------ what it holds


@pytest.mark.parametrize("mesh", [None, "fsdp=2,tensor=2"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_loads_as_the_full_bundle_is_quantised(tiny_bundle, quantised, kind, mesh):
    stored, made = language(quantised / kind, mesh=mesh), language(tiny_bundle, quantize=kind, mesh=mesh)
    assert_same_params(stored.params, made.params)
    assert stored.quantize == made.quantize == kind and stored.narrow_cache == KINDS[kind][1]


def test_no_matrix_is_restored_wide(tiny_bundle, quantised, monkeypatch):
    """What Orbax is asked for: codes as they are stored, each split as its matrix is."""
    seen, read = {}, Bundle._read

    def spy(bundle, part, targets, host_gb=None):
        leaves = jax.tree_util.tree_leaves_with_path(targets)
        seen.update({jax.tree_util.keystr(path): target for path, target in leaves})
        return read(bundle, part, targets, host_gb)

    monkeypatch.setattr(Bundle, "_read", spy)
    params = language(quantised / "int8", mesh="tensor=2", dtype="float16").params
    codes = seen["['layers_0']['mlp']['down_codes']"]
    assert codes.dtype == np.int8 and not codes.sharding.is_fully_replicated
    assert params["layers_0"]["mlp"]["down_codes"].addressable_shards[0].data.shape == (32, 24)
    assert not any(str(path).endswith(f"['{name}']") for path in seen for name in ("qkv", "out", "gate_up", "down"))


def test_dtype_changes_what_is_not_quantised(tiny_bundle, quantised):
    stored, as_it_is = (language(quantised / "int8", dtype=dtype) for dtype in ("float16", None))
    assert_same_params(stored.params, language(tiny_bundle, quantize="int8", dtype="float16").params)
    assert stored.config.dtype == "float16" and stored.params["embed"]["embedding"].dtype == np.float16
    for name, leaf in stored.params["layers_0"]["mlp"].items():
        np.testing.assert_array_equal(leaf, as_it_is.params["layers_0"]["mlp"][name])
        assert leaf.dtype == (np.int8 if name.endswith("codes") else np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_plans_have_the_arrays_that_loading_gives(quantised, kind):
    loaded = language(quantised / kind, mesh="fsdp=2,tensor=2")
    planned = plan._params(loaded.config, loaded.mesh, kind)

    def described(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), tree)

    assert described(planned) == described(loaded.params)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mesh"), [("int8", None), ("int8-weights", None), ("fp8", None), ("int8", "tensor=2")]
)
def test_the_same_pictures(tiny_bundle, quantised, kind, mesh):
    pictures = [
        emu3_jax.load(bundle, mesh=mesh, **options).generate("a cat", area=576, seed=3)[0]
        for bundle, options in ((quantised / kind, {}), (tiny_bundle, {"quantize": kind}))
    ]
    np.testing.assert_array_equal(*map(np.asarray, pictures))


@pytest.mark.parametrize("weights", [1, 100])
def test_slices_change_nothing(tiny_bundle, quantised, tmp_path, monkeypatch, weights):
    monkeypatch.setattr(quantized, "_SLICE", weights)
    quantized.quantize_bundle(Bundle.open(tiny_bundle), tmp_path / "narrow", "fp8", progress=False)
    expected = stored_arrays(Bundle.open(quantised / "fp8"))
    for path, array in Bundle.open(tmp_path / "narrow").stored_arrays("decoder"):
        np.testing.assert_array_equal(array, expected[path])


def test_the_same_kind_may_be_named(quantised):
    assert_same_params(language(quantised / "int8", quantize="int8").params, language(quantised / "int8").params)


def test_its_size_is_that_of_its_codes(tiny_bundle, quantised):
    def sizes(bundle):
        bundle = Bundle.open(bundle)
        held = sum(array.size * array.dtype.itemsize for array in bundle.stored("decoder").values())
        return held, sum(file.stat().st_size for file in bundle.weights("decoder").rglob("*") if file.is_file())

    (wide, _), (narrow, on_disk) = sizes(tiny_bundle), sizes(quantised / "int8")
    weights = [(np.prod(param.shape), param) for param in decoder_params(DECODER)]
    matrices = sum(size for size, param in weights if is_quantised(param.path))
    scales = narrow - matrices - 4 * sum(size for size, param in weights if not is_quantised(param.path))
    assert 0 < scales < 0.2 * matrices and narrow < wide
    assert on_disk < narrow + 50_000  # Orbax's descriptions of 28 arrays


def test_other_parts_are_copied(tiny_bundle, quantised):
    for name in ("vision/config.json", "tokenizer/config.json", "tokenizer/emu3.tiktoken"):
        assert (quantised / "int8" / name).read_bytes() == (tiny_bundle / name).read_bytes()
    assert json.loads((quantised / "fp8" / "decoder" / "config.json").read_text())["quantize"] == "fp8"


def test_each_matrix_is_read_once_and_alone(tiny_bundle, tmp_path, monkeypatch):
    """A matrix is freed before the next one is read."""
    original, read, matrices = Bundle.decoder_array, [], []

    def spy(bundle, path):
        assert not any(matrix() is not None for matrix in matrices)
        array = original(bundle, path)
        read.append(path)
        if is_quantised(path):
            matrices.append(weakref.ref(array))
        return array

    monkeypatch.setattr(Bundle, "decoder_array", spy)
    quantized.quantize_bundle(Bundle.open(tiny_bundle), tmp_path / "narrow", progress=False)
    assert sorted(read) == sorted(param.path for param in decoder_params(DECODER)) and len(matrices) == 9


# ------------------------------------------------------------------------------------------------ conversion


def stored_arrays(bundle):
    return dict(bundle.stored_arrays("decoder"))


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_converting_quantises_what_the_checkpoint_stores(golden_checkpoint, golden_bundle, tmp_path, dtype):
    sources = [golden_checkpoint / "lm", golden_checkpoint / "vq"]
    at_once = convert(sources, tmp_path / "at once", dtype, quantize="int8", progress=False)
    quantized.quantize_bundle(Bundle.open(golden_bundle), tmp_path / "after", progress=False)
    expected = stored_arrays(Bundle.open(tmp_path / "after"))
    found = stored_arrays(at_once)
    assert found.keys() == expected.keys() and at_once.quantize == "int8"
    assert at_once.decoder_config.dtype == (dtype or Bundle.open(golden_bundle).decoder_config.dtype)
    for path, array in expected.items():
        wide = not path[-1].endswith(("_codes", "_scales"))
        np.testing.assert_array_equal(found[path], array.astype(dtype) if wide and dtype else array)


def test_the_convert_command(golden_checkpoint, tmp_path, capsys):
    output = tmp_path / "narrow"
    assert main(["convert", str(golden_checkpoint / "lm"), "-o", str(output), "--quantize", "fp8", "--quiet"]) == 0
    assert capsys.readouterr().out == f"{output}\n" and Bundle.open(output).quantize == "fp8"


# ------------------------------------------------------------------------------------------------ doctor


def edit_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def complaints(path):
    return [finding.what for finding in doctor(path, progress=False) if finding.level != "ok"]


@pytest.fixture
def copy(quantised, tmp_path):
    return shutil.copytree(quantised / "int8", tmp_path / "copy")


@pytest.mark.parametrize("kind", KINDS)
def test_sound_ones(quantised, kind):
    findings = doctor(quantised / kind, progress=False)
    assert [what for what in complaints(quantised / kind) if "batch norms" not in what] == []  # those are random
    kinds = [finding.what for finding in findings if "quantised" in finding.what]
    assert kinds == [f"the decoder is quantised ({kind}): training, merge and export have rounded weights"]
    assert "the rest of the decoder is stored in float32" in [finding.what for finding in findings]


@pytest.mark.parametrize(
    ("quantize", "message"),
    [
        ("fp8", "17 arrays are missing, unknown or have another shape or dtype"),
        (None, "missing, unknown or have another shape than config.json says"),
        ("int4", "config field quantize is 'int4': it must be one of int8, int8-weights, fp8, or absent"),
        ([8], "config field quantize is [8]: it must be one of"),
        (True, "config field quantize is True: it must be one of"),
    ],
)
def test_another_kind_in_its_config(copy, quantize, message, capsys):
    message = message.replace("17", str(4 * DECODER.num_layers + 1))
    edit_json(copy / "decoder" / "config.json", quantize=quantize)
    (copy / "SHA256SUMS").unlink()
    assert any(message in what for what in complaints(copy))
    assert main(["generate", "a cat", "--model", str(copy), "-o", str(copy / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and len(error) < 320 and not (copy / "out").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("down_scales", np.float32("nan"), "1 weights hold NaN or infinity, first layers_1/mlp/down_scales"),
        ("down_scales", np.float32(-1), "1 arrays of scales hold negative numbers, first layers_1/mlp/down_scales"),
        ("down_codes", ml_dtypes.float8_e4m3fn("nan"), "1 weights hold NaN or infinity, first layers_1/mlp/down_codes"),
    ],
)
def test_damaged_numbers(quantised, tmp_path, name, value, message):
    path = ("layers_1", "mlp", name)
    source = Bundle.open(quantised / "fp8")
    arrays = {place: array.copy() for place, array in source.stored_arrays("decoder")}
    arrays[path].reshape(-1)[5] = value
    lazy = [LazyArray(place, a.shape, a.dtype, lambda a=a: a) for place, a in arrays.items()]
    write_part(tmp_path / "decoder", {"quantize": "fp8", **source.decoder_config.to_dict()}, lazy)
    assert message in complaints(tmp_path)


def test_flipped_bits_are_found(copy, capsys):
    data = max((copy / "decoder" / "weights").rglob("d/*"), key=lambda file: file.stat().st_size)
    with data.open("r+b") as stream:
        stream.seek(data.stat().st_size // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 16]))
    assert any("is damaged, its checksum differs" in what for what in complaints(copy))
    assert main(["generate", "a cat", "--model", str(copy), "-o", str(copy / "out"), "--verify"]) == 2
    assert "is damaged, its checksum differs" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ full weights


@pytest.fixture(scope="module")
def widened(quantised, tmp_path_factory):
    """By kind, full bundles with the weights that the codes and scales stand for; not to be changed."""
    root = tmp_path_factory.mktemp("widened")
    for kind in KINDS:
        narrow = Bundle.open(quantised / kind)
        arrays, leaves = [], stored_arrays(narrow)
        for param in narrow.params("decoder"):
            wide = leaves[param.path] if param.path in leaves else product(param.path, leaves)
            arrays.append(LazyArray(param.path, wide.shape, wide.dtype, lambda wide=wide: wide))
        narrow.write_with_decoder(root / kind, narrow.decoder_config, arrays)
    return root


def product(path, leaves):
    """Codes times scales, by the shapes alone: scales belong to the first axes of the codes, which come last."""
    codes, scales = (leaves[*path[:-1], path[-1] + end] for end in ("_codes", "_scales"))
    wide = np.einsum("oi,o->oi" if path[-1] == "kernel" else "oi,o->io", *flat(codes, scales), dtype=np.float32)
    if path[-1] == "kernel":
        return wide
    return wide.reshape(*codes.shape[scales.ndim :], *scales.shape)


def flat(codes, scales):
    return codes.reshape(scales.size, -1).astype(np.float32), scales.reshape(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_full_weights_are_codes_times_scales(quantised, widened, kind):
    full, expected = full_bundle(Bundle.open(quantised / kind), "this"), Bundle.open(widened / kind)
    assert full.quantize is None and full.stored("decoder") == expected.stored("decoder")
    for (param, array), (same, wide) in zip(full.arrays("decoder"), expected.arrays("decoder"), strict=True):
        assert param.path == same.path and array.dtype == wide.dtype
        np.testing.assert_array_equal(array, wide)
        np.testing.assert_array_equal(full.decoder_array(param.path), wide)


@pytest.mark.parametrize("mesh", [None, "fsdp=2,tensor=2"])
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"quantize": "int8-weights"}])
def test_full_weights_load_as_those_of_a_full_bundle(quantised, widened, mesh, options):
    full, expected = full_bundle(Bundle.open(quantised / "int8"), "this"), Bundle.open(widened / "int8")
    places = None if mesh is None else decoder_shardings(DECODER, make_mesh(mesh))
    loaded, wanted = (bundle.load_decoder(places, **options) for bundle in (full, expected))
    assert_same_params(loaded, wanted)


def test_full_weights_have_the_decoders_dtype(quantised, tmp_path):
    """Also where they are loaded wider: a full bundle has no more bits."""
    narrow = Bundle.open(quantised / "int8")
    config = dataclasses.replace(narrow.decoder_config, dtype="bfloat16")
    lazy = [LazyArray(path, a.shape, a.dtype, lambda a=a: a) for path, a in narrow.stored_arrays("decoder")]
    narrow.write_with_decoder(tmp_path / "bf16", config, lazy, quantize="int8")
    full = full_bundle(Bundle.open(tmp_path / "bf16"), "this")
    path = ("layers_1", "mlp", "down")
    expected = product(path, stored_arrays(narrow)).astype(ml_dtypes.bfloat16)
    assert full.stored("decoder")[path].dtype == expected.dtype
    np.testing.assert_array_equal(full.decoder_array(path), expected)
    loaded = full.load_decoder(dtype=np.float32)["layers_1"]["mlp"]["down"]
    np.testing.assert_array_equal(loaded, expected.astype(np.float32))


def test_what_works_with_full_weights(quantised, widened, tmp_path, caplog):
    """Export, merging and adapters give what they give for a full bundle of the same weights; a line says so."""
    narrow, full = quantised / "int8", widened / "int8"
    adapter, draw = Adapter(rank=2, targets=("down",)), np.random.default_rng(0)
    down = [param for param in decoder_params(DECODER) if param.path[-1] == "down"]
    pairs = [half for param in down for half in param.low_rank(1, 2)]
    sides = {half.path: draw.standard_normal(half.shape, np.float32) for half in pairs}
    write_adapter(tmp_path / "adapter", adapter, DECODER, lambda path: sides[path], bundle=Bundle.open(full), step=1)
    for name, model in (("narrow", narrow), ("full", full)):
        export(model, tmp_path / f"{name}-export", "upstream", progress=False)
        merge_bundle(Bundle.open(model), tmp_path / "adapter", tmp_path / f"{name}-merged", progress=False)
    for kind in ("export", "merged"):
        one, other = (tmp_path / f"{name}-{kind}" for name in ("narrow", "full"))
        files = sorted(file.relative_to(one) for file in one.rglob("*.safetensors"))
        assert [file.relative_to(other) for file in sorted(other.rglob("*.safetensors"))] == files
        assert all((one / file).read_bytes() == (other / file).read_bytes() for file in files)
    merged, same = (stored_arrays(Bundle.open(tmp_path / f"{name}-merged")) for name in ("narrow", "full"))
    for path, array in merged.items():
        np.testing.assert_array_equal(array, same[path])
    loaded, wanted = (language(model, adapter=tmp_path / "adapter") for model in (narrow, full))
    assert loaded.quantize is None
    assert_same_params(loaded.params, wanted.params)
    uses = ("the exported checkpoint", "the merged model", "the adapted model")
    assert [record.getMessage() for record in caplog.records] == [
        f"{narrow} is quantised (int8), so {use} works with rounded weights; the bundle that it was made from is more "
        "exact" for use in uses
    ]  # fmt: skip


@pytest.mark.parametrize("adapter", ["None", "Adapter()"])
def test_training_starts_from_full_weights(quantised, tmp_path, monkeypatch, capsys, caplog, adapter):
    """Here it gets as far as the data, which are absent."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.py").write_text(TRAINING.format(bundle=quantised / "int8", adapter=adapter))
    assert main(["train", "config.py"]) == 2
    assert "absent has no index.json" in capsys.readouterr().err
    assert "so the training works with rounded weights" in caplog.text


def test_the_embedded_model_has_no_other_weights(quantised, monkeypatch, caplog):
    monkeypatch.setattr(dequantized, "DIRECTORY", quantised / "int8")
    monkeypatch.chdir(quantised)
    for path in (quantised / "int8", "int8"):
        assert full_bundle(Bundle.open(path), "this").quantize is None and not caplog.records


# ------------------------------------------------------------------------------------------------ refusals

TRAINING = """
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import TextToImage
from emu3_jax.models.adapters import Adapter
from emu3_jax.training.config import ModelConfig, TrainConfig


def config():
    data = DataConfig((Source("absent", TextToImage()),), sequence_length=128)
    return TrainConfig("run", ModelConfig("{bundle}"), data, batch_size=1, steps=99, mesh="fsdp=1", adapter={adapter})
"""


def test_a_quantised_bundle_is_not_quantised_again(quantised, tmp_path, capsys):
    model = quantised / "int8"
    assert main(["quantize", str(model), "-o", str(tmp_path / "out")]) == 2
    remedy = "give the bundle that it was made from, or convert the checkpoint without --quantize\n"
    assert capsys.readouterr().err == (
        f"emu3-jax: error: {model} is quantised (int8), and quantize needs the full weights: {remedy}"
    )
    assert not any(tmp_path.iterdir())


def test_other_kinds_are_refused(quantised, tmp_path, capsys):
    model = str(quantised / "int8")
    command = ["generate", "cat", "--model", model, "--quantize", "int8-weights", "-o", str(tmp_path / "out")]
    assert main(command) == 2
    assert capsys.readouterr().err == (
        f"emu3-jax: error: {model} is quantised as int8, but quantize is int8-weights: leave quantize out, or give "
        "the full bundle\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["/dev/zero", "absent"])
def test_links_that_lead_to_no_file_are_not_copied(tiny_bundle, tmp_path, capsys, target):
    """A copy of /dev/zero would never end."""
    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
    (copy / "vision" / "weights" / "more").symlink_to(target)
    assert main(["quantize", str(copy), "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"cannot read {copy}/vision/weights/more: " in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_what_cannot_be_quantised(golden_checkpoint, tiny_bundle, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["convert", str(golden_checkpoint / "vq"), "-o", str(output), "--quantize", "int8"]) == 2
    assert "--quantize needs a decoder, but no SRC holds one" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    assert main(["convert", str(tmp_path / "run"), "-o", str(output), "--quantize", "int8"]) == 2
    assert "convert it without --quantize, and then run `emu3-jax quantize BUNDLE`" in capsys.readouterr().err
    shutil.copytree(tiny_bundle / "vision", tmp_path / "seeing" / "vision")
    assert main(["quantize", str(tmp_path / "seeing"), "-o", str(output)]) == 2
    assert "has no decoder part" in capsys.readouterr().err
    assert main(["quantize", str(tiny_bundle), "-o", str(tmp_path / "run")]) == 2
    assert "exists already" in capsys.readouterr().err and not output.exists()
    with pytest.raises(Emu3Error, match="quantize is 'int4'"):
        convert([golden_checkpoint / "lm"], output, quantize="int4")


@pytest.mark.parametrize(
    "command",
    [
        "quantize copy -o copy/in",
        "export copy --layout upstream -o copy/in",
        "merge copy --adapter adapter -o copy/in",
        "merge copy --adapter adapter -o adapter/in",
        "convert copy -o copy/in",
        "train config.py",
    ],
)
def test_no_command_writes_into_what_it_reads(tiny_bundle, tmp_path, monkeypatch, capsys, command):
    """Files that are not in the checksums would make the bundle count as damaged."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_bundle, "copy")
    (tmp_path / "adapter").mkdir()
    config = TRAINING.format(bundle="copy", adapter=None)
    (tmp_path / "config.py").write_text(config)
    if command.startswith("train"):
        command += " --set directory=copy/in"
    before = sorted(tmp_path.rglob("*"))
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    output = "adapter/in" if "adapter/in" in command else "copy/in"
    assert f"cannot write {output}: it is inside {output[:-3]}, which is read; choose" in error, error
    assert [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in path.parts] == before


@pytest.mark.parametrize("options", ["", "--quantize int8"])
def test_a_bundle_needs_no_conversion(tiny_bundle, tmp_path, monkeypatch, capsys, options):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(tiny_bundle), "-o", "out", *options.split()]) == 2
    assert capsys.readouterr().err == (
        f"emu3-jax: error: {tiny_bundle} is a bundle already, so it needs no conversion; to quantise it, run "
        f"`emu3-jax quantize {tiny_bundle} -o NEW`\n"
    )
    assert not (tmp_path / "out").exists()

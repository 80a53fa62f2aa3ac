"""Bundles: plain Orbax reads them, weights land in their sharding, and damage is one line."""

import json
import pathlib
import shutil

import checkpoint_cases as cases
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import emu3_jax
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.checkpoints.convert import convert
from emu3_jax.checkpoints.parts import LazyArray, write_config, write_part
from emu3_jax.errors import Emu3Error

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A whole bundle; not to be changed."""
    root = tmp_path_factory.mktemp("bundle")
    return convert([cases.transformers_4(root / "source")], root / "whole")


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle.path, tmp_path / "copy")


def flat(tree):
    return {"/".join(path): leaf for path, leaf in traverse_util.flatten_dict(tree).items()}


def on_host(bundle, part):
    return {param.name: array for param, array in bundle.arrays(part)}


@pytest.mark.parametrize("part", ["decoder", "vision"])
def test_plain_orbax_reads_the_weights(bundle, part):
    expected = on_host(bundle, part)
    with ocp.StandardCheckpointer() as checkpointer:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[3])
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
            checkpointer.metadata(bundle.path.absolute() / part / "weights").item_metadata.tree,
        )
        restored = flat(checkpointer.restore(bundle.path.absolute() / part / "weights", target))
    assert set(restored) == set(expected)
    for name, array in expected.items():
        assert restored[name].sharding == device
        assert np.asarray(restored[name]).tobytes() == array.tobytes(), name


@pytest.mark.parametrize("way", ["../inner/../copy", "./copy", "link", "inner/up"])
def test_paths_lead_to_the_same_weights(bundle, copy, tmp_path, monkeypatch, way):
    """TensorStore itself refuses `..`."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "link").symlink_to("inner/../copy")
    (tmp_path / "inner" / "up").symlink_to("../copy")
    monkeypatch.chdir(tmp_path / "inner" if way.startswith("..") else tmp_path)
    opened = Bundle.open(way)
    assert opened.path == pathlib.Path(way)  # as errors call it
    expected, found = on_host(bundle, "vision"), flat(opened.load_vision())
    assert set(expected) == set(found)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_parts_may_be_links(bundle, copy, tmp_path):
    (copy / "vision").rename(tmp_path / "elsewhere")
    (copy / "vision").symlink_to("../copy/../elsewhere")
    assert on_host(Bundle.open(copy), "vision").keys() == on_host(bundle, "vision").keys()


def test_a_name_that_is_no_utf8_is_not_called_damage(copy, tmp_path):
    odd = tmp_path / "caf\udce9"
    copy.rename(odd)
    with pytest.raises(Emu3Error, match=r"^the path .* is not UTF-8 .*: rename it$"):
        Bundle.open(odd)


@pytest.mark.parametrize("path", ["xyz://bucket/b", "s3://b", "https://host/b", "", "x" * 300, "a\0b"])
def test_paths_that_are_none(path):
    for call in (Bundle.open, emu3_jax.load, lambda p: emu3_jax.load(vision=p)):
        with pytest.raises(Emu3Error, match=r"addresses are not supported|the path .*(empty|too long|null character)"):
            call(path)


def test_weights_land_in_their_sharding(bundle):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "tensor"))

    def sharding(path):
        spec = {"qkv": ("fsdp", None, "tensor"), "gate_up": (None, None, "tensor"), "down": (("fsdp", "tensor"),)}
        return NamedSharding(mesh, PartitionSpec(*spec.get(path[-1], ())))

    shardings = {p.path: sharding(p.path) for p in bundle.params("decoder")}
    loaded = traverse_util.flatten_dict(bundle.load_decoder(traverse_util.unflatten_dict(shardings), dtype=np.float32))
    for param, array in bundle.arrays("decoder"):
        assert loaded[param.path].sharding == shardings[param.path]
        assert loaded[param.path].dtype == np.float32
        np.testing.assert_array_equal(np.asarray(loaded[param.path]), array.astype(np.float32))


def test_the_default_is_the_first_device_and_the_stored_dtype(bundle):
    loaded = flat(bundle.load_decoder())
    assert {leaf.dtype.name for leaf in loaded.values()} == {"bfloat16"}
    assert {leaf.sharding for leaf in loaded.values()} == {jax.sharding.SingleDeviceSharding(jax.devices()[0])}
    replicated = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec())
    assert {leaf.sharding for leaf in flat(bundle.load_vision(replicated)).values()} == {replicated}


def test_the_vision_tokenizer_is_always_float32(copy):
    """A part stored in bfloat16 is widened."""
    bundle = Bundle.open(copy)
    config = json.loads((copy / "vision" / "config.json").read_text())
    halves = {p: a.astype("bfloat16") for p, a in bundle.arrays("vision")}
    shutil.rmtree(copy / "vision")
    del config["format"], config["weights_bytes"]
    arrays = [LazyArray(p.path, p.shape, a.dtype, lambda a=a: a) for p, a in halves.items()]
    write_part(copy / "vision", config, arrays)
    loaded = flat(Bundle.open(copy).load_vision())
    for param, array in halves.items():
        np.testing.assert_array_equal(loaded[param.name], array.astype(np.float32))
        assert loaded[param.name].dtype == np.float32


@pytest.mark.parametrize("part", ["decoder", "vision", "tokenizer"])
def test_a_missing_part_says_how_to_get_it(copy, part):
    shutil.rmtree(copy / part)
    bundle = Bundle.open(copy)
    assert not bundle.has(part)
    with pytest.raises(Emu3Error, match=rf"has no {part} part: .* `emu3-jax convert SRC SRC -o BUNDLE`"):
        bundle.require(part)
    calls = {"decoder": bundle.load_decoder, "vision": bundle.load_vision, "tokenizer": bundle.tokenizer}
    with pytest.raises(Emu3Error, match=f"has no {part} part"):
        calls[part]()


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("part", "changes", "complaint"),
    [
        ("decoder", {"format": 2}, r"decoder/config\.json: format is 2, this version reads 1"),
        ("decoder", {"rms_norm_eps": 0}, r"decoder/config\.json: config field rms_norm_eps is 0"),
        (
            "decoder",
            {"num_layers": -1},
            r"^\S+decoder/config\.json: config field num_layers is -1: it must be a whole number > 0; "
            r"correct it in config\.json$",
        ),
        ("decoder", {"tokens": {"pad": -1}}, r"decoder/config\.json: config field pad is -1: .* correct it in config"),
        ("decoder", {"colour": 0}, r"decoder/config\.json: unknown DecoderConfig field 'colour'"),
        ("vision", {"vision": {"embed_dim": 0}}, r"vision/config\.json: config field embed_dim is 0"),
        ("vision", {"image": {"std": 0}}, r"vision/config\.json: config field std is 0: .* correct it in config\.json"),
        ("vision", {"image": 3}, r"vision/config\.json: the ImageConfig is 3: it must be an object of named fields"),
        ("vision", {"num_batches_tracked": None}, r"vision/config\.json: config field num_batches_tracked is None"),
        ("vision", {"num_batches_tracked": {"x": "y"}}, r"num_batches_tracked is {'x': 'y'}: it must be an object of"),
        ("tokenizer", {"template": "odd"}, r"template is 'odd'; legal are chat and stage1"),
    ],
)
def test_bad_configs_are_found_on_opening(copy, part, changes, complaint):
    edit(copy / part / "config.json", **changes)
    with pytest.raises(Emu3Error, match=complaint):
        Bundle.open(copy)


def test_what_is_no_bundle(tmp_path, copy):
    with pytest.raises(Emu3Error, match="is not a directory: give a bundle"):
        Bundle.open(tmp_path / "nowhere")
    with pytest.raises(Emu3Error, match="is not a bundle"):
        Bundle.open(tmp_path)
    write_config(copy / "vision", {})
    with pytest.raises(Emu3Error, match=r"vision/config\.json: has no field 'vision'"):
        Bundle.open(copy)


def largest_file(directory):
    return max((f for f in directory.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


@pytest.mark.parametrize("damage", [lambda f: f.unlink(), lambda f: f.write_bytes(f.read_bytes()[:-9])])
def test_an_incomplete_copy(copy, damage):
    damage(largest_file(copy / "decoder" / "weights"))
    with pytest.raises(
        Emu3Error, match=r"decoder/weights holds \d+ bytes, but its config\.json says \d+: copy the bundle"
    ):
        Bundle.open(copy).load_decoder()


@pytest.mark.parametrize("file", ["_METADATA", "manifest.ocdbt"])
def test_damaged_orbax_metadata(copy, file):
    path = copy / "decoder" / "weights" / file
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(Emu3Error, match=r"decoder/weights: cannot be restored"):
        Bundle.open(copy).load_decoder()


def test_weights_of_another_config(copy):
    edit(copy / "decoder" / "config.json", intermediate_size=64)
    with pytest.raises(Emu3Error, match=r"decoder: 4 arrays are .* first layers_0/mlp/down: convert the model again"):
        Bundle.open(copy).load_decoder()
    edit(copy / "decoder" / "config.json", intermediate_size=48, num_layers=3)
    with pytest.raises(Emu3Error, match="decoder: 6 arrays are"):
        Bundle.open(copy).load_decoder()

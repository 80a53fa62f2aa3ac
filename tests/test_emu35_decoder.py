"""Emu3.5's decoder: against the golden case, at full size, and through `convert` and back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden_json, golden_npz
from emu35 import weights, write_decoder
from flax import traverse_util
from tiny import forward

import emu3_jax
from emu3_jax.checkpoints.convert import convert
from emu3_jax.checkpoints.doctor import doctor
from emu3_jax.checkpoints.export import export
from emu3_jax.checkpoints.layouts import decoder_params
from emu3_jax.checkpoints.tensors import read_safetensors_header
from emu3_jax.config import EMU35_34B, DecoderConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.models.cache import KVCache
from emu3_jax.models.decoder import Decoder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, vocabulary):
    return write_decoder(tmp_path_factory.mktemp("emu35") / "lm", vocabulary)


@pytest.fixture(scope="module")
def bundle(checkpoint):
    convert([checkpoint], checkpoint.parent / "bundle", progress=False)
    return checkpoint.parent / "bundle"


@pytest.fixture(scope="module")
def model(bundle):
    return emu3_jax.load(bundle, dtype="float32").language


def test_golden_logits_of_plain_and_left_padded_rows(model):
    golden = golden_npz("emu35/decoder.npz")
    mask = golden["attention_mask"].astype(bool)
    start = jnp.asarray((~mask).sum(axis=1), jnp.int32)
    tokens = jnp.asarray(golden["input_ids"], jnp.int32)
    logits, _ = forward(model.params, tokens, KVCache.create(model.config, start, tokens.shape[1]), model.config)
    plain, padded = np.asarray(logits[:, -1])
    np.testing.assert_allclose(plain, golden["last_logits_plain"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(padded[::8], golden["last_logits_padded_every_8th"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(jax.nn.logsumexp(logits, -1)[mask], golden["logsumexp"][mask], atol=1e-4, rtol=0)
    top = np.take_along_axis(np.asarray(logits), golden["top_ids"], axis=-1)
    np.testing.assert_allclose(top[mask], golden["top_values"][mask], atol=1e-4, rtol=0)


def test_pieces_equal_the_whole(model):
    tokens = jnp.asarray(golden_npz("emu35/decoder.npz")["input_ids"][:1, :9], jnp.int32)
    whole, _ = forward(model.params, tokens, None, model.config)
    cache, pieces = KVCache.create(model.config, jnp.zeros(1, jnp.int32), 9), []
    for piece in (tokens[:, :4], tokens[:, 4:5], tokens[:, 5:]):
        logits, cache = forward(model.params, piece, cache, model.config)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, atol=1e-4, rtol=0)


def test_what_the_files_say(model):
    config = model.config
    assert (config.family, config.qk_norm, config.head_dim) == ("emu3.5", True, 16)
    assert (config.tokens.visual_start, config.tokens.visual_end) == (151854, 282926)


def test_doctor_knows_the_family(checkpoint, tmp_path):
    """The tasks of Emu3.5 have areas of their own, so its config.json needs no `image_area`."""
    for file in checkpoint.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((checkpoint / "config.json").read_text())
    del config["image_area"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert {finding.level for finding in doctor(tmp_path, progress=False)} == {"ok"}


@pytest.mark.parametrize("name", ["lm_34b", "lm_u0_4b"])
def test_full_size_names_and_shapes_are_the_manifests(name):
    manifest = golden_json(f"emu35/{name}.json")
    told = manifest["config"]
    config = DecoderConfig(
        vocab_size=told["vocab_size"], hidden_size=told["hidden_size"], intermediate_size=told["intermediate_size"],
        num_layers=told["num_hidden_layers"], num_heads=told["num_attention_heads"],
        num_kv_heads=told["num_key_value_heads"], head_width=told["head_dim"], qk_norm=True, family="emu3.5",
        tokens=EMU35_34B.tokens,
    )  # fmt: skip
    params = decoder_params(config)
    assert {w.name: list(w.shape) for p in params for w in p.weights} == manifest["shapes"]
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    leaves = traverse_util.flatten_dict(jax.tree.map(lambda x: x.shape, _unboxed(shapes), is_leaf=_is_shape))
    assert leaves == {p.path: p.shape for p in params}
    assert sum(int(np.prod(shape)) for shape in leaves.values()) == manifest["parameters"]
    if name == "lm_34b":
        assert config.to_dict() == {**EMU35_34B.to_dict(), **_unconfirmed(config)}


def _unconfirmed(config):
    return {name: getattr(config, name) for name in ("max_positions", "image_area")}


def _is_shape(x):
    return hasattr(x, "shape")


def _unboxed(tree):
    import flax.linen as nn

    return nn.meta.unbox(tree)


def test_export_gives_the_tensors_back(bundle, tmp_path):
    export(bundle, tmp_path / "out", "upstream", progress=False)
    tensors = {t.name: t.read() for t in read_safetensors_header(tmp_path / "out" / "model.safetensors")}
    expected = weights("lm")
    assert tensors.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(np.asarray(tensors[name], np.float32).reshape(array.shape), array)
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    again = golden_json("emu35/hf_configs.json")["lm"]
    kept = ("model_type", "vocab_size", "head_dim", "rms_norm_eps", "rope_theta", "boi_token_id")
    assert {name: told[name] for name in kept} == {name: again[name] for name in kept}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rms_norm_eps": ...}, "has no rms_norm_eps, which Emu3.5 needs"),
        ({"head_dim": ..., "num_hidden_layers": ...}, "has no num_hidden_layers, head_dim, which"),
        ({"head_dim": 15}, "head_dim is 15: it must be an even number"),
        ({"head_dim": 32}, "misshapen"),
    ],
)
def test_configs_that_do_not_fit(checkpoint, vocabulary, tmp_path, change, message):
    config = golden_json("emu35/hf_configs.json")["lm"] | change
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "model.safetensors").symlink_to(checkpoint / "model.safetensors")
    text = json.dumps({name: value for name, value in config.items() if value is not ...})
    (tmp_path / "lm" / "config.json").write_text(text)
    with pytest.raises(Emu3Error, match=message):
        convert([tmp_path / "lm"], tmp_path / "bundle", progress=False)
    assert not (tmp_path / "bundle").exists()

"""Meshes, the table of axes, and sharded inference: specs as declared, results as without a mesh."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from conftest import GOLDEN, golden_json, golden_npz
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import emu3_jax
from emu3_jax.cli.main import main
from emu3_jax.config import DecoderConfig, VisionConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.generation import engine, session
from emu3_jax.generation.schedule import image_schedule, text_schedule
from emu3_jax.models.decoder import Block, Decoder
from emu3_jax.models.vision import make_decoder, make_encoder
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.rules import (
    batch_sharding,
    batch_shards,
    cache_shardings,
    decoder_shardings,
    shardings,
    use_mesh,
    vision_shardings,
)
from emu3_jax.text.prompts import generation_prompt

pytestmark = pytest.mark.slow

BATCH = ("data", "fsdp")
SPLIT = ("fsdp", "sequence")


# ------------------------------------------------------------------------------------------------ meshes


def test_a_mesh_always_has_all_axes():
    mesh = make_mesh("fsdp=2,tensor=4")
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "sequence": 1, "tensor": 4}
    assert dict(make_mesh({"data": -1, "tensor": 2}).shape) == {"data": 4, "fsdp": 1, "sequence": 1, "tensor": 2}
    assert list(make_mesh("tensor=2").devices.flat) == jax.devices()[:2]
    assert make_mesh("", jax.devices()[3:4]).devices.item() == jax.devices()[3]
    assert batch_shards(mesh) == 2 and batch_shards(None) == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("tensor=3", "mesh tensor=3 needs 3 devices, which does not divide the 8 available devices"),
        ("data=4,fsdp=4", "mesh data=4,fsdp=4 needs 16 devices, but only 8 are available: choose smaller axis sizes"),
        ("pipeline=2", "pipeline=2 is not legal: axes are data, fsdp, sequence, tensor"),
        ("tensor", "tensor= is not legal"),
        ("tensor=two", "tensor=two is not legal"),
        ("tensor=0", "tensor=0 is not legal"),
        ("tensor=2,tensor=2", "tensor=2 is not legal"),
        ("data=-1,fsdp=-1", "more than one -1"),
        ({"tensor": 2.5}, "tensor=2.5 is not legal"),
    ],
)
def test_bad_meshes_are_refused(sizes, message):
    with pytest.raises(Emu3Error, match=message):
        make_mesh(sizes)


# ------------------------------------------------------------------------------------------------ specs


def test_specs_of_the_full_size_decoder():
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    layer = {
        "attention_norm": {"scale": P(None)},
        "attention": {"qkv": P(SPLIT, "tensor", None, None), "out": P("tensor", None, None, SPLIT)},
        "mlp_norm": {"scale": P(None)},
        "mlp": {"gate_up": P(SPLIT, None, "tensor"), "down": P("tensor", SPLIT)},
    }
    table = P(None, ("fsdp", "sequence", "tensor"))
    rest = {"embed": {"embedding": table}, "norm": {"scale": P(None)}, "head": {"kernel": table}}
    specs = jax.tree.map(lambda s: s.spec, decoder_shardings(DecoderConfig(), mesh))
    assert specs == {**rest, **{f"layers_{index}": layer for index in range(32)}}
    stacked = jax.tree.map(lambda s: s.spec, decoder_shardings(DecoderConfig(), mesh, stacked=True))
    assert stacked == {**rest, "layers": jax.tree.map(lambda spec: P(None, *spec), layer)}


def test_vision_weights_are_whole_and_batches_and_caches_split():
    mesh = make_mesh("data=2,tensor=2,sequence=2")
    assert all(s.is_fully_replicated for s in jax.tree.leaves(vision_shardings(VisionConfig(), mesh)))
    assert batch_sharding(mesh).spec == P(BATCH, "sequence")
    cache = cache_shardings(tiny.CONFIG, mesh)
    assert {s.spec for s in (*cache.keys, *cache.values)} == {P(BATCH, "tensor", None, None)}
    assert (cache.start.spec, cache.length.spec) == (P(BATCH), P())


def test_an_axis_that_does_not_divide_a_weight_is_an_error_not_a_copy():
    with pytest.raises(Emu3Error) as error:
        decoder_shardings(tiny.CONFIG, make_mesh("tensor=4"))
    assert str(error.value) == (
        "weight layers_0/attention/out has size 2 along its axis 'kv_heads', which mesh tensor=4 does not divide: "
        "set tensor to one of 1, 2"
    )
    config = dataclasses.replace(tiny.CONFIG, hidden_size=12, num_heads=2)
    with pytest.raises(Emu3Error, match="embed/embedding has size 12 along its axis"):
        decoder_shardings(config, make_mesh("fsdp=8"), stacked=True)


def test_shardings_of_a_training_state_follow_the_weights():
    abstract = jax.eval_shape(Decoder(tiny.CONFIG).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    state = {"step": jax.ShapeDtypeStruct((), jnp.int32), "mean": abstract}
    placed = shardings(state, make_mesh("fsdp=4"))
    assert placed["step"].spec == P()
    assert placed["mean"]["params"]["layers_1"]["mlp"]["down"].spec == P("tensor", SPLIT)


# ------------------------------------------------------------------------------------------------ activations


@pytest.mark.parametrize("sizes", ["data=2,fsdp=2,tensor=2", "fsdp=2,sequence=2,tensor=2"])
def test_the_residual_stream_lies_as_declared(sizes):
    mesh = make_mesh(sizes)
    params = jax.device_put(tiny.params(), decoder_shardings(tiny.CONFIG, mesh))
    tokens = jax.device_put(np.arange(64, dtype=np.int32).reshape(4, 16) % 32, batch_sharding(mesh))

    def blocks(params, tokens):
        (_, _), sown = Decoder(tiny.CONFIG).apply(
            {"params": params}, tokens, capture_intermediates=lambda module, _: isinstance(module, Block)
        )
        return [sown["intermediates"][f"layers_{index}"]["__call__"][0][0] for index in range(2)]

    with use_mesh(mesh):
        residuals = jax.jit(blocks)(params, tokens)
    for residual, expected in zip(residuals, jax.jit(blocks)(tiny.params(), np.asarray(tokens)), strict=True):
        assert residual.sharding.is_equivalent_to(batch_sharding(mesh), residual.ndim)
        np.testing.assert_allclose(residual, expected, atol=1e-4, rtol=1e-5)


def compiled_decode(mesh, config, params, visual_only):
    """The state after prefill, and the text of the compiled loop."""
    schedule = image_schedule(7, 7) if visual_only else text_schedule(60)
    rows = [session.Row([17] * 16, schedule, [17] * 16)] * 2
    decoding = session.DecodeSession(params, config, rows, tiny.settings(2, top_k=4), mesh=mesh)
    decoding.start()
    return decoding.state, decoding.lower_decode(decoding.state.cache.slots).compile().as_text()


@pytest.mark.parametrize("visual_only", [True, False])
def test_tensor_parallel_decoding_moves_activations_never_weights(visual_only):
    mesh = make_mesh("tensor=4")
    config = dataclasses.replace(tiny.CONFIG, hidden_size=128, num_heads=8, num_kv_heads=4, intermediate_size=256)
    params = jax.device_put(tiny.params(config), decoder_shardings(config, mesh))
    state, text = compiled_decode(mesh, config, params, visual_only)
    for array, sharding in zip(state.cache.keys, cache_shardings(config, mesh).keys, strict=True):
        assert array.sharding.is_equivalent_to(sharding, 4)
    assert state.tokens.sharding.is_fully_replicated
    collectives = re.findall(r"= (\w+\[[\d,]*\])\S* (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", text)
    logits = config.tokens.visual_count if visual_only else config.vocab_size
    # The embedding's width gathered; per layer one sum after attention and one after the MLP; the logits summed.
    assert sorted(collectives) == sorted(
        [("f32[4,1,128]", "all-gather"), *[("f32[4,1,128]", "all-reduce")] * 4, (f"f32[4,1,{logits}]", "all-reduce")]
    )


# ------------------------------------------------------------------------------------------------ inference

MESHES = ["tensor=2", "data=2,tensor=2", "fsdp=4", "data=2,fsdp=2,tensor=2", "sequence=2,tensor=2"]


@pytest.mark.parametrize("sizes", MESHES)
def test_golden_pictures_on_every_mesh(sizes, golden_model):
    mesh, language, golden = make_mesh(sizes), golden_model.language, golden_npz("generate.npz")
    case = golden_json("prompts.json")["generate"]["wide"]
    height, width = golden["wide/image_size"][0]
    prompt, negative = (
        generation_prompt(language.tokenizer, language.config.tokens, text, height, width)
        for text in (case["text"][0], case["negative"])
    )
    params = jax.device_put(language.params, decoder_shardings(language.config, mesh))
    engine.decode.jitted.clear_cache()
    ids = session.run(
        params,
        language.config,
        [session.Row(prompt, image_schedule(height, width), negative)],
        tiny.settings(1, temperature=0.0, guidance=case["guidance"]),
        mesh=mesh,
    ).ids
    np.testing.assert_array_equal(ids[0], golden["wide/sequences"][0, int(golden["wide/prompt_length"]) :])
    assert engine.decode.jitted._cache_size() == 1  # what a call returns lies where the next expects it


def test_sampled_rows_that_do_not_fill_the_mesh():
    prompts, schedules = [[17, 1, 2], [17], [17, 5, 6, 7]], [text_schedule(5), text_schedule(9), text_schedule(7)]
    settings = tiny.settings(3, temperature=[1.0, 0.8, 1.2], top_k=[8, 3, 32])
    rows = tiny.rows(prompts, schedules)
    alone = session.run(tiny.params(), tiny.CONFIG, rows, settings).ids
    mesh = make_mesh("data=4,tensor=2")
    params = jax.device_put(tiny.params(), decoder_shardings(tiny.CONFIG, mesh))
    spread = session.run(params, tiny.CONFIG, rows, settings, mesh=mesh).ids
    np.testing.assert_array_equal(spread, alone)


def test_load_restores_into_the_mesh_and_gives_the_golden_results(golden_bundle):
    golden = golden_npz("generate.npz")
    model = emu3_jax.load(golden_bundle, dtype="float32", mesh="data=2,tensor=2")
    language = model.language
    expected = decoder_shardings(language.config, language.mesh)
    assert jax.tree.all(jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, language.params, expected))
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(model.vision.params))
    case = golden_json("prompts.json")["chat"]["batch"]
    answers = model.chat([GOLDEN / f"{i}.png" for i in case["images"]], case["text"], max_new_tokens=case["new"])
    length = int(golden["batch/prompt_length"])
    rows = golden["batch/sequences"][:, length:]
    assert answers == [language.tokenizer.decode(row.tolist(), skip_special=True) for row in rows]


def test_the_command_line_takes_a_mesh(golden_bundle, tmp_path, capsys):
    arguments = ["generate", "a", "--model", str(golden_bundle), "-o", str(tmp_path / "out"), "--quiet"]
    assert main([*arguments, "--mesh", "tensor=4"]) == 2
    assert "weight layers_0/attention/out has size 2 along its axis 'kv_heads'" in capsys.readouterr().err
    assert main([*arguments, "--mesh", "tensor=3"]) == 2
    assert "does not divide the 8" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ vision


def test_a_batch_of_pictures_on_a_mesh_has_the_same_codes_and_pixels(golden_model):
    vision, golden = golden_model.vision, golden_npz("vision.npz")
    mesh = make_mesh("data=2,tensor=2")
    params = jax.device_put(vision.params, vision_shardings(vision.config, mesh))
    pixels = np.moveaxis(golden["image_batch/pixels"], 1, -1)
    pixels = np.concatenate([pixels, pixels[:, ::-1]])
    codes = make_encoder(vision.config)(params, pixels)
    assert codes.sharding.is_equivalent_to(NamedSharding(mesh, P()), 3)
    np.testing.assert_array_equal(codes[:2], golden["image_batch/codes"])
    np.testing.assert_array_equal(codes, make_encoder(vision.config)(vision.params, pixels))
    drawn = make_decoder(vision.config)(params, codes)
    alone = make_decoder(vision.config)(vision.params, np.asarray(codes))
    np.testing.assert_allclose(drawn, alone, atol=1e-5, rtol=0)

"""The decoder against the golden case, against itself in pieces, and at full size."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from conftest import GOLDEN, golden_npz
from tiny import forward

from emu3_jax.config import DecoderConfig
from emu3_jax.models import attention
from emu3_jax.models.cache import KVCache
from emu3_jax.models.decoder import Decoder, visual_head_params


@pytest.fixture(scope="module")
def golden():
    return golden_npz("decoder.npz")


def test_golden_logits_of_plain_and_left_padded_rows(golden, golden_model):
    config, params = golden_model.language.config, golden_model.language.params
    mask = golden["attention_mask"].astype(bool)
    start = jnp.asarray((~mask).sum(axis=1), jnp.int32)
    assert start.tolist() == [0, 13]
    tokens = jnp.asarray(golden["input_ids"], jnp.int32)
    logits, cache = forward(params, tokens, KVCache.create(config, start, tokens.shape[1]), config)
    logits = np.asarray(logits)
    assert (np.asarray(cache.length) == tokens.shape[1]).all()
    np.testing.assert_allclose(logits[:, -1], golden["last_logits"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(jax.nn.logsumexp(logits, -1)[mask], golden["logsumexp"][mask], atol=1e-4, rtol=0)
    top = np.take_along_axis(logits, golden["top_ids"], axis=-1)
    np.testing.assert_allclose(top[mask], golden["top_values"][mask], atol=1e-4, rtol=0)


def test_prefill_and_decode_equal_the_full_forward():
    config, params = tiny.CONFIG, tiny.params()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (3, 12)), jnp.int32)
    full, _ = forward(params, tokens)
    cache = KVCache.create(config, jnp.zeros(3, jnp.int32), 20)
    pieces = []
    for piece in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:9], tokens[:, 9:10], tokens[:, 10:]):
        logits, cache = forward(params, piece, cache)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), full, atol=1e-4, rtol=0)


def test_padding_enters_neither_attention_nor_positions():
    config, params = tiny.CONFIG, tiny.params()
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, (1, 7)), jnp.int32)
    alone, _ = forward(params, tokens)
    for filler in (0, config.tokens.pad):
        padded = jnp.concatenate([jnp.full((1, 6), filler, jnp.int32), tokens], axis=1)
        cache = KVCache.create(config, jnp.asarray([6], jnp.int32), 13)
        logits, _ = forward(params, padded, cache)
        np.testing.assert_allclose(logits[:, 6:], alone, atol=1e-4, rtol=0)


def test_causality_through_gradients():
    config, params = tiny.CONFIG, tiny.params()
    embedding = params["embed"]["embedding"]
    tokens = jnp.arange(10, dtype=jnp.int32)[None]  # each id once, so row i of the gradient belongs to position i

    def logit(table):
        changed = {**params, "embed": {"embedding": table}}
        return Decoder(config).apply({"params": changed}, tokens)[0][0, 4].sum()

    influence = np.abs(jax.jit(jax.grad(logit))(embedding)).sum(axis=1)[:10]
    assert (influence[:5] > 0).all() and (influence[5:] == 0).all()


def test_query_blocks_equal_one_block(monkeypatch):
    config, params = tiny.CONFIG, tiny.params()
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, config.vocab_size, (2, 23)), jnp.int32)
    cache = KVCache.create(config, jnp.asarray([0, 3], jnp.int32), 32)
    whole, _ = forward(params, tokens, cache)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)
    blocks, _ = jax.jit(Decoder(config).apply)({"params": params}, tokens, cache)
    np.testing.assert_allclose(blocks[0], whole[0], atol=1e-4, rtol=0)
    np.testing.assert_allclose(blocks[1, 3:], whole[1, 3:], atol=1e-4, rtol=0)


def test_visual_head_is_the_visual_columns():
    config, params = tiny.CONFIG, tiny.params()
    tokens = jnp.asarray([[17, 1, 2, 20, 19]], jnp.int32)
    full, _ = forward(params, tokens, last_only=True)
    visual, _ = forward(visual_head_params(params, config), tokens, last_only=True, visual_head=True)
    assert visual.shape == (1, 1, config.tokens.visual_count)
    np.testing.assert_array_equal(visual, full[..., config.tokens.visual_start :])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_compute_stays_near_float32(dtype):
    params = tiny.params()
    tokens = jnp.asarray([[17, 1, 2, 3, 20, 19, 25]], jnp.int32)
    exact, _ = forward(params, tokens)
    config = dataclasses.replace(tiny.CONFIG, dtype=dtype)
    narrow, _ = forward(jax.tree.map(lambda x: x.astype(dtype), params), tokens, config=config)
    assert narrow.dtype == jnp.float32
    assert float(jnp.abs(narrow - exact).max() / jnp.abs(exact).max()) < 0.05


def test_full_size_shapes_equal_the_manifest():
    config = DecoderConfig()
    abstract = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    boxes = jax.tree.leaves(abstract, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    assert all(isinstance(box, nn.LogicallyPartitioned) and len(box.names) == box.value.ndim for box in boxes)
    shapes = jax.tree.map(lambda leaf: leaf.shape, nn.unbox(abstract), is_leaf=lambda leaf: hasattr(leaf, "shape"))
    manifest = json.loads((GOLDEN / "manifest" / "upstream.json").read_text())["decoder_8b"]
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(nn.unbox(abstract))) == sum(
        np.prod(shape) for shape in manifest.values()
    )
    d, k, g, h, f = 4096, 8, 4, 128, 14336
    assert shapes["embed"]["embedding"] == tuple(manifest["model.embed_tokens.weight"])
    assert shapes["head"]["kernel"] == tuple(manifest["lm_head.weight"])
    assert len([name for name in shapes if name.startswith("layers_")]) == 32
    for index in range(32):
        assert shapes[f"layers_{index}"] == {
            "attention_norm": {"scale": (d,)},
            "attention": {"qkv": (d, k, g + 2, h), "out": (k, g, h, d)},
            "mlp_norm": {"scale": (d,)},
            "mlp": {"gate_up": (d, 2, f), "down": (f, d)},
        }

"""Name tables against the published manifests, and packing against its inverse and the modules' own shapes."""

import itertools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import golden_json
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st

from emu3_jax.checkpoints import layouts
from emu3_jax.checkpoints.layouts import Weight, decoder_params, vision_counters, vision_params
from emu3_jax.checkpoints.tensors import Tensor
from emu3_jax.config import DecoderConfig, IbqConfig, SpecialTokens, VisionConfig
from emu3_jax.models.decoder import Decoder
from emu3_jax.models.vision import VisionTokenizer

ALL = (
    layouts.UPSTREAM_DECODER,
    layouts.UPSTREAM_VISION,
    layouts.IBQ_VISION,
    layouts.TRANSFORMERS_VISION,
    layouts.TRANSFORMERS_4,
    layouts.TRANSFORMERS_5,
)


def full_size(layout: layouts.Layout) -> dict[str, list[int]]:
    """Every name and shape that the tables expect of the published models in this layout."""
    decoder = [w for p in decoder_params(DecoderConfig()) for w in p.weights]
    config = IbqConfig() if layout is layouts.IBQ_VISION else VisionConfig()
    vision = [w for p in vision_params(config) for w in p.weights] + vision_counters(config)
    weights = {"decoder": decoder, "vision": vision}
    renamed = [layout.rename(w, part) for part in layout.parts for w in weights[part]]
    assert len({w.name for w in renamed}) == len(renamed), "two weights of one name"
    return {w.name: list(w.shape) for w in renamed}


@pytest.mark.parametrize(
    ("layout", "manifest"),
    [
        (layouts.UPSTREAM_DECODER, ("upstream", "decoder_8b")),
        (layouts.UPSTREAM_VISION, ("upstream", "vision_tokenizer")),
        (layouts.TRANSFORMERS_4, ("transformers_4.51",)),
        (layouts.TRANSFORMERS_5, ("transformers_5.23",)),
    ],
    ids=lambda value: getattr(value, "title", ""),
)
def test_full_size_names_and_shapes_are_the_manifests(layout, manifest):
    expected = golden_json(f"manifest/{manifest[0]}.json")
    for key in manifest[1:]:
        expected = expected[key]
    assert full_size(layout) == expected


def test_standalone_vision_of_transformers_is_the_part_of_the_whole():
    whole = golden_json("manifest/transformers_5.23.json")
    prefix = "model.vqmodel."
    part = {name.removeprefix(prefix): shape for name, shape in whole.items() if name.startswith(prefix)}
    assert full_size(layouts.TRANSFORMERS_VISION) == part


@pytest.mark.parametrize("layout", ALL, ids=lambda layout: layout.title)
def test_layouts_are_told_apart_by_names(layout):
    assert layouts.detect_layout(full_size(layout)) is layout


def test_other_checkpoints_are_no_layout():
    assert layouts.detect_layout(["transformer.h.0.attn.weight", "encoder.layers.0.weight"]) is None


def shapes_of(params) -> dict[str, tuple[int, ...]]:
    return {"/".join(path): leaf.shape for path, leaf in traverse_util.flatten_dict(nn.meta.unbox(params)).items()}


def test_vision_params_are_the_modules_at_full_size():
    pixels = jax.ShapeDtypeStruct((1, 4, 64, 64, 3), jnp.float32)
    params = jax.eval_shape(VisionTokenizer(VisionConfig()).init, jax.random.key(0), pixels)["params"]
    assert {p.name: p.shape for p in vision_params(VisionConfig())} == shapes_of(params)


def test_decoder_params_are_the_modules_at_full_size():
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    params = jax.eval_shape(Decoder(DecoderConfig()).init, jax.random.key(0), tokens)["params"]
    assert {p.name: p.shape for p in decoder_params(DecoderConfig())} == shapes_of(params)


def small_decoder(kv: int, group: int, half_width: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=40,
        hidden_size=kv * group * 2 * half_width,
        intermediate_size=6,
        num_layers=1,
        num_heads=kv * group,
        num_kv_heads=kv,
        tokens=SpecialTokens(*range(8), visual_start=8, visual_count=32),
    )


@settings(max_examples=25, deadline=None)
@given(kv=st.integers(1, 3), group=st.integers(1, 3), half=st.integers(1, 3), dtype=st.sampled_from(("f4", "bf16")))
def test_packing_the_decoder_loses_no_bit(kv, group, half, dtype):
    config = small_decoder(kv, group, half)
    rng = np.random.default_rng(0)
    numpy_dtype = np.dtype(ml_dtypes.bfloat16) if dtype == "bf16" else np.dtype(np.float32)
    for param in decoder_params(config):
        arrays = [rng.standard_normal(w.shape).astype(numpy_dtype) for w in param.weights]
        packed = param.pack(arrays)
        assert packed.shape == param.shape and packed.dtype == numpy_dtype
        for before, after in zip(arrays, param.unpack(packed), strict=True):
            np.testing.assert_array_equal(before, after)


def test_fused_attention_axes_mean_what_the_legend_says():
    """Query head k * G + g of the reference is [:, k, g]; its key head k is [:, k, G], its value head [:, k, G + 1]."""
    config = small_decoder(kv=2, group=3, half_width=2)
    h, d = config.head_dim, config.hidden_size
    param = next(p for p in decoder_params(config) if p.name.endswith("attention/qkv"))
    q, k, v = (np.random.default_rng(i).standard_normal(w.shape) for i, w in enumerate(param.weights))
    packed = param.pack([q, k, v])
    for kv, g in itertools.product(range(2), range(3)):
        head = kv * 3 + g
        np.testing.assert_array_equal(packed[:, kv, g], q.reshape(6, h, d)[head].T)
        np.testing.assert_array_equal(packed[:, kv, 3], k.reshape(2, h, d)[kv].T)
        np.testing.assert_array_equal(packed[:, kv, 4], v.reshape(2, h, d)[kv].T)


def test_convolutions_turn_channels_last():
    params = {p.name: p for p in vision_params(VisionConfig(base_channels=32))}
    for name, axes in {
        "encoder/conv_in/kernel": (2, 3, 1, 0),
        "encoder/time_conv_0/conv/conv/kernel": (2, 3, 4, 1, 0),
    }.items():
        (weight,) = params[name].weights
        array = np.random.default_rng(0).standard_normal(weight.shape)
        np.testing.assert_array_equal(params[name].pack([array]), array.transpose(axes))
        np.testing.assert_array_equal(params[name].unpack(params[name].pack([array]))[0], array)


def tensor(name: str, shape: tuple[int, ...], dtype=np.float32) -> Tensor:
    return Tensor(name, shape, np.dtype(dtype), Path("x"), 0)


def test_all_misfits_are_reported_together_with_counts():
    expected = [Weight(f"w{i}", (2, 3)) for i in range(8)]
    tensors = [
        tensor("w0", (2, 3)), tensor("w0", (2, 3)), tensor("w1", (3, 2)), tensor("w2", (2, 3), np.int8),
        tensor("stray", (1,)), tensor("n", ()), tensor("model.layers.0.self_attn.rotary_emb.inv_freq", (8,)),
    ]  # fmt: skip
    assert layouts.misfits(expected, [Weight("n", ())], tensors) == [
        "5 missing: w3, w4, w5 and 2 more",
        "1 unmapped: stray",
        "1 stored twice: w0",
        "1 misshapen: w1 (found [3, 2], expected [2, 3])",
        "1 not float32, bfloat16, float16: w2 (int8)",
        "1 not int64: n (float32)",
    ]
    assert layouts.misfits(expected[:1], [Weight("n", ())], [tensor("w0", (2, 3))]) == []

"""Configs: the published files of three layouts, the way back, and fields out of range."""

import dataclasses
import json
import math
import pathlib
import re

import pytest
from conftest import golden_json
from hypothesis import given
from hypothesis import strategies as st
from published_configs import IMAGE, TRANSFORMERS_4, TRANSFORMERS_5, UPSTREAM_DECODER, UPSTREAM_VISION, VQ

from emu3_jax.checkpoints.published_config import (
    decoder_from_published,
    decoder_to_published,
    image_from_published,
    image_to_published,
    vision_from_published,
    vision_to_published,
)
from emu3_jax.config import DecoderConfig, ImageConfig, SpecialTokens, VisionConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.fields import FieldError, read_from

SMALL = DecoderConfig(
    vocab_size=1000 + 211 + 16, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2,
    max_positions=512, rms_norm_eps=1e-6, rope_theta=5000.0, image_area=4096,
    tokens=SpecialTokens(1000, 1206, 1207, 1208, 1209, 1210, 1203, 1204, 1211, 16),
)  # fmt: skip


@pytest.mark.parametrize("data", [UPSTREAM_DECODER, TRANSFORMERS_4, TRANSFORMERS_5, TRANSFORMERS_5["text_config"]])
def test_published_decoders_are_the_default(data):
    assert decoder_from_published(data) == DecoderConfig()


@pytest.mark.parametrize("data", [UPSTREAM_VISION, VQ])
def test_published_vision_tokenizers_are_the_default(data):
    assert vision_from_published(data) == VisionConfig()


def test_published_preprocessor_is_the_default():
    assert image_from_published(IMAGE) == ImageConfig()
    assert image_from_published({**IMAGE, "image_mean": 0.5, "image_std": 0.5}) == ImageConfig()


def test_absent_fields_keep_the_published_defaults():
    assert decoder_from_published({}) == DecoderConfig()
    assert vision_from_published({}) == VisionConfig()


def test_golden_configs():
    configs = golden_json("hf_configs.json")
    decoder = decoder_from_published(configs["lm"])
    assert (decoder.hidden_size, decoder.num_layers, decoder.head_dim) == (64, 2, 16)
    assert decoder.tokens == SpecialTokens()
    vision = vision_from_published(configs["vq"])
    assert (vision.base_channels, vision.num_res_blocks, vision.spatial_factor) == (32, 1, 8)
    image = image_from_published(configs["image_processor"])
    assert (image.min_pixels, image.max_pixels) == (4096, 16384)


@pytest.mark.oracle
def test_live_transformers_configs():
    from transformers import Emu3Config

    data = json.loads(Emu3Config().to_json_string())
    assert vision_from_published(data["vq_config"]) == VisionConfig()
    assert decoder_from_published(data) == DecoderConfig()


@pytest.mark.oracle
def test_transformers_reads_what_we_write():
    from transformers.models.emu3.configuration_emu3 import Emu3TextConfig, Emu3VQVAEConfig

    theirs = Emu3TextConfig(**decoder_to_published(SMALL, "transformers")).to_dict()
    found = decoder_from_published(json.loads(json.dumps(theirs)), codebook_size=16)
    assert found == dataclasses.replace(SMALL, image_area=DecoderConfig.image_area)  # upstream's own field
    vision = VisionConfig(codebook_size=64, base_channels=32, channel_multipliers=(1, 2), attention_stages=(1,))
    theirs = Emu3VQVAEConfig(**vision_to_published(vision, "transformers")).to_dict()
    assert vision_from_published(theirs) == vision


def _through_json(data):
    return json.loads(json.dumps(data))


def test_upstream_round_trip():
    written = _through_json(decoder_to_published(SMALL, "upstream"))
    assert decoder_from_published(written, codebook_size=16) == SMALL
    vision = VisionConfig(embed_dim=8, latent_channels=8, channel_multipliers=(1, 4), attention_stages=())
    assert vision_from_published(_through_json(vision_to_published(vision, "upstream"))) == vision


@pytest.mark.parametrize("layout", ["upstream", "transformers"])
def test_image_round_trip(layout):
    config = ImageConfig(64, 4096, mean=(0.1, 0.2, 0.3), std=(1.0, 0.5, 0.25))
    assert image_from_published(_through_json(image_to_published(config, layout))) == config


@pytest.mark.parametrize("config", [SMALL, VisionConfig(base_channels=32), ImageConfig(64, 128)])
def test_own_json_round_trip(config):
    assert type(config).from_dict(_through_json(config.to_dict())) == config


def test_small_vocabulary_shifts_the_control_tokens():
    text = {"vocab_size": SMALL.vocab_size, "pad_token_id": 1000, "bos_token_id": 1206, "eos_token_id": 1207}
    assert decoder_from_published(text, codebook_size=16).tokens == SMALL.tokens


def test_unknown_and_missing_fields_of_our_own_files():
    with pytest.raises(Emu3Error, match="unknown VisionConfig field 'depth'"):
        VisionConfig.from_dict({"depth": 3})
    with pytest.raises(Emu3Error, match="unknown SpecialTokens field 'mask'"):
        DecoderConfig.from_dict({"tokens": {"mask": 3}})


@pytest.mark.parametrize(
    "cls, change, message",
    [
        (DecoderConfig, {"hidden_size": 4095}, r"hidden_size is 4095: it must be a multiple of num_heads \(32\)"),
        (DecoderConfig, {"hidden_size": 32}, "even head width"),
        (DecoderConfig, {"num_kv_heads": 5}, "num_heads is 32: it must be a multiple of num_kv_heads"),
        (DecoderConfig, {"num_layers": 0}, "num_layers is 0: it must be a whole number > 0"),
        (DecoderConfig, {"num_layers": -1}, "num_layers is -1: it must be a whole number > 0"),
        (DecoderConfig, {"num_layers": True}, "num_layers is True"),
        (DecoderConfig, {"rms_norm_eps": math.nan}, "rms_norm_eps is nan: it must be a finite number > 0"),
        (DecoderConfig, {"rope_theta": -1.0}, "rope_theta is -1.0"),
        (DecoderConfig, {"rope_theta": 10**400}, "rope_theta is 1000"),
        (DecoderConfig, {"dtype": "int8"}, "dtype is 'int8': it must be bfloat16, float16 or float32"),
        (DecoderConfig, {"vocab_size": 184621}, r"vocab_size is 184621: .* highest token id \(184621\)"),
        (DecoderConfig, {"num_layers": 10**9}, "num_layers is 1000000000: it must be at most 1,024"),
        (DecoderConfig, {"vocab_size": 10**12}, "vocab_size is 1000000000000: it must be at most 8,388,608"),
        (DecoderConfig, {"max_positions": 10**12}, "max_positions .* at most 16,777,216"),
        (DecoderConfig, {"clip_frames": 10**9}, "clip_frames is 1000000000: it must be at most 1,048,576"),
        (SpecialTokens, {"visual_count": 10**9}, "visual_count is 1000000000: it must be"),
        (SpecialTokens, {"eos": 2**31}, "eos is 2147483648: it must be less than 8,388,608"),
        (VisionConfig, {"num_res_blocks": 10**9}, "num_res_blocks is 1000000000: it must be at most 64"),
        (VisionConfig, {"codebook_size": 10**9}, "codebook_size is 1000000000: it must be at most 1,048,576"),
        (VisionConfig, {"channel_multipliers": (1,) * 9}, "for each of 1 to 8 stages"),
        (VisionConfig, {"channel_multipliers": (10**9,)}, "one whole number from 1 to 64"),
        (VisionConfig, {"attention_stages": (3,) * 5}, "stage indices from 0 to 3"),
        (ImageConfig, {"max_pixels": 10**12}, "max_pixels is 1000000000000: it must be at most"),
        (SpecialTokens, {"eos": 151849}, "bos is 151849: it must be different from eos"),
        (SpecialTokens, {"eoi": 151854}, r"eoi is 151854: it must be outside the visual ids 151854\.\.184621"),
        (SpecialTokens, {"pad": -1}, "pad is -1: it must be an id >= 0"),
        (VisionConfig, {"temporal_factor": 3}, "temporal_factor is 3: it must be a power of two"),
        (VisionConfig, {"base_channels": 48}, "a multiple of 32"),
        (VisionConfig, {"attention_stages": (4,)}, "stage indices from 0 to 3"),
        (VisionConfig, {"channel_multipliers": ()}, "channel_multipliers"),
        (VisionConfig, {"embed_dim": 8}, r"equal to latent_channels \(4\)"),
        (ImageConfig, {"min_pixels": 2**21}, r"min_pixels is 2097152: it must be <= max_pixels"),
        (ImageConfig, {"mean": (0.5, 0.5)}, "three"),
        (ImageConfig, {"mean": (0.5, 0.5, math.nan)}, "mean"),
        (ImageConfig, {"std": (0.5, 0.5, 0.0)}, "std"),
    ],
)
def test_fields_out_of_range(cls, change, message):
    with pytest.raises(Emu3Error, match=message) as error:
        cls(**change)
    assert str(error.value).startswith(f"{cls.__name__} field ")
    assert "config.json" not in str(error.value)  # these come from Python


@pytest.mark.parametrize(
    "read, data, message",
    [
        (decoder_from_published, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (decoder_from_published, {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        (decoder_from_published, {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling is 'linear'"),
        (decoder_from_published, {"rope_parameters": {"rope_type": "yarn"}}, "rope_scaling is 'yarn'"),
        (decoder_from_published, {"vocab_size": 300}, "vocab_size is 300: it must be more than the codebook"),
        (vision_from_published, {"double_z": True}, "double_z is True"),
        (image_from_published, {"resample": 2}, r"resample is 2: it must be 3 \(bicubic\)"),
        (image_from_published, {"rescale_factor": 1 / 127.5}, "rescale_factor"),
        (image_from_published, {"do_resize": False}, "do_resize is False: it must be true"),
        (image_from_published, {"do_rescale": False}, "do_rescale is False: it must be true"),
        (image_from_published, {"do_normalize": 0}, "do_normalize is 0: it must be true or false"),
        (image_from_published, {"do_convert_rgb": False}, "do_convert_rgb is False: it must be true"),
        (image_from_published, {"do_center_crop": True}, "do_center_crop is True: it must be false or absent"),
        (image_from_published, {"size": {"height": 64}}, r"size is {'height': 64}: it must be {'min_pixels': 262144"),
        (vision_from_published, {"num_attention_heads": 2}, "num_attention_heads is 2: it must be 1"),
        (vision_from_published, {"hidden_size": 512}, "hidden_size is 512: it must be 1024, the base channels"),
        (
            decoder_from_published,
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor is 0.5: it must be 1 or absent",
        ),
        (decoder_from_published, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        (decoder_from_published, {"rope_parameters": {"full_attention": {}}}, r"rope_parameters.full_attention is {}"),
        (decoder_from_published, {"rope_scaling": {"type": "default", "factor": 8}}, r"rope_scaling.factor is 8"),
        (decoder_from_published, {"sliding_window": 4096}, "sliding_window is 4096: it must be false or absent"),
        (decoder_from_published, {"attention_bias": True}, "attention_bias is True"),
        (decoder_from_published, {"mlp_bias": True}, "mlp_bias is True"),
        (
            decoder_from_published,
            {"head_dim": 64},
            "head_dim is 64: it must be hidden_size / num_attention_heads = 128",
        ),
        (decoder_from_published, {"layer_types": ["sliding_attention"]}, "layer_types is"),
        (decoder_from_published, {"quantization_config": {"bits": 4}}, "quantization_config is"),
        (decoder_from_published, {"vq_config": {"codebook_size": 10**9}}, "codebook_size is 1000000000: it must be"),
        (
            decoder_from_published,
            {"vq_config": {"codebook_size": 2}, "vocabulary_map": {"<|visual token 000000|>": 700}},
            "^vocabulary_map: it names 1 visual tokens, but the codebook has 2 codes",
        ),
        (
            decoder_from_published,
            {"vocabulary_map": {"<|visual token 000000|>": 700, "<|image end|>": 5}},
            r"^vocabulary_map: it has <\|image end\|> at id 5, but its other tokens imply id 699",
        ),
        (decoder_from_published, {"vocabulary_map": [5]}, r"vocabulary_map is \[5\]: it must be an object"),
    ],
)
def test_published_features_that_no_emu3_uses(read, data, message):
    with pytest.raises(Emu3Error, match=message):
        read(data)


def test_fields_that_say_what_holds_anyway():
    same = {
        "head_dim": 128,
        "sliding_window": None,
        "partial_rotary_factor": 1.0,
        "layer_types": ["full_attention"] * 32,
    }
    assert decoder_from_published({**UPSTREAM_DECODER, **same, "hidden_act": "swish"}) == DecoderConfig()
    nested = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 1}
    assert decoder_from_published({"rope_parameters": nested}).rope_theta == 5000.0
    assert decoder_from_published({"rope_theta": 7.0, "rope_scaling": nested}).rope_theta == 5000.0
    size = {"min_pixels": 262144, "max_pixels": 1048576}
    assert image_from_published({**IMAGE, "size": size, "do_pad": True, "do_convert_rgb": None}, 8) == ImageConfig()
    assert image_from_published({**IMAGE, "do_normalize": False}) == ImageConfig(mean=(0.0,) * 3, std=(1.0,) * 3)


PADDED = {"vocab_size": 184704}


@pytest.mark.parametrize(
    "data, vocabulary, start",
    [
        ({**UPSTREAM_DECODER, **PADDED}, None, 151854),  # the ids that the config names tell
        ({"vocab_size": 184704, "bos_token_id": 151849, "eos_token_id": 151850}, None, 151854),
        (PADDED, SpecialTokens(), 151854),
        ({**PADDED, "pad_token_id": 184622}, SpecialTokens(), 151854),
        ({"eos_token_id": 151645}, None, 151854),  # the published size tells
        ({**PADDED, "vocabulary_map": {"<|image end|>": 151853}}, None, 151854),
        ({**PADDED, "vocabulary_map": {"<|image end|>": 1210}}, None, 1211),
        ({**PADDED, "vocabulary_map": {f"<|visual token {i:06d}|>": 1211 + i for i in range(16)}}, None, 1211),
        ({**PADDED, "vocabulary_map": {"<image>": 3}}, SpecialTokens(), 151854),
    ],
)
def test_ids_of_padded_vocabularies(data, vocabulary, start):
    config = decoder_from_published(data, None, vocabulary)
    assert (config.tokens.visual_start, config.vocab_size) == (start, data.get("vocab_size", 184622))
    assert config.tokens.boi == start - 2


@pytest.mark.parametrize(
    "data",
    [
        PADDED,
        {**PADDED, "bos_token_id": 151849, "eos_token_id": 151643},
        {**PADDED, "boi_token_id": 5, "eol_token_id": 9},
    ],
)
def test_ids_that_nothing_tells_are_refused(data):
    with pytest.raises(Emu3Error, match=r"nothing says which ids .* have: copy the model's vocabulary \(emu3.tiktoken"):
        decoder_from_published(data)


@pytest.mark.parametrize(
    "read, data, message",
    [
        (decoder_from_published, {"num_hidden_layers": -1}, "num_hidden_layers is -1: it must be a whole number > 0"),
        (
            decoder_from_published,
            {"num_attention_heads": 3, "hidden_size": 64},
            "hidden_size is 64: it must be a multiple of num_attention_heads (3)",
        ),
        (decoder_from_published, {"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0: it must be a finite number"),
        (
            decoder_from_published,
            {"bos_token_id": 151850},
            "bos_token_id is 151850: it must be different from eos_token_id",
        ),
        (vision_from_published, {"double_latent": True}, "double_latent is True: it must be false"),
        (vision_from_published, {"ch": 48}, "ch is 48: it must be a multiple of 32"),
        (vision_from_published, {"base_channels": 48}, "base_channels is 48: it must be a multiple of 32"),
        (vision_from_published, {"z_channels": 8}, "embed_dim is 4: it must be equal to z_channels (8)"),
        (image_from_published, {"image_std": [1.0, 0.0, 1.0]}, "image_std is (1.0, 0.0, 1.0): it must be three finite"),
    ],
)
def test_published_fields_are_called_by_their_names_in_the_file(read, data, message):
    with pytest.raises(FieldError, match=f"^config field {re.escape(message)}"):
        read(data)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_a_value_is_corrected_in_the_file_that_it_came_from(name):
    file = pathlib.Path("model") / name
    with pytest.raises(Emu3Error) as error, read_from(file):
        ImageConfig(min_pixels=0)
    found = f"{file}: config field min_pixels is 0: it must be a whole number > 0; correct it in {name}"
    assert str(error.value) == found


_PUBLISHED = [
    (decoder_from_published, UPSTREAM_DECODER),
    (decoder_from_published, TRANSFORMERS_4),
    (decoder_from_published, TRANSFORMERS_5),
    (decoder_from_published, TRANSFORMERS_5["text_config"]),
    (vision_from_published, UPSTREAM_VISION),
    (vision_from_published, VQ),
    (image_from_published, IMAGE),
]
_OWN = [(cls.from_dict, _through_json(cls().to_dict())) for cls in (DecoderConfig, VisionConfig, ImageConfig)]
junk = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**40) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["type", "rope_theta", "x"]), inner),
    max_leaves=4,
)


@given(data=st.data(), junk=junk, own=st.booleans())
def test_any_field_may_hold_anything(data, junk, own):
    """A config is built or refused by name, whatever a file's field holds."""
    read, fields = data.draw(st.sampled_from(_OWN if own else _PUBLISHED))
    name = data.draw(st.sampled_from(sorted(fields)))
    try:
        config = read({**fields, name: junk})
    except Emu3Error:
        return
    assert type(config).from_dict(_through_json(config.to_dict())) == config


@pytest.mark.parametrize("data", [None, [], "text", 3])
@pytest.mark.parametrize("cls", [DecoderConfig, VisionConfig, ImageConfig])
def test_files_that_hold_no_object(cls, data):
    published = {
        DecoderConfig: decoder_from_published,
        VisionConfig: vision_from_published,
        ImageConfig: image_from_published,
    }
    for read in (published[cls], cls.from_dict):
        with pytest.raises(Emu3Error, match="must be an object"):
            read(data)


def test_numbers_of_any_size_are_floats():
    assert repr(DecoderConfig(rms_norm_eps=2**63, rope_theta=10**30).rms_norm_eps) == "9.223372036854776e+18"
    assert repr(ImageConfig(mean=(0, 10**30, 1)).mean) == "(0.0, 1e+30, 1.0)"

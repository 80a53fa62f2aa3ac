"""The JSON files of published checkpoints, upstream's and transformers', read into our configs and written from them.

A field that a file lacks keeps its default, as in the published classes. Errors call fields by their names in the file.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from emu3_jax.config import DecoderConfig, ImageConfig, SpecialTokens, VisionConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.fields import FieldError, is_number, is_whole

# Our fields, and what the layouts call each: upstream, transformers.
_VISION_NAMES = {
    "codebook_size": ("codebook_size",),
    "embed_dim": ("embed_dim",),
    "latent_channels": ("z_channels", "latent_channels"),
    "in_channels": ("in_channels",),
    "out_channels": ("out_channels",),
    "temporal_factor": ("temporal_downsample_factor",),
    "base_channels": ("ch", "base_channels"),
    "channel_multipliers": ("ch_mult", "channel_multiplier"),
    "num_res_blocks": ("num_res_blocks",),
    "attention_stages": ("attn_resolutions",),
}
_IMAGE_NAMES = {
    "min_pixels": ("min_pixels",),
    "max_pixels": ("max_pixels",),
    "mean": ("image_mean",),
    "std": ("image_std",),
}
_DECODER_NAMES = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size",),
    "intermediate_size": ("intermediate_size",),
    "num_layers": ("num_hidden_layers",),
    "num_heads": ("num_attention_heads",),
    "num_kv_heads": ("num_key_value_heads",),
    "max_positions": ("max_position_embeddings",),
    "rms_norm_eps": ("rms_norm_eps",),
    "rope_theta": ("rope_theta",),
    "image_area": ("image_area",),
}
_TOKEN_NAMES = {
    "pad": ("pad_token_id",),
    "bos": ("bos_token_id",),
    "eos": ("eos_token_id",),
    "img": ("img_token_id",),
    "boi": ("boi_token_id",),
    "eoi": ("eoi_token_id",),
    "eol": ("eol_token_id",),
    "eof": ("eof_token_id",),
}
_Names = Mapping[str, tuple[str, ...]]


# ------------------------------------------------------------------------------------------------ reading


def vision_from_published(data: Mapping[str, Any]) -> VisionConfig:
    """From the `config.json` of upstream's vision tokenizer, or the `vq_config` of a transformers checkpoint."""
    _check_object(data)
    double = "double_latent" if "double_latent" in data and "double_z" not in data else "double_z"
    _check(data.get(double, False) is False, double, data.get(double), "false (no published tokenizer uses it)")
    with _named_as_published(_VISION_NAMES, data):
        return VisionConfig(**_pick(_VISION_NAMES, data))


def image_from_published(data: Mapping[str, Any]) -> ImageConfig:
    """From a published `preprocessor_config.json` of any layout."""
    _check_object(data)
    resample = data.get("resample", 3)
    _check(resample == 3, "resample", resample, "3 (bicubic)")
    factor = data.get("rescale_factor", 1 / 255)
    _check(is_number(factor) and math.isclose(factor, 1 / 255, rel_tol=1e-6), "rescale_factor", factor, "1/255")
    picked = _pick(_IMAGE_NAMES, data)
    for field in ("mean", "std"):  # one number may stand for all three channels
        if isinstance(picked.get(field), int | float):
            picked[field] = (picked[field],) * 3
    with _named_as_published(_IMAGE_NAMES, data):
        return ImageConfig(**picked)


def decoder_from_published(data: Mapping[str, Any], codebook_size: int | None = None) -> DecoderConfig:
    """From upstream's `config.json`, or the config or `text_config` of a transformers 4 or 5 checkpoint.

    The visual ids are the last `codebook_size` of the vocabulary, in every published checkpoint. Transformers configs
    do not say the control ids; they are upstream's, in the same order before the visual range.
    """
    _check_object(data)
    text = {**data, **object_field(data, "text_config")}
    _check(text.get("hidden_act", "silu") == "silu", "hidden_act", text.get("hidden_act"), '"silu"')
    for field in ("tie_word_embeddings", "mlp_bias", "attention_bias"):
        _check(not text.get(field, False), field, text.get(field), "false (no published Emu3 uses it)")
    rope, scaling = object_field(text, "rope_parameters"), object_field(text, "rope_scaling")
    kind = rope.get("rope_type") or scaling.get("rope_type") or scaling.get("type") or "default"
    _check(kind == "default", "rope_scaling", kind, "absent (no published Emu3 scales RoPE)")
    picked = _pick(_DECODER_NAMES, text)
    if picked.get("num_kv_heads", 0) is None:
        picked["num_kv_heads"] = picked.get("num_heads", DecoderConfig.num_heads)
    if rope.get("rope_theta") is not None:
        picked["rope_theta"] = rope["rope_theta"]
    if codebook_size is None:
        codebook_size = object_field(data, "vq_config").get("codebook_size", SpecialTokens.visual_count)
    tokens = _tokens(text, codebook_size)
    with _named_as_published(_DECODER_NAMES, text):
        return DecoderConfig(**picked, tokens=tokens)


def _tokens(text: Mapping[str, Any], codebook_size: Any) -> SpecialTokens:
    vocab = text.get("vocab_size", DecoderConfig.vocab_size)
    _check(is_whole(vocab, 1), "vocab_size", vocab, "a whole number > 0")
    _check(is_whole(codebook_size, 1), "codebook_size", codebook_size, "a whole number > 0")
    _check(vocab > codebook_size, "vocab_size", vocab, f"more than the codebook's {codebook_size} visual ids")
    start = vocab - codebook_size
    shift = start - SpecialTokens.visual_start  # 0 in every published checkpoint
    ids = {field: getattr(SpecialTokens, field) + shift for field in _TOKEN_NAMES} | _pick(_TOKEN_NAMES, text)
    with _named_as_published(_TOKEN_NAMES, text):
        return SpecialTokens(**ids, visual_start=start, visual_count=codebook_size)


def _pick(names: _Names, data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `data` under our names."""
    picked = {ours: data[theirs] for ours, theirs in _present(names, data).items()}
    return {ours: tuple(value) if isinstance(value, list) else value for ours, value in picked.items()}


def _present(names: _Names, data: Mapping[str, Any]) -> dict[str, str]:
    """Our fields that `data` has, and their names there."""
    return {ours: name for ours, theirs in names.items() for name in theirs if name in data}


@contextlib.contextmanager
def _named_as_published(names: _Names, data: Mapping[str, Any]) -> Iterator[None]:
    """Errors about our fields become errors about those of `data`."""
    theirs = {ours: first for ours, (first, *_) in names.items()} | _present(names, data)
    try:
        yield
    except FieldError as error:
        legal = re.sub(r"\w+", lambda word: theirs.get(word[0], word[0]), error.legal)
        raise FieldError("config", theirs.get(error.field, error.field), error.value, legal) from error


def _check(ok: bool, field: str, value: Any, legal: str) -> None:
    if not ok:
        raise FieldError("config", field, value, legal)


def _check_object(data: Any) -> None:
    if not isinstance(data, Mapping):
        raise Emu3Error(f"the config is {data!r:.40}: it must be an object of named fields; fetch the file again")


def object_field(data: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    """The object under `field`; absent and null are empty."""
    value = data.get(field)
    _check(value is None or isinstance(value, Mapping), field, value, "an object")
    return value or {}


# ------------------------------------------------------------------------------------------------ writing


def vision_to_published(config: VisionConfig, layout: str) -> dict[str, Any]:
    """The reverse of `vision_from_published`. `layout` is "upstream" or "transformers"."""
    common = {
        "codebook_size": config.codebook_size,
        "embed_dim": config.embed_dim,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "temporal_downsample_factor": config.temporal_factor,
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": list(config.attention_stages),
    }
    if layout == "upstream":
        return {
            "model_type": "Emu3VisionVQ",
            "architectures": ["Emu3VisionVQModel"],
            "z_channels": config.latent_channels,
            "double_z": False,
            "ch": config.base_channels,
            "ch_mult": list(config.channel_multipliers),
            "dropout": 0.0,
            **common,
        }
    return {
        "model_type": "emu3_vqgan",
        "latent_channels": config.latent_channels,
        "double_latent": False,
        "base_channels": config.base_channels,
        "channel_multiplier": list(config.channel_multipliers),
        "hidden_size": config.base_channels * config.channel_multipliers[-1],
        "num_attention_heads": 1,
        "attention_dropout": 0.0,
        **common,
    }


def image_to_published(config: ImageConfig, layout: str) -> dict[str, Any]:
    """A `preprocessor_config.json`. `layout` is "upstream" or "transformers"."""
    upstream = layout == "upstream"
    return {
        "image_processor_type": "Emu3VisionVQImageProcessor" if upstream else "Emu3ImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
        "min_pixels": config.min_pixels,
        "max_pixels": config.max_pixels,
        "spatial_factor": 8,
    }


def decoder_to_published(config: DecoderConfig, layout: str) -> dict[str, Any]:
    """Upstream's `config.json`, or the `text_config` of transformers. `layout` is "upstream" or "transformers"."""
    tokens = config.tokens
    common = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "attention_dropout": 0.1,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
        "pad_token_id": tokens.pad,
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
    }
    if layout == "upstream":
        return {
            "model_type": "Emu3",
            "architectures": ["Emu3ForCausalLM"],
            "img_token_id": tokens.img,
            "boi_token_id": tokens.boi,
            "eoi_token_id": tokens.eoi,
            "eol_token_id": tokens.eol,
            "eof_token_id": tokens.eof,
            "image_area": config.image_area,
            "pretraining_tp": 1,
            "rope_scaling": None,
            **common,
        }
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    return {"model_type": "emu3_text_model", **common, "rope_parameters": rope}

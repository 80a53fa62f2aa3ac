"""Reads the JSON files of published checkpoints into our configs, and writes them. Layouts: upstream, transformers.

A field that a file lacks gets its default, as in the published classes. Errors use the field names of the file.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from emu3_jax.config import MAX_CODES, DecoderConfig, IbqConfig, ImageConfig, SpecialTokens, VisionConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.fields import FieldError, is_number, is_whole
from emu3_jax.printable import shown
from emu3_jax.text.vocabulary import tokens_of_surfaces

# Our field: its name in upstream's files, and its name in transformers' files if that differs.
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
_IBQ_NAMES = {  # `config.json`, and `config.yaml` if that differs
    "codebook_size": ("codebook_size", "n_embed"),
    "embed_dim": ("embed_dim",),
    "latent_channels": ("z_channels",),
    "in_channels": ("in_channels",),
    "out_channels": ("out_ch",),
    "resolution": ("resolution",),
    "base_channels": ("ch",),
    "channel_multipliers": ("ch_mult",),
    "num_res_blocks": ("num_res_blocks",),
    "attention_resolutions": ("attn_resolutions",),
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
_EMU35_VOCABULARY, EMU35_CODES, _EMU35_AREA = 282926, 131072, 1024 * 1024  # of every published Emu3.5
# Ids that only Emu3 has. Other models have ids of padding and of the beginning and end of a text, too.
_MEDIA_TOKENS = ("img", "boi", "eoi", "eol", "eof")
_SWITCHES = ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize", "do_pad")  # padding matters only for batches


# ------------------------------------------------------------------------------------------------ reading


def vision_from_published(data: Mapping[str, Any]) -> VisionConfig:
    """From the `config.json` of upstream's vision tokenizer, or the `vq_config` of a transformers checkpoint."""
    _check_object(data)
    double = "double_latent" if "double_latent" in data and "double_z" not in data else "double_z"
    _check(data.get(double, False) is False, double, data.get(double), "false (no published tokenizer uses it)")
    heads = data.get("num_attention_heads", 1)
    _check(is_whole(heads, 1) and heads == 1, "num_attention_heads", heads, "1 (no published tokenizer has more)")
    with _named_as_published(_VISION_NAMES, data):
        config = VisionConfig(**_pick(_VISION_NAMES, data))
    width = config.base_channels * config.channel_multipliers[-1]
    found = data.get("hidden_size", width)
    _check(found == width, "hidden_size", found, f"{width}, the base channels times the last multiplier")
    return config


def ibq_from_published(data: Mapping[str, Any]) -> IbqConfig:
    """From the `config.json` or `config.yaml` of Emu3.5's vision tokenizer. The latter nests fields in `ddconfig`.

    All fields must be there: the defaults of upstream's class belong to no published model.
    """
    _check_object(data)
    flat = {**data, **object_field(data, "ddconfig")}
    _check(flat.get("double_z") is False, "double_z", flat.get("double_z"), "false (it doubles the latents otherwise)")
    lacking = [" or ".join(theirs) for theirs in _IBQ_NAMES.values() if not any(name in flat for name in theirs)]
    if lacking:
        raise Emu3Error(f"has no {', '.join(lacking)}, which Emu3.5 needs: use the config of these weights")
    with _named_as_published(_IBQ_NAMES, flat):
        return IbqConfig(**_pick(_IBQ_NAMES, flat))


def image_from_published(data: Mapping[str, Any], spatial_factor: int | None = None) -> ImageConfig:
    """From a published `preprocessor_config.json` of any layout.

    Args:
        data: what the file holds.
        spatial_factor: pixels per code of the vision tokenizer. If it is given, the file must have the same or none.
    """
    _check_object(data)
    for field, value in data.items():
        if field.startswith("do_") and field not in _SWITCHES:
            _check(not value, field, value, "false or absent (no published Emu3 uses it)")
    for field in ("do_resize", "do_rescale"):
        _check(data.get(field, True) is True, field, data.get(field), "true (Emu3 knows pictures in no other form)")
    convert = data.get("do_convert_rgb", True)
    _check(convert is True or convert is None, "do_convert_rgb", convert, "true (pictures are always made RGB)")
    normalise = data.get("do_normalize", True)
    _check(isinstance(normalise, bool), "do_normalize", normalise, "true or false")
    resample = data.get("resample", 3)
    _check(resample == 3, "resample", resample, "3 (bicubic)")
    factor = data.get("rescale_factor", 1 / 255)
    _check(is_number(factor) and math.isclose(factor, 1 / 255, rel_tol=1e-6), "rescale_factor", factor, "1/255")
    pixels = data.get("spatial_factor", spatial_factor)
    if spatial_factor is not None:
        _check(pixels == spatial_factor, "spatial_factor", pixels, f"{spatial_factor}, as of the vision tokenizer")
    picked = _pick(_IMAGE_NAMES, data)
    for field in ("mean", "std"):  # a single number counts for all three channels
        if isinstance(picked.get(field), int | float):
            picked[field] = (picked[field],) * 3
        elif picked.get(field, 0) is None:
            del picked[field]
    with _named_as_published(_IMAGE_NAMES, data):
        config = ImageConfig(**picked)
    size = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
    edges = {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}  # transformers writes this form too
    found = object_field(data, "size")
    _check(not found or found in (size, edges), "size", found, f"{size} or absent")
    if not normalise:
        return ImageConfig(config.min_pixels, config.max_pixels, mean=(0.0,) * 3, std=(1.0,) * 3)
    return config


def image_gaps(data: Mapping[str, Any]) -> list[str]:
    """The fields that a `preprocessor_config.json` lacks. They get Emu3's published values."""
    needless = ("image_mean", "image_std") if data.get("do_normalize", True) is False else ()
    names = (name for name, *_ in _IMAGE_NAMES.values())
    return [name for name in names if data.get(name) is None and name not in needless]


def family_of(data: Mapping[str, Any], qk_norm: bool) -> str:
    """The family of a published decoder. Emu3.5 has Emu3's `model_type` and class name.

    Args:
        data: what `config.json` holds.
        qk_norm: whether the weights have norms of queries and keys.

    Raises:
        Emu3Error: the vocabulary is Emu3.5's, but the weights lack the norms.
    """
    _check_object(data)
    vocabulary = data.get("vocab_size")
    if not qk_norm and vocabulary == _EMU35_VOCABULARY:
        raise Emu3Error(
            f"vocab_size is {vocabulary}, as of Emu3.5, but the weights have no q_norm: use the config.json of these "
            "weights"
        )
    return "emu3.5" if qk_norm else "emu3"


def decoder_from_published(
    data: Mapping[str, Any],
    codebook_size: int | None = None,
    vocabulary: SpecialTokens | None = None,
    family: str = "emu3",
) -> DecoderConfig:
    """From upstream's `config.json`, or the config or `text_config` of a transformers 4 or 5 checkpoint.

    The ids of control and visual tokens come from the config's `vocabulary_map`, else from the vocabulary, else from
    the token ids in the config. `vocab_size` gives the ids only if it has the published value. Other values say
    nothing, because embeddings may be padded or extended.

    Args:
        data: what the file holds.
        codebook_size: codebook size of the vision tokenizer, or None if its config is not available.
        vocabulary: the ids in the vocabulary's file, or None without such a file.
        family: the family, from `family_of`. A file of Emu3.5 must hold all fields, because the defaults of its
            class are Emu3's.

    Raises:
        Emu3Error: a field is missing or not legal, asks for something that Emu3 lacks, or nothing determines the ids.
    """
    _check_object(data)
    text = {**data, **object_field(data, "text_config")}
    _check(text.get("hidden_act", "silu") in ("silu", "swish"), "hidden_act", text.get("hidden_act"), '"silu"')
    for field in ("tie_word_embeddings", "mlp_bias", "attention_bias", "sliding_window", "quantization_config"):
        _check(not text.get(field), field, text.get(field), "false or absent (no published Emu3 uses it)")
    layers = text.get("layer_types") or []
    plain = isinstance(layers, list) and all(kind == "full_attention" for kind in layers)
    _check(plain, "layer_types", layers, '"full_attention" for each layer, or absent')
    picked = _pick(_DECODER_NAMES, text)
    if picked.get("num_kv_heads", 0) is None:
        picked["num_kv_heads"] = picked.get("num_heads", DecoderConfig.num_heads)
    theta = _rope_theta(text)
    if theta is not None:
        picked["rope_theta"] = theta
    if family == "emu3.5":
        lacking = [name for ours, (name, *_) in _DECODER_NAMES.items() if ours != "image_area" and ours not in picked]
        lacking += [] if "head_dim" in text else ["head_dim"]
        if lacking:
            raise Emu3Error(f"has no {', '.join(lacking)}, which Emu3.5 needs: use the config.json of these weights")
        picked = {"image_area": _EMU35_AREA} | picked
        picked |= {"family": family, "qk_norm": True, "head_width": text["head_dim"]}
    if codebook_size is None:
        codebook_size = object_field(data, "vq_config").get("codebook_size")
    if codebook_size is None and family == "emu3.5" and vocabulary is None:
        codebook_size = EMU35_CODES
    legal = f"a whole number from 1 to {MAX_CODES:,}"
    ok = codebook_size is None or (is_whole(codebook_size, 1) and codebook_size <= MAX_CODES)
    _check(ok, "codebook_size", codebook_size, legal)
    try:
        mapped = tokens_of_surfaces(object_field(data, "vocabulary_map"), codebook_size)
    except FieldError:
        raise
    except Emu3Error as error:
        raise Emu3Error(f"vocabulary_map: {error}") from error
    tokens = _tokens(text, codebook_size, mapped or vocabulary)
    with _named_as_published({**_DECODER_NAMES, "head_width": ("head_dim",)}, text):
        config = DecoderConfig(**picked, tokens=tokens)
    if family == "emu3.5":
        return config
    width = text.get("head_dim")
    legal = f"hidden_size / num_attention_heads = {config.head_dim}, or absent"
    _check(width is None or width == config.head_dim, "head_dim", width, legal)
    return config


def _rope_theta(text: Mapping[str, Any]) -> Any:
    """The base of rotary embeddings in nested objects, read as transformers does, or None if they have none.

    Raises:
        FieldError: the objects ask for something that Emu3 lacks, such as scaling or rotating a part of each head.
    """
    theta = None
    for name in ("rope_parameters", "rope_scaling"):  # if both have a base, the second one counts
        rope = object_field(text, name)
        kind = rope.get("rope_type") or rope.get("type") or "default"
        _check(kind == "default", "rope_scaling", kind, "absent (no published Emu3 scales RoPE)")
        for field, value in rope.items():
            if field == "partial_rotary_factor":
                _check_partial(value)
            elif field not in ("rope_type", "type", "rope_theta"):
                _check(value is None, f"{name}.{field}", value, "absent (no published Emu3 uses it)")
        theta = theta if rope.get("rope_theta") is None else rope["rope_theta"]
    _check_partial(text.get("partial_rotary_factor"))
    return theta


def _check_partial(value: Any) -> None:
    ok = value is None or (is_number(value) and value == 1)
    _check(ok, "partial_rotary_factor", value, "1 or absent (Emu3 rotates whole heads)")


def _tokens(text: Mapping[str, Any], codebook_size: int | None, told: SpecialTokens | None) -> SpecialTokens:
    vocab = text.get("vocab_size", DecoderConfig.vocab_size)
    _check(is_whole(vocab, 1), "vocab_size", vocab, "a whole number > 0")
    named = {ours: value for ours, value in _pick(_TOKEN_NAMES, text).items() if value is not None}
    if told is None:
        codes = codebook_size or SpecialTokens.visual_count
        _check(vocab > codes, "vocab_size", vocab, f"more than the codebook's {codes} visual ids")
        shift = _shift(named, vocab)
        ids = {field: getattr(SpecialTokens, field) + shift for field in _TOKEN_NAMES}
        start = SpecialTokens.visual_start + shift
    else:
        ids = {field: getattr(told, field) for field in _TOKEN_NAMES}
        start, codes = told.visual_start, told.visual_count
    with _named_as_published(_TOKEN_NAMES, text):
        return SpecialTokens(**ids | named, visual_start=start, visual_count=codes)


def _shift(named: Mapping[str, Any], vocab: int) -> int:
    """The difference between a model's token ids and the published ones, from the ids in its config.

    Raises:
        Emu3Error: the config does not determine the difference.
    """
    shifts = {field: value - getattr(SpecialTokens, field) for field, value in named.items() if is_whole(value, 0)}
    media = {shifts[field] for field in _MEDIA_TOKENS if field in shifts}
    if len(media) == 1:
        return media.pop()
    if vocab == DecoderConfig.vocab_size and not media:
        return 0
    # Fine-tuning may change the EOS id. A changed one hardly has the published distance from the BOS id.
    if not media and "bos" in shifts and shifts["bos"] == shifts.get("eos"):
        return shifts["bos"]
    raise Emu3Error(
        f"vocab_size is {shown(vocab)}, not the published {DecoderConfig.vocab_size}, and nothing says which ids the "
        "visual tokens have: copy the model's vocabulary (emu3.tiktoken or tokenizer.json) beside config.json"
    )


def _pick(names: _Names, data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `data` under our names."""
    picked = {ours: data[theirs] for ours, theirs in _present(names, data).items()}
    return {ours: tuple(value) if isinstance(value, list) else value for ours, value in picked.items()}


def _present(names: _Names, data: Mapping[str, Any]) -> dict[str, str]:
    """Our fields that `data` has, with their names in `data`."""
    return {ours: name for ours, theirs in names.items() for name in theirs if name in data}


@contextlib.contextmanager
def _named_as_published(names: _Names, data: Mapping[str, Any]) -> Iterator[None]:
    """Within the block, errors about our fields become errors about the fields of `data`."""
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
        raise Emu3Error(f"the config is {shown(data)}: it must be an object of named fields; fetch the file again")


def object_field(data: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    """The object under `field`. An absent field and null give an empty object."""
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


def ibq_to_published(config: IbqConfig) -> dict[str, Any]:
    """The reverse of `ibq_from_published`, as `config.json`."""
    return {
        "model_type": "Emu3p5VisionVQ",
        "codebook_size": config.codebook_size,
        "embed_dim": config.embed_dim,
        "double_z": False,
        "z_channels": config.latent_channels,
        "resolution": config.resolution,
        "in_channels": config.in_channels,
        "out_ch": config.out_channels,
        "ch": config.base_channels,
        "ch_mult": list(config.channel_multipliers),
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": list(config.attention_resolutions),
        "dropout": 0.0,
    }


def image_to_published(config: ImageConfig, layout: str, spatial_factor: int = 8) -> dict[str, Any]:
    """A `preprocessor_config.json`. `layout` is "upstream" or "transformers", `spatial_factor` pixels per code."""
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
        "spatial_factor": spatial_factor,
    }


def decoder_to_published(config: DecoderConfig, layout: str) -> dict[str, Any]:
    """Upstream's `config.json` or transformers' `text_config`. `layout` is "upstream" or "transformers"."""
    tokens = config.tokens
    wide = {} if config.head_width is None else {"head_dim": config.head_width}
    common = {
        "vocab_size": config.vocab_size,
        **wide,
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

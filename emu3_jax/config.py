"""Frozen, validated configs of the model's parts, and how they read the published `config.json` files."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from emu3_jax.errors import Emu3Error


def _require(ok: bool, field: str, value: Any, legal: str) -> None:
    if not ok:
        raise Emu3Error(f"config field {field} is {value!r}: it must be {legal}; correct it in config.json")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive_int(config: Any, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        _require(_is_int(value) and value > 0, field, value, "a whole number > 0")


def _positive_float(config: Any, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        _require(_is_finite(value) and value > 0, field, value, "a finite number > 0")


def _tuple_of(config: Any, field: str, ok: Callable[[Any], bool], legal: str, length: int | None = None) -> None:
    """Stores a list as a tuple; every entry must be `ok`."""
    value = getattr(config, field)
    legal_value = isinstance(value, list | tuple) and all(map(ok, value)) and length in (None, len(value))
    _require(legal_value, field, value, legal)
    object.__setattr__(config, field, tuple(value))


def _object(data: Any) -> None:
    if not isinstance(data, Mapping):
        raise Emu3Error(f"the config is {data!r:.40}: it must be an object of named fields; fetch the file again")


def _object_field(data: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    """The object under `field`; absent and null are empty."""
    value = data.get(field)
    _require(value is None or isinstance(value, Mapping), field, value, "an object")
    return value or {}


def _from_dict(cls: type, data: Mapping[str, Any]) -> Any:
    """Builds `cls` from the JSON form that `to_dict` writes; unknown and missing fields are errors."""
    _object(data)
    fields = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(data) - fields)
    if unknown:
        raise Emu3Error(f"unknown {cls.__name__} field {unknown[0]!r}: remove it, or convert the model again")
    try:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})
    except TypeError as error:
        raise Emu3Error(f"{cls.__name__}: {error}; convert the model again") from error


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The causal 3D VQ (upstream `Emu3VisionVQConfig`). Defaults are the published 270 M tokenizer."""

    codebook_size: int = 32768
    embed_dim: int = 4
    latent_channels: int = 4
    in_channels: int = 3
    out_channels: int = 3
    temporal_factor: int = 4
    base_channels: int = 256
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    num_res_blocks: int = 2
    attention_stages: tuple[int, ...] = (3,)

    def __post_init__(self):
        _positive_int(
            self, "codebook_size", "embed_dim", "latent_channels", "in_channels", "out_channels", "temporal_factor",
            "base_channels", "num_res_blocks",
        )  # fmt: skip
        legal = "one whole number > 0 per stage"
        _tuple_of(self, "channel_multipliers", lambda m: _is_int(m) and m > 0, legal)
        stages = len(self.channel_multipliers)
        _require(stages > 0, "channel_multipliers", self.channel_multipliers, legal)
        legal = f"a list of stage indices from 0 to {stages - 1}"
        _tuple_of(self, "attention_stages", lambda s: _is_int(s) and 0 <= s < stages, legal)
        t = self.temporal_factor
        _require(t & (t - 1) == 0, "temporal_factor", t, "a power of two")
        _require(self.base_channels % 32 == 0, "base_channels", self.base_channels, "a multiple of 32 (group norm)")
        # The decoder's time stack runs on latents and codebook vectors stacked together.
        same = self.embed_dim == self.latent_channels
        _require(same, "embed_dim", self.embed_dim, f"equal to latent_channels ({self.latent_channels})")

    @property
    def spatial_factor(self) -> int:
        """Pixels per code along height and width."""
        return 2 ** (len(self.channel_multipliers) - 1)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "VisionConfig":
        return _from_dict(cls, data)

    @classmethod
    def from_published(cls, data: Mapping[str, Any]) -> "VisionConfig":
        """Reads the `config.json` of upstream's vision tokenizer, or the `vq_config` of a transformers checkpoint."""
        _object(data)
        double = data.get("double_z", data.get("double_latent", False))
        _require(double is False, "double_z", double, "false (no published tokenizer uses it)")
        names = {
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
        return cls(**_pick(data, names))

    def to_published(self, layout: str) -> dict[str, Any]:
        """The reverse of `from_published`. `layout` is "upstream" or "transformers"."""
        common = {
            "codebook_size": self.codebook_size,
            "embed_dim": self.embed_dim,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "temporal_downsample_factor": self.temporal_factor,
            "num_res_blocks": self.num_res_blocks,
            "attn_resolutions": list(self.attention_stages),
        }
        if layout == "upstream":
            return {
                "model_type": "Emu3VisionVQ",
                "architectures": ["Emu3VisionVQModel"],
                "z_channels": self.latent_channels,
                "double_z": False,
                "ch": self.base_channels,
                "ch_mult": list(self.channel_multipliers),
                "dropout": 0.0,
                **common,
            }
        return {
            "model_type": "emu3_vqgan",
            "latent_channels": self.latent_channels,
            "double_latent": False,
            "base_channels": self.base_channels,
            "channel_multiplier": list(self.channel_multipliers),
            "hidden_size": self.base_channels * self.channel_multipliers[-1],
            "num_attention_heads": 1,
            "attention_dropout": 0.0,
            **common,
        }


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """Picture preprocessing (upstream `preprocessor_config.json`). Areas are in pixels."""

    min_pixels: int = 512 * 512
    max_pixels: int = 1024 * 1024
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self):
        _positive_int(self, "min_pixels", "max_pixels")
        _require(
            self.min_pixels <= self.max_pixels, "min_pixels", self.min_pixels, f"<= max_pixels ({self.max_pixels})"
        )
        _tuple_of(self, "mean", _is_finite, "three finite numbers", length=3)
        _tuple_of(self, "std", lambda v: _is_finite(v) and v > 0, "three finite numbers > 0", length=3)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ImageConfig":
        return _from_dict(cls, data)

    @classmethod
    def from_published(cls, data: Mapping[str, Any]) -> "ImageConfig":
        """Reads a published `preprocessor_config.json` of any layout."""
        _object(data)
        resample = data.get("resample", 3)
        _require(resample == 3, "resample", resample, "3 (bicubic)")
        factor = data.get("rescale_factor", 1 / 255)
        _require(_is_finite(factor) and math.isclose(factor, 1 / 255, rel_tol=1e-6), "rescale_factor", factor, "1/255")
        names = {
            "min_pixels": ("min_pixels",),
            "max_pixels": ("max_pixels",),
            "mean": ("image_mean",),
            "std": ("image_std",),
        }
        picked = _pick(data, names)
        return cls(
            **{k: (v,) * 3 if k in ("mean", "std") and isinstance(v, int | float) else v for k, v in picked.items()}
        )

    def to_published(self, layout: str) -> dict[str, Any]:
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
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "spatial_factor": 8,
        }


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Ids of the control tokens and of the visual range (upstream `config.json` and tokenizer). Defaults are Emu3's."""

    pad: int = 151643
    bos: int = 151849
    eos: int = 151850
    img: int = 151851  # closes the size text; the first visual token follows
    boi: int = 151852  # begin of image
    eoi: int = 151853  # end of image
    eol: int = 151846  # end of line: after each row of visual tokens
    eof: int = 151847  # end of frame
    visual_start: int = 151854
    visual_count: int = 32768

    def __post_init__(self):
        values = dataclasses.asdict(self)
        for field, value in values.items():
            _require(_is_int(value) and value >= 0, field, value, "an id >= 0")
        _positive_int(self, "visual_count")
        control = {k: v for k, v in values.items() if not k.startswith("visual")}
        for field, value in control.items():
            clash = [k for k, v in control.items() if v == value and k != field]
            _require(not clash, field, value, f"different from {clash[0] if clash else ''}")
            inside = self.visual_start <= value < self.visual_end
            _require(not inside, field, value, f"outside the visual ids {self.visual_start}..{self.visual_end - 1}")

    @property
    def visual_end(self) -> int:
        """One past the last visual id."""
        return self.visual_start + self.visual_count


CLIP_LAYOUTS = ("lines", "flat")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The decoder (upstream `Emu3Config`). Defaults are the published 8 B models; `dtype` is the compute dtype."""

    vocab_size: int = 184622
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 8
    max_positions: int = 9216
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1_000_000.0
    image_area: int = 720 * 720  # pixels; the area that pictures are generated at by default
    clip_frames: int | None = None  # of the clips that it was trained on; None where nobody says
    clip_layout: str = "lines"  # of their tokens: "lines" ends rows with EOL, "flat" does not
    dtype: str = "bfloat16"
    tokens: SpecialTokens = SpecialTokens()

    def __post_init__(self):
        if self.clip_frames is not None:
            _positive_int(self, "clip_frames")
        _require(self.clip_layout in CLIP_LAYOUTS, "clip_layout", self.clip_layout, " or ".join(CLIP_LAYOUTS))
        _positive_int(
            self, "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
            "max_positions", "image_area",
        )  # fmt: skip
        _positive_float(self, "rms_norm_eps", "rope_theta")
        heads, kv = self.num_heads, self.num_kv_heads
        _require(self.hidden_size % heads == 0, "hidden_size", self.hidden_size, f"a multiple of num_heads ({heads})")
        _require(self.head_dim % 2 == 0, "hidden_size", self.hidden_size, "num_heads times an even head width (RoPE)")
        _require(heads % kv == 0, "num_heads", heads, f"a multiple of num_kv_heads ({kv})")
        _require(self.dtype in ("bfloat16", "float16", "float32"), "dtype", self.dtype, "bfloat16, float16 or float32")
        if isinstance(self.tokens, Mapping):
            object.__setattr__(self, "tokens", _from_dict(SpecialTokens, self.tokens))
        _require(isinstance(self.tokens, SpecialTokens), "tokens", self.tokens, "an object of token ids")
        top = max(
            max(v for k, v in dataclasses.asdict(self.tokens).items() if k != "visual_count"),
            self.tokens.visual_end - 1,
        )
        _require(top < self.vocab_size, "vocab_size", self.vocab_size, f"more than the highest token id ({top})")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "DecoderConfig":
        return _from_dict(cls, data)

    @classmethod
    def from_published(cls, data: Mapping[str, Any], codebook_size: int | None = None) -> "DecoderConfig":
        """Reads upstream's `config.json`, or the config or `text_config` of a transformers 4 or 5 checkpoint.

        The visual ids are the last `codebook_size` of the vocabulary, in every published checkpoint. Transformers
        configs do not say the control ids; they are upstream's, in the same order before the visual range.
        """
        _object(data)
        text = {**data, **_object_field(data, "text_config")}
        _require(text.get("hidden_act", "silu") == "silu", "hidden_act", text.get("hidden_act"), '"silu"')
        for field in ("tie_word_embeddings", "mlp_bias", "attention_bias"):
            _require(not text.get(field, False), field, text.get(field), "false (no published Emu3 uses it)")
        rope, scaling = _object_field(text, "rope_parameters"), _object_field(text, "rope_scaling")
        kind = rope.get("rope_type") or scaling.get("rope_type") or scaling.get("type") or "default"
        _require(kind == "default", "rope_scaling", kind, "absent (no published Emu3 scales RoPE)")
        vocab = text.get("vocab_size", cls.vocab_size)
        _require(_is_int(vocab) and vocab > 0, "vocab_size", vocab, "a whole number > 0")
        if codebook_size is None:
            codebook_size = _object_field(data, "vq_config").get("codebook_size", SpecialTokens.visual_count)
        _require(_is_int(codebook_size) and codebook_size > 0, "codebook_size", codebook_size, "a whole number > 0")
        legal = f"more than the codebook's {codebook_size} visual ids"
        _require(_is_int(vocab) and vocab > codebook_size, "vocab_size", vocab, legal)
        start = vocab - codebook_size
        shift = start - SpecialTokens.visual_start  # 0 in every published checkpoint
        ids = {
            name: text.get(field, getattr(SpecialTokens, name) + shift)
            for name, field in {
                "pad": "pad_token_id", "bos": "bos_token_id", "eos": "eos_token_id", "img": "img_token_id",
                "boi": "boi_token_id", "eoi": "eoi_token_id", "eol": "eol_token_id", "eof": "eof_token_id",
            }.items()
        }  # fmt: skip
        names = {
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
        picked = _pick(text, names)
        if picked.get("num_kv_heads", 0) is None:
            picked["num_kv_heads"] = picked.get("num_heads", cls.num_heads)
        if rope.get("rope_theta") is not None:
            picked["rope_theta"] = rope["rope_theta"]
        return cls(**picked, tokens=SpecialTokens(**ids, visual_start=start, visual_count=codebook_size))

    def to_published(self, layout: str) -> dict[str, Any]:
        """Upstream's `config.json`, or the `text_config` of transformers. `layout` is "upstream" or "transformers"."""
        common = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "attention_dropout": 0.1,
            "initializer_range": 0.02,
            "tie_word_embeddings": False,
            "use_cache": True,
            "pad_token_id": self.tokens.pad,
            "bos_token_id": self.tokens.bos,
            "eos_token_id": self.tokens.eos,
        }
        if layout == "upstream":
            t = self.tokens
            return {
                "model_type": "Emu3",
                "architectures": ["Emu3ForCausalLM"],
                "img_token_id": t.img,
                "boi_token_id": t.boi,
                "eoi_token_id": t.eoi,
                "eol_token_id": t.eol,
                "eof_token_id": t.eof,
                "image_area": self.image_area,
                "pretraining_tp": 1,
                "rope_scaling": None,
                **common,
            }
        rope = {"rope_type": "default", "rope_theta": self.rope_theta}
        return {"model_type": "emu3_text_model", **common, "rope_parameters": rope}


def _pick(data: Mapping[str, Any], names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The fields of `data` under our names; an absent field keeps its default, as in the published classes."""
    picked = {}
    for ours, theirs in names.items():
        for name in theirs:
            if name in data:
                picked[ours] = tuple(data[name]) if isinstance(data[name], list) else data[name]
    return picked

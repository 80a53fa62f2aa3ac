"""Frozen, validated configs of the decoder, the vision tokenizer, picture preprocessing and the special tokens."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from emu3_jax.fields import (
    FieldError,
    check_counts,
    check_field,
    check_positive_number,
    from_json,
    is_number,
    is_whole,
    tuple_field,
)

# Far above the values of every known model, but low enough that arrays of these sizes fit in memory.
MAX_IDS = 1 << 23
MAX_CODES = 1 << 20
_MAX_PIXELS = 1 << 30


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tokenizer, a causal 3D VQ (upstream `Emu3VisionVQConfig`). Defaults: the published 270 M tokenizer."""

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

    def __post_init__(self) -> None:
        check_counts(
            self, codebook_size=MAX_CODES, embed_dim=4096, latent_channels=4096, in_channels=1024, out_channels=1024,
            temporal_factor=64, base_channels=8192, num_res_blocks=64,
        )  # fmt: skip
        legal = "one whole number from 1 to 64 for each of 1 to 8 stages"
        tuple_field(self, "channel_multipliers", lambda m: is_whole(m, 1) and m <= 64, legal)
        stages = len(self.channel_multipliers)
        check_field(self, "channel_multipliers", 0 < stages <= 8, legal)
        legal = f"a list of stage indices from 0 to {stages - 1}"
        tuple_field(self, "attention_stages", lambda s: is_whole(s, 0) and s < stages, legal)
        check_field(self, "attention_stages", len(self.attention_stages) <= stages, legal)
        check_field(self, "temporal_factor", self.temporal_factor.bit_count() == 1, "a power of two")
        check_field(self, "base_channels", self.base_channels % 32 == 0, "a multiple of 32 (group norm)")
        # The decoder's time stack runs on latents and codebook vectors stacked together.
        same = self.embed_dim == self.latent_channels
        check_field(self, "embed_dim", same, f"equal to latent_channels ({self.latent_channels})")

    @property
    def spatial_factor(self) -> int:
        """Pixels per code along each of height and width."""
        return 2 ** (len(self.channel_multipliers) - 1)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "VisionConfig":
        return from_json(cls, data)


@dataclasses.dataclass(frozen=True)
class IbqConfig:
    """Emu3.5's vision tokenizer, a 2D VQGAN for pictures alone (IBQ, index backpropagation quantisation).

    Defaults: the shapes that fit the 455 M parameters of the published tokenizer.

    Attributes:
        codebook_size: number of codes.
        embed_dim: width of a codebook vector.
        latent_channels: channels between encoder and quantisation, and between quantisation and decoder.
        in_channels, out_channels: channels of a picture.
        resolution: nominal side of a picture. It matters only for `attention_resolutions`.
        base_channels: channels of the first stage, before its multiplier.
        channel_multipliers: one factor of `base_channels` for each stage.
        num_res_blocks: residual blocks of an encoder stage. A decoder stage has one more.
        attention_resolutions: a stage has attention if its share of `resolution`, which halves with every stage, is
            among these.
    """

    codebook_size: int = 131072
    embed_dim: int = 256
    latent_channels: int = 256
    in_channels: int = 3
    out_channels: int = 3
    resolution: int = 256
    base_channels: int = 256
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 4
    attention_resolutions: tuple[int, ...] = (16,)

    temporal_factor: ClassVar[int] = 1  # it knows no clips

    def __post_init__(self) -> None:
        check_counts(
            self, codebook_size=MAX_CODES, embed_dim=4096, latent_channels=4096, in_channels=1024, out_channels=1024,
            resolution=1 << 16, base_channels=8192, num_res_blocks=64,
        )  # fmt: skip
        legal = "one whole number from 1 to 64 for each of 1 to 8 stages"
        tuple_field(self, "channel_multipliers", lambda m: is_whole(m, 1) and m <= 64, legal)
        check_field(self, "channel_multipliers", 0 < len(self.channel_multipliers) <= 8, legal)
        legal = "a list of at most 8 whole numbers > 0"
        tuple_field(self, "attention_resolutions", lambda r: is_whole(r, 1), legal)
        check_field(self, "attention_resolutions", len(self.attention_resolutions) <= 8, legal)
        check_field(self, "base_channels", self.base_channels % 32 == 0, "a multiple of 32 (group norm)")

    @property
    def spatial_factor(self) -> int:
        """Pixels per code along each of height and width."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def attention_stages(self) -> tuple[int, ...]:
        """Indices of the stages with attention."""
        stages = range(len(self.channel_multipliers))
        return tuple(i for i in stages if self.resolution >> i in self.attention_resolutions)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": IBQ, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "IbqConfig":
        return from_json(cls, {name: value for name, value in data.items() if name != "kind"})


VisionTokenizerConfig = VisionConfig | IbqConfig
IBQ = "ibq"  # the field `kind` of a vision tokenizer in a bundle; without this field it is Emu3's


def vision_tokenizer_from_dict(data: Mapping[str, Any]) -> VisionTokenizerConfig:
    """The reverse of `to_dict` of both vision tokenizers. Raises `Emu3Error` for a kind that this version lacks."""
    kind = data.get("kind") if isinstance(data, Mapping) else None
    if kind is None:
        return VisionConfig.from_dict(data)
    if kind != IBQ:
        raise FieldError("vision", "kind", kind, f'"{IBQ}" (Emu3.5), or absent (Emu3)')
    return IbqConfig.from_dict(data)


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """Picture preprocessing (upstream `preprocessor_config.json`). `min_pixels` and `max_pixels` limit the area."""

    min_pixels: int = 512 * 512
    max_pixels: int = 1024 * 1024
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        check_counts(self, min_pixels=_MAX_PIXELS, max_pixels=_MAX_PIXELS)
        check_field(self, "min_pixels", self.min_pixels <= self.max_pixels, f"<= max_pixels ({self.max_pixels})")
        tuple_field(self, "mean", is_number, "three finite numbers", length=3)
        tuple_field(self, "std", lambda v: is_number(v) and v > 0, "three finite numbers > 0", length=3)
        for field in ("mean", "std"):  # JSON has ints of any size
            object.__setattr__(self, field, tuple(map(float, getattr(self, field))))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ImageConfig":
        return from_json(cls, data)


@dataclasses.dataclass(frozen=True)
class AreaConfig:
    """Picture preprocessing of Emu3.5: every picture is resized to about `area` pixels, and scaled to -1..1.

    The default is the area that upstream sets for drawing and editing single pictures.
    """

    area: int = 1024 * 1024

    def __post_init__(self) -> None:
        check_counts(self, area=_MAX_PIXELS)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "AreaConfig":
        return from_json(cls, data)


PictureConfig = ImageConfig | AreaConfig  # Emu3's preprocessing, or Emu3.5's


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Ids of the control tokens, and the range of visual ids (upstream `config.json` and tokenizer). Defaults: Emu3."""

    pad: int = 151643
    bos: int = 151849
    eos: int = 151850
    img: int = 151851  # ends the size text; the first visual token follows
    boi: int = 151852  # begin of image
    eoi: int = 151853  # end of image
    eol: int = 151846  # end of line: after each row of visual tokens
    eof: int = 151847  # end of frame
    visual_start: int = 151854
    visual_count: int = 32768

    def __post_init__(self) -> None:
        values = dataclasses.asdict(self)
        for field, value in values.items():
            check_field(self, field, is_whole(value, 0), "an id >= 0")
            check_field(self, field, value < MAX_IDS, f"less than {MAX_IDS:,}")
        check_counts(self, visual_count=MAX_CODES)
        control = {k: v for k, v in values.items() if not k.startswith("visual")}
        for field, value in control.items():
            clash = [k for k, v in control.items() if v == value and k != field]
            check_field(self, field, not clash, f"different from {clash[0] if clash else ''}")
            inside = self.visual_start <= value < self.visual_end
            check_field(self, field, not inside, f"outside the visual ids {self.visual_start}..{self.visual_end - 1}")

    @property
    def visual_end(self) -> int:
        """The last visual id plus one."""
        return self.visual_start + self.visual_count


FAMILIES = ("emu3", "emu3.5")
CLIP_LAYOUTS = ("lines", "flat")
# Fields of a `DecoderConfig` that fine-tuning may change, because no weight depends on them.
FREE_FIELDS = ("image_area", "max_positions", "clip_frames", "clip_layout")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shapes and settings of a decoder (the reference's `Emu3Config`). Defaults: the published 8 B models.

    Attributes:
        family: "emu3" or "emu3.5". It decides on prompts, on the tokens of pictures and on sampling.
        vocab_size: number of token ids, text and visual.
        hidden_size: width of the residual stream; `num_heads` must divide it if `head_width` is None.
        intermediate_size: width of the MLP.
        num_layers: number of layers.
        num_heads: number of query heads.
        num_kv_heads: number of key and value heads; it must divide `num_heads`.
        head_width: width of one attention head, or None for `hidden_size / num_heads`.
        qk_norm: whether each head's queries and keys are normalised before the rotation, as in Qwen3 and Emu3.5.
        max_positions: largest number of tokens in a sequence.
        rms_norm_eps: added to the mean square in norms.
        rope_theta: base of the rotary position embedding.
        image_area: default area of generated pictures, in pixels.
        clip_frames: frames per clip in training, or None if the model was not trained on clips.
        clip_layout: tokens of clips: "lines" ends each row of visual tokens with EOL, "flat" does not.
        dtype: dtype of computation: "bfloat16", "float16" or "float32".
        tokens: ids of the control tokens, and the range of visual ids.

    Raises:
        Emu3Error: a value is not legal. The message names the field.
    """

    vocab_size: int = 184622
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 8
    max_positions: int = 9216
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1_000_000.0
    image_area: int = 720 * 720
    clip_frames: int | None = None
    clip_layout: str = "lines"
    dtype: str = "bfloat16"
    tokens: SpecialTokens = SpecialTokens()
    family: str = "emu3"
    head_width: int | None = None
    qk_norm: bool = False

    def __post_init__(self) -> None:
        check_field(self, "family", self.family in FAMILIES, " or ".join(FAMILIES))
        check_field(self, "qk_norm", isinstance(self.qk_norm, bool), "true or false")
        if self.clip_frames is not None:
            check_counts(self, clip_frames=1 << 20)
        check_field(self, "clip_layout", self.clip_layout in CLIP_LAYOUTS, " or ".join(CLIP_LAYOUTS))
        check_counts(
            self, vocab_size=MAX_IDS, hidden_size=1 << 17, intermediate_size=1 << 20, num_layers=1024, num_heads=4096,
            num_kv_heads=4096, max_positions=1 << 24, image_area=_MAX_PIXELS,
        )  # fmt: skip
        check_positive_number(self, "rms_norm_eps", "rope_theta")
        heads, kv = self.num_heads, self.num_kv_heads
        if self.head_width is None:
            check_field(self, "hidden_size", self.hidden_size % heads == 0, f"a multiple of num_heads ({heads})")
            check_field(self, "hidden_size", self.head_dim % 2 == 0, "num_heads times an even head width (RoPE)")
        else:
            check_counts(self, head_width=4096)
            check_field(self, "head_width", self.head_width % 2 == 0, "an even number (RoPE)")
        check_field(self, "num_heads", heads % kv == 0, f"a multiple of num_kv_heads ({kv})")
        check_field(self, "dtype", self.dtype in ("bfloat16", "float16", "float32"), "bfloat16, float16 or float32")
        if isinstance(self.tokens, Mapping):
            object.__setattr__(self, "tokens", from_json(SpecialTokens, self.tokens))
        check_field(self, "tokens", isinstance(self.tokens, SpecialTokens), "an object of token ids")
        top = max(
            max(v for k, v in dataclasses.asdict(self.tokens).items() if k != "visual_count"),
            self.tokens.visual_end - 1,
        )
        check_field(self, "vocab_size", top < self.vocab_size, f"more than the highest token id ({top})")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads if self.head_width is None else self.head_width

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "DecoderConfig":
        return from_json(cls, data)


# The released 34 B models of Emu3.5. The shapes follow from the report and the number of parameters. `rms_norm_eps` and
# `rope_theta` are the defaults of the reference's code, `max_positions` is the report's context: not confirmed.
EMU35_34B = DecoderConfig(
    vocab_size=282926, hidden_size=5120, intermediate_size=25600, num_layers=64, num_heads=64, num_kv_heads=8,
    max_positions=32768, image_area=1024 * 1024, tokens=SpecialTokens(visual_count=131072), family="emu3.5",
    head_width=128, qk_norm=True,
)  # fmt: skip


def other_field(one: DecoderConfig, other: DecoderConfig) -> str | None:
    """Finds a difference that makes the weights of one config unusable with the other.

    Differences in `FREE_FIELDS` and in `dtype` are ignored: no weight depends on `FREE_FIELDS`, and weights are cast
    to `dtype`.

    Returns:
        The name of the first field that differs; None if the weights fit both configs.
    """
    names = (field.name for field in dataclasses.fields(DecoderConfig))
    kept = (name for name in names if name not in (*FREE_FIELDS, "dtype"))
    return next((name for name in kept if getattr(one, name) != getattr(other, name)), None)

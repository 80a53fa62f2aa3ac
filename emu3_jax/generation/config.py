"""The config of a generation run, which `emu3-jax plan` compiles without loading a model."""

import dataclasses

import numpy as np

from emu3_jax.config import DecoderConfig, VisionConfig, VisionTokenizerConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.fields import check_field, is_number, is_whole
from emu3_jax.generation import defaults
from emu3_jax.generation.parallel import is_window
from emu3_jax.generation.schedule import grid_length, grid_schedule
from emu3_jax.media.sizes import generate_size
from emu3_jax.models.attention import KERNELS
from emu3_jax.models.quantization import KINDS

_LEGAL_COUNT = "a whole number >= 1, or None"


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """The config of generating pictures or clips on a mesh.

    Attributes:
        decoder: config of the decoder. Its weights are in `decoder.dtype`.
        pictures: number of pictures or clips to generate at once. It is padded to a number that the mesh divides.
        frames: number of frames per clip, generated in one pass, or None for pictures. Given frames of a clip count as
            part of the prompt.
        temporal_factor: frames per latent frame of the vision tokenizer. `frames` is rounded up to a multiple.
        ratio: width:height.
        area: area in pixels, or None for the model's default.
        guidance: classifier-free guidance scale. 1 means no guidance, and halves the rows.
        prompt_tokens: length of the longest prompt, with everything before the first generated token.
        mesh: sizes of the mesh axes data, fsdp, sequence and tensor; -1 takes all remaining devices.
        quantize: narrow weights and KV cache of the decoder, as `emu3_jax.load` takes it; None for neither.
        parallel: number of tokens that a pass checks per row, from 2 to 128, or "off" or "auto".
        kernels: implementation of attention over the cache, from `attention.KERNELS`.
        interleave: largest number of tokens that a row writes of texts and pictures in turn. `pictures` is then the
            number of rows, and the model chooses the sizes. None plans pictures or clips alone.
        max_new_tokens: largest number of tokens of an answer. `pictures` is then the number of questions, each about
            one picture, and `prompt_tokens` leaves the picture out. None plans pictures or clips.
        vision: config of the vision tokenizer. None: the published one with as many codes as `decoder` has visual ids;
            if there is none, a plan leaves the vision tokenizer out.
        fast_pixels: decode pixels at the device's default precision, as `emu3_jax.load` takes it.
    """

    decoder: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)
    pictures: int = 1
    frames: int | None = None
    temporal_factor: int = 4
    ratio: str = "1:1"
    area: int | None = None
    guidance: float = defaults.GUIDANCE
    prompt_tokens: int = 64
    mesh: str = "tensor=-1"
    quantize: str | None = None
    parallel: int | str = "off"
    kernels: str = "xla"
    interleave: int | None = None
    max_new_tokens: int | None = None
    vision: VisionTokenizerConfig | None = None
    fast_pixels: bool = False

    def __post_init__(self) -> None:
        for field in ("pictures", "temporal_factor", "prompt_tokens"):
            check_field(self, field, is_whole(getattr(self, field), 1), "a whole number >= 1")
        check_field(self, "frames", self.frames is None or is_whole(self.frames, 1), _LEGAL_COUNT)
        check_field(self, "decoder", isinstance(self.decoder, DecoderConfig), "a DecoderConfig")
        kinds = (None, *KINDS)
        check_field(self, "quantize", self.quantize in kinds, f"None or one of {', '.join(KINDS)}")
        check_field(self, "parallel", is_window(self.parallel), defaults.LEGAL_PARALLEL)
        check_field(self, "kernels", self.kernels in KERNELS, f"one of {', '.join(KERNELS)}")
        check_field(self, "guidance", is_number(self.guidance) and self.guidance >= 0, "a number >= 0")
        check_field(self, "interleave", self.interleave is None or is_whole(self.interleave, 1), _LEGAL_COUNT)
        check_field(self, "fast_pixels", isinstance(self.fast_pixels, bool), "True or False")
        check_field(self, "vision", isinstance(self.vision, VisionTokenizerConfig | None), "a vision config or None")
        if self.vision is not None:
            self._check_vision(self.vision)
        answers = self.max_new_tokens
        check_field(self, "max_new_tokens", answers is None or is_whole(answers, 1), _LEGAL_COUNT)
        if answers is not None:
            alone = self.frames is None and self.interleave is None
            check_field(self, "max_new_tokens", alone, "None, because `frames` or `interleave` is given")
        if self.interleave is not None:
            check_field(self, "frames", self.frames is None, "None, because `interleave` is given")
            if self.prompt_tokens + self.interleave > self.decoder.max_positions:
                raise Emu3Error(
                    f"a prompt of {self.prompt_tokens} tokens and {self.interleave} new ones take more than the "
                    f"decoder's {self.decoder.max_positions} positions: lower interleave or prompt_tokens"
                )
            return
        length = self.prompt_tokens + self.steps + (answers or 0)
        if length > self.decoder.max_positions:
            what, less = ("picture", "") if self.frames is None else ("clip", "fewer frames, ")
            of = f"a prompt of {self.prompt_tokens} tokens and a {what} of {'x'.join(map(str, self.grid))} tokens"
            if answers is not None:
                of, less = f"{of} and an answer of {answers} tokens", "a smaller max_new_tokens, "
            raise Emu3Error(
                f"{of} take {length} positions, the decoder has {self.decoder.max_positions}: choose {less}a smaller "
                "area or prompt_tokens"
            )

    def _check_vision(self, vision: VisionTokenizerConfig) -> None:
        """Refuses a vision tokenizer that cannot belong to the decoder, or cannot make these clips."""
        codes, ids = vision.codebook_size, self.decoder.tokens.visual_count
        if codes != ids:
            raise Emu3Error(
                f"GenerateConfig field vision has codebook_size {codes}, the decoder has {ids} visual ids: give the "
                "vision tokenizer that belongs to the decoder"
            )
        if self.frames is None:
            return
        check_field(self, "frames", isinstance(vision, VisionConfig), "None, because `vision` knows no clips")
        factor = vision.temporal_factor
        check_field(self, "temporal_factor", self.temporal_factor == factor, f"{factor}, as in `vision`")

    @property
    def grid(self) -> tuple[int, ...]:
        """(rows, columns) of tokens of a picture, or (latent frames, rows, columns) of a clip."""
        area = self.decoder.image_area if self.area is None else self.area
        factor = 16 if self.decoder.family == "emu3.5" else 8
        size = generate_size(self.ratio, area, factor if self.vision is None else self.vision.spatial_factor)
        return size if self.frames is None else (-(-self.frames // self.temporal_factor), *size)

    @property
    def schedule(self) -> np.ndarray:
        """The token classes of one picture or clip, to EOS; see `generation.schedule`."""
        return grid_schedule(self.grid, self.decoder.clip_layout)

    @property
    def steps(self) -> int:
        """The number of sampled and forced tokens, including EOS."""
        return grid_length(self.grid, self.decoder.clip_layout)

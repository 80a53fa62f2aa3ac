"""A run of generation as a frozen config: what `emu3-jax plan` compiles without a model at hand."""

import dataclasses

from emu3_jax.config import DecoderConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.media.sizes import generate_size


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Pictures or clips from prompts on a mesh.

    Attributes:
        decoder: the decoder's shapes; its weights are in `decoder.dtype`.
        pictures: pictures, or clips, that are drawn at once; what the mesh's rows leave over is filled up.
        frames: of each clip, drawn in one pass; None for pictures. Those that they go on from are part of the prompt.
        temporal_factor: of the vision tokenizer, frames to one latent frame; what it leaves over is filled up.
        ratio: width:height.
        area: pixels; None for what the model draws by default.
        guidance: classifier-free guidance scale; 1 is none, and halves the rows.
        prompt_tokens: of the longest prompt, with all that comes before the first token that is drawn.
        mesh: sizes of the axes data, fsdp, sequence and tensor; -1 is all that is left.
    """

    decoder: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)
    pictures: int = 1
    frames: int | None = None
    temporal_factor: int = 4
    ratio: str = "1:1"
    area: int | None = None
    guidance: float = 3.0
    prompt_tokens: int = 64
    mesh: str = "tensor=-1"

    def __post_init__(self):
        for field in ("pictures", "frames", "temporal_factor", "prompt_tokens"):
            value = getattr(self, field)
            if field == "frames" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise Emu3Error(f"GenerateConfig field {field} is {value!r}: it must be a whole number >= 1")
        if not isinstance(self.decoder, DecoderConfig):
            raise Emu3Error(f"GenerateConfig field decoder is {self.decoder!r}: it must be a DecoderConfig")
        if not isinstance(self.guidance, int | float) or not 0 <= self.guidance < float("inf"):
            raise Emu3Error(f"GenerateConfig field guidance is {self.guidance!r}: it must be a number >= 0")
        length = self.prompt_tokens + self.steps
        if length > self.decoder.max_positions:
            what, less = ("picture", "") if self.frames is None else ("clip", "fewer frames, ")
            raise Emu3Error(
                f"a prompt of {self.prompt_tokens} tokens and a {what} of {'x'.join(map(str, self.grid))} tokens take "
                f"{length} positions, the decoder has {self.decoder.max_positions}: choose {less}a smaller area or "
                "prompt_tokens"
            )

    @property
    def grid(self) -> tuple[int, ...]:
        """Rows and columns of tokens of a picture; before them, of a clip, its latent frames."""
        size = generate_size(self.ratio, self.decoder.image_area if self.area is None else self.area)
        return size if self.frames is None else (-(-self.frames // self.temporal_factor), *size)

    @property
    def steps(self) -> int:
        """Tokens that are drawn or forced, to EOS; see `generation.schedule`."""
        *frames, rows, columns = self.grid
        if not frames:
            return rows * (columns + 1) + 3
        return frames[0] * (rows * (columns + (self.decoder.clip_layout == "lines")) + 1) + 2

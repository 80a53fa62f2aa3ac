"""The config of `emu3-jax evaluate`."""

import dataclasses
from typing import Any

from emu3_jax.data.config import MAX_SEED, check_path
from emu3_jax.evaluation.functions import is_function
from emu3_jax.fields import check_field, is_number, is_whole
from emu3_jax.generation import defaults
from emu3_jax.generation.parallel import is_window
from emu3_jax.generation.zipar import check_zipar, is_zipar
from emu3_jax.models.quantization import KINDS

_MAX_BATCH = 2**12  # the last batch is padded to full size, so a huge batch would waste memory
FIGURES = ("reconstruction", "text_to_image", "image_to_text", "procedural", "motion")
JUDGE = "judge"  # the features that need no file, see `ReconstructionConfig`
SCENES = ("stories", "two_shapes", "arrangements")  # need no data, but a model that was trained for them
FURTHER_FIGURES = (*SCENES, "people_prompts")  # the last needs data of scripts/build_pictures.py
# Groups of emoji whose labels describe what the picture shows. The embedded model was trained on these.
GROUPS = (
    "smileys & emotion", "animals & nature", "food & drink", "travel & places", "activities", "objects",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """Settings for training the judge, the classifier that scores generated pictures.

    Attributes:
        steps: number of training steps.
        batch_size: pictures per step.
        width: channels of the first block. The next blocks have twice and four times as many.
        learning_rate: peak learning rate of AdamW. It warms up over the first twentieth of the steps, then falls to 0
            as a cosine.
        weight_decay: weight decay of AdamW.
        label_smoothing: share of the target distribution that is spread evenly over all concepts.
        reconstructions: share of training pictures that are replaced by their reconstruction by the vision tokenizer.
            Generated pictures have the same blur as reconstructions.
        seed: seed of weights, batches and augmentation.
    """

    steps: int = 3000
    batch_size: int = 64
    width: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    reconstructions: float = 0.5
    seed: int = 0

    def __post_init__(self):
        for field, most in (("steps", 10**7), ("batch_size", _MAX_BATCH), ("width", 2**12)):
            ok = is_whole(getattr(self, field), 1) and getattr(self, field) <= most
            check_field(self, field, ok, f"a whole number from 1 to {most}")
        check_field(self, "width", self.width % 8 == 0, "a multiple of 8 (group norm)")
        check_field(self, "learning_rate", is_number(self.learning_rate) and self.learning_rate > 0, "a number > 0")
        check_field(self, "weight_decay", is_number(self.weight_decay) and self.weight_decay >= 0, "a number >= 0")
        ok = is_number(self.label_smoothing) and 0 <= self.label_smoothing < 1
        check_field(self, "label_smoothing", ok, "from 0 to below 1")
        ok = is_number(self.reconstructions) and 0 <= self.reconstructions <= 1
        check_field(self, "reconstructions", ok, "from 0 to 1")
        ok = is_whole(self.seed, 0) and self.seed <= MAX_SEED
        check_field(self, "seed", ok, f"a whole number from 0 to {MAX_SEED}")


@dataclasses.dataclass(frozen=True)
class ReconstructionConfig:
    """What the figure "reconstruction" measures besides PSNR, SSIM and codebook use, on pictures.

    Attributes:
        side: of a folder of pictures: pixels of a side. Each picture is resized so that its shorter side has so many,
            and the square in its middle is cut out. The model's limits of the area do not count. Evaluation data keep
            their size.
        features: features for the Fréchet distance: `FILE.py:NAME`, a function that gets pictures uint8 [N, H, W, 3]
            and returns float [N, D]; or "judge", the judge's, which needs evaluation data; or None.
        pairwise: `FILE.py:NAME`, a function that gets true pictures and their reconstructions, uint8 [N, H, W, 3]
            each, and returns a number for each pair, such as LPIPS; or None.
        pictures: new directory that gets the pictures and their reconstructions as PNG files, in the folders `true`
            and `reconstructed`; or None.
        timeout: seconds that running a file of `features` or `pairwise` may take, and each call, which gets
            `batch_size` pictures. The first call may load a model.
    """

    side: int = 256
    features: str | None = None
    pairwise: str | None = None
    pictures: str | None = None
    timeout: float = 600.0

    def __post_init__(self):
        check_field(self, "side", is_whole(self.side, 1) and self.side <= 2**13, f"a whole number from 1 to {2**13}")
        for field, legal in (("features", f"FILE.py:NAME, {JUDGE} or None"), ("pairwise", "FILE.py:NAME or None")):
            value = getattr(self, field)
            ok = value is None or (field == "features" and value == JUDGE) or is_function(value)
            check_field(self, field, ok, legal)
        if self.pictures is not None:
            check_path(self, "pictures", "a new directory or None", remote=True)
            check_field(self, "pictures", self.pictures, "a new directory or None")
        ok = is_number(self.timeout) and 0 < self.timeout <= 1_000_000
        check_field(self, "timeout", ok, "above 0 and at most 1,000,000 seconds")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """The config of an evaluation.

    Attributes:
        directory: output directory. It gets evaluation.json and index.html.
        model: directory of the bundle, or None for the embedded model.
        adapter: directory of a LoRA adapter to merge into the model, or None.
        quantize: quantisation of the decoder's weights and KV cache, as in `emu3_jax.load`, or None.
        data: directory with items.jsonl, written by scripts/build_emoji.py or scripts/build_pictures.py. If
            "reconstruction" is the only figure that needs data, also a folder of pictures.
        figures: names of the figures to measure, from `FIGURES` and `FURTHER_FIGURES`.
        groups: groups of emoji to generate, describe and judge. The figures "reconstruction" and "people_prompts" use
            all groups.
        cases: largest number of cases per figure, chosen by `seed`, or None for all.
        codebook_cases: largest number of pictures, and of clips, over which codebook use is counted, or None for all.
            Fewer cases use fewer codes; the figures are not corrected for this.
        batch_size: pictures to encode, decode or generate at once. The judge takes four times as many at once.
        guidance: classifier-free guidance scales for text to image, in rising order. Each gives a point of the curve.
        procedural_guidance: guidance scale for procedural pictures and clips.
        clip_guidance: guidance scale for clips of animated subjects.
        temperature: sampling temperature of generation; 0 is greedy. Answers are always greedy.
        top_k: number of most likely tokens to sample from.
        top_p: probability mass of the most likely tokens to sample from, above 0 and at most 1.
        seed: seed of the choice of cases, and of the first generated picture. Picture i uses seed + i.
        parallel: number of tokens that a pass of the decoder checks per row, from 2 to 128, or "off" or "auto".
        zipar: number of tokens that a row of a picture or frame is ahead of the next one, or None for exact decoding;
            see `generation.zipar`.
        rows: number of cases per figure that the page shows.
        judge: settings for training the judge.
        reconstruction: further settings of the figure "reconstruction".
    """

    directory: str
    model: str | None = None
    adapter: str | None = None
    quantize: str | None = None
    data: str = "out/pictures64"
    figures: tuple[str, ...] = FIGURES
    groups: tuple[str, ...] = GROUPS
    cases: int | None = None
    codebook_cases: int | None = None
    batch_size: int = 32
    guidance: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 5.0)
    procedural_guidance: float = defaults.GUIDANCE
    clip_guidance: float = defaults.GUIDANCE
    temperature: float = 1.0
    top_k: int = defaults.TOP_K
    top_p: float = 1.0
    seed: int = 0
    parallel: int | str = defaults.PARALLEL
    zipar: int | None = None
    rows: int = 24
    judge: JudgeConfig = dataclasses.field(default_factory=JudgeConfig)
    reconstruction: ReconstructionConfig = dataclasses.field(default_factory=ReconstructionConfig)

    def __post_init__(self):
        check_path(self, "directory", "a directory", remote=True)
        check_field(self, "directory", self.directory, "a directory")
        for field, legal in {
            "model": "a bundle's directory or None",
            "adapter": "an adapter's directory or None",
        }.items():
            if getattr(self, field) is not None:
                check_path(self, field, legal, remote=True)
                check_field(self, field, getattr(self, field), legal)
        kinds = (None, *KINDS)
        check_field(self, "quantize", self.quantize in kinds, f"None or one of {', '.join(KINDS)}")
        check_path(self, "data", "a directory")
        check_field(self, "data", self.data, "a directory")
        known = (*FIGURES, *FURTHER_FIGURES)
        ok = isinstance(self.figures, tuple) and self.figures and all(figure in known for figure in self.figures)
        check_field(self, "figures", ok, f"a tuple of {', '.join(known)}")
        ok = isinstance(self.groups, tuple) and self.groups and all(isinstance(g, str) for g in self.groups)
        check_field(self, "groups", ok, "a tuple of at least one group's name")
        for field in ("cases", "codebook_cases"):
            value = getattr(self, field)
            check_field(self, field, value is None or is_whole(value, 1), "a whole number >= 1, or None for all")
        ok = is_whole(self.batch_size, 1) and self.batch_size <= _MAX_BATCH
        check_field(self, "batch_size", ok, f"a whole number from 1 to {_MAX_BATCH}")
        ok = isinstance(self.guidance, tuple) and self.guidance and all(is_number(g) and g >= 0 for g in self.guidance)
        ok = ok and list(self.guidance) == sorted(set(self.guidance))
        check_field(self, "guidance", ok, "a tuple of numbers >= 0 in rising order, at least one")
        for field in ("procedural_guidance", "clip_guidance", "temperature"):
            value = getattr(self, field)
            check_field(self, field, is_number(value) and value >= 0, "a number >= 0")
        check_field(self, "top_k", is_whole(self.top_k, 1), "a whole number >= 1")
        check_field(self, "top_p", is_number(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1")
        check_field(self, "seed", is_whole(self.seed, 0) and self.seed < 2**31, "a whole number from 0 to 2**31 - 1")
        check_field(self, "parallel", is_window(self.parallel), defaults.LEGAL_PARALLEL)
        check_field(self, "zipar", is_zipar(self.zipar), f"None, or {defaults.LEGAL_ZIPAR}")
        check_zipar(self.zipar, self.parallel)
        check_field(self, "rows", is_whole(self.rows, 0), "a whole number >= 0")
        check_field(self, "judge", isinstance(self.judge, JudgeConfig), "a JudgeConfig")
        ok = isinstance(self.reconstruction, ReconstructionConfig)
        check_field(self, "reconstruction", ok, "a ReconstructionConfig")

    @property
    def needs_data(self) -> bool:
        """Whether a figure needs `data`."""
        return any(figure not in SCENES for figure in self.figures)

    @property
    def needs_items(self) -> bool:
        """Whether a figure needs the items of scripts/build_emoji.py: a folder of pictures would not do."""
        return any(figure not in (*SCENES, "reconstruction") for figure in self.figures)

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling options, as keyword arguments of the methods of `Emu3`."""
        names = ("temperature", "top_k", "top_p", "seed", "batch_size", "parallel", "zipar")
        return {name: getattr(self, name) for name in names}

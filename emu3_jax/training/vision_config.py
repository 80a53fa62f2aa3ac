"""The recipe of a run that trains the vision tokenizer, as one frozen config."""

import dataclasses
from collections.abc import Mapping

from emu3_jax.config import ImageConfig, VisionConfig
from emu3_jax.data.config import MAX_SEED, MAX_THREADS, check_path, check_paths
from emu3_jax.fields import check_field, is_number, is_whole
from emu3_jax.training.config import MAX_STEPS, OptimizerConfig


@dataclasses.dataclass(frozen=True)
class PixelConfig:
    """Pictures and clips of a step.

    Attributes:
        manifests: JSONL files as `emu3-jax prepare` reads them; their texts do not matter.
        size: height and width of the crops; pictures are scaled so that their shorter side is as long.
        stills: a step sees so many pictures.
        clips: and so many clips.
        frames: of a clip; longer ones give a random stretch.
        in_memory: keeps all pictures in the host's memory, scaled and cropped; for small sets.
        workers: threads that read.
        augment: share of pictures and clips that are changed at random: zoomed, mirrored, recoloured.
        zoom: largest magnification of those.
        recolour: standard deviation of what is added to the identity that mixes their colours.
        seed: of the order and the changes.
    """

    manifests: tuple[str, ...]
    size: int = 256
    stills: int = 16
    clips: int = 0
    frames: int = 8
    in_memory: bool = False
    workers: int = 8
    augment: float = 0.5
    zoom: float = 1.3
    recolour: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_paths(self, "manifests", "a tuple of at least one file")
        check_field(self, "manifests", self.manifests, "a tuple of at least one file")
        for field, least, most in (
            ("size", 8, 2**14), ("stills", 0, 2**24), ("clips", 0, 2**24), ("frames", 1, 2**12),
            ("workers", 1, MAX_THREADS), ("seed", 0, MAX_SEED),
        ):  # fmt: skip
            ok = is_whole(getattr(self, field), least) and getattr(self, field) <= most
            check_field(self, field, ok, f"a whole number from {least} to {most}")
        check_field(self, "stills", self.stills + self.clips > 0, "more than 0 where clips is 0")
        check_field(self, "augment", is_number(self.augment) and 0 <= self.augment <= 1, "a share from 0 to 1")
        check_field(self, "zoom", is_number(self.zoom) and self.zoom >= 1, "a number >= 1")
        check_field(self, "recolour", is_number(self.recolour) and self.recolour >= 0, "a number >= 0")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the parts of the loss. A weight of 0 leaves the part out.

    Attributes:
        absolute: of the mean absolute difference of pixels, which are in -1..1.
        squared: of the mean squared difference.
        structure: of 1 - SSIM.
        commitment: of the distance of latents to their codes.
        adversarial: of the discriminator's judgement, times VQGAN's adaptive weight (arXiv 2012.09841, 3.1).
        adversarial_from: the step at which the discriminator begins to be trained, and to count.
    """

    absolute: float = 1.0
    squared: float = 1.0
    structure: float = 0.0
    commitment: float = 0.25
    adversarial: float = 0.0
    adversarial_from: int = 0

    def __post_init__(self) -> None:
        for field in ("absolute", "squared", "structure", "commitment", "adversarial"):
            check_field(self, field, is_number(getattr(self, field)) and getattr(self, field) >= 0, "a number >= 0")
        check_field(self, "adversarial_from", is_whole(self.adversarial_from, 0), "a whole number >= 0")


@dataclasses.dataclass(frozen=True)
class VisionTrainConfig:
    """A run that trains the vision tokenizer.

    Attributes:
        directory: of the run, as `TrainConfig`'s.
        vision: the tokenizer's shapes.
        pixels: what it is trained on.
        steps: optimiser steps in all.
        bundle: whose tokenizer the run starts from; empty for random weights.
        image: how the finished tokenizer treats pictures; None for pictures of the crops' area.
        optimizer: AdamW's numbers, of the discriminator too.
        loss: what is minimised.
        dtype: "float32" or "bfloat16", of the products and activations while training.
        precision: "default" or "highest", of float32 products while training.
        remat: the backward pass computes the insides of blocks again, for large crops.
        average: decay of the moving average of the weights, which is what is evaluated and exported.
        code_decay: decay of the moving averages that codes follow (van den Oord et al., arXiv 1711.00937, A.1).
        dead_below: a code of which a step uses fewer than this on average becomes a latent of the batch, drawn by its
            squared distance to its own code.
        norm_momentum: share of a step's statistics in the batch norms' stored ones.
        batch_statistics_until: share of the run after which batch norms no longer use the batch's statistics, so that
            the rest trains exactly the network that is exported.
        export_dtype: "float32", or "bfloat16" for a file of half the size.
        evaluation: manifests of pictures; all are reconstructed, uncropped where their sides allow.
        mesh: sizes of the axes, of which only `data` is used; -1 is all that is left.
        seed: of random weights and dead codes.
        log_every, checkpoint_every, evaluate_every, keep: as `TrainConfig`'s.
    """

    directory: str
    vision: VisionConfig
    pixels: PixelConfig
    steps: int
    bundle: str = ""
    image: ImageConfig | None = None
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    dtype: str = "float32"
    precision: str = "default"
    remat: bool = False
    average: float = 0.999
    code_decay: float = 0.99
    dead_below: float = 0.5
    norm_momentum: float = 0.1
    batch_statistics_until: float = 0.5
    export_dtype: str = "float32"
    evaluation: tuple[str, ...] = ()
    mesh: str = "data=-1"
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 1000
    evaluate_every: int = 1000
    keep: int = 1

    def __post_init__(self) -> None:
        check_path(self, "directory", "a directory", remote=True)
        check_path(self, "bundle", "a bundle's directory, or empty", remote=True)
        kinds = {"vision": VisionConfig, "pixels": PixelConfig, "optimizer": OptimizerConfig, "loss": LossConfig}
        for field, kind in kinds.items():
            check_field(self, field, isinstance(getattr(self, field), kind), f"a {kind.__name__}")
        check_field(self, "image", isinstance(self.image, ImageConfig | None), "an ImageConfig or None")
        for field in ("steps", "log_every", "checkpoint_every", "evaluate_every", "keep"):
            check_field(self, field, is_whole(getattr(self, field), 1), "a whole number >= 1")
        check_field(self, "steps", self.steps <= MAX_STEPS, f"at most {MAX_STEPS}")
        ok = is_whole(self.seed, 0) and self.seed <= MAX_SEED
        check_field(self, "seed", ok, f"a whole number from 0 to {MAX_SEED}")
        check_field(self, "mesh", isinstance(self.mesh, str | Mapping), 'text like "data=-1"')
        ok = self.optimizer.warmup_steps < self.steps
        check_field(self.optimizer, "warmup_steps", ok, f"less than steps ({self.steps})")
        check_field(self, "dtype", self.dtype in ("float32", "bfloat16"), "float32 or bfloat16")
        check_field(self, "export_dtype", self.export_dtype in ("float32", "bfloat16"), "float32 or bfloat16")
        check_field(self, "precision", self.precision in ("default", "highest"), "default or highest")
        for field in ("average", "code_decay"):
            check_field(
                self, field, is_number(getattr(self, field)) and 0 <= getattr(self, field) < 1, "from 0 to below 1"
            )
        for field in ("norm_momentum", "batch_statistics_until"):
            value = getattr(self, field)
            check_field(self, field, is_number(value) and 0 <= value <= 1, "from 0 to 1")
        check_field(self, "dead_below", is_number(self.dead_below) and self.dead_below >= 0, "a number >= 0")
        factor, frames = self.vision.spatial_factor, self.vision.temporal_factor
        check_field(self.pixels, "size", self.pixels.size % factor == 0, f"a multiple of {factor}, pixels of a code")
        check_field(
            self.pixels, "frames", self.pixels.frames % frames == 0, f"a multiple of {frames}, frames of a code"
        )
        check_paths(self, "evaluation", "a tuple of files")
        check_field(self, "vision", self.vision.in_channels == 3, "a tokenizer of three channels")

    @property
    def image_config(self) -> ImageConfig:
        """How the exported tokenizer treats pictures."""
        area = self.pixels.size**2
        return ImageConfig(min_pixels=area, max_pixels=area) if self.image is None else self.image

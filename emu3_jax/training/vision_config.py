"""The config of a run that trains the vision tokenizer."""

import dataclasses
from collections.abc import Mapping

from emu3_jax.config import ImageConfig, VisionConfig
from emu3_jax.data.config import MAX_SEED, MAX_THREADS, check_path, check_paths
from emu3_jax.fields import check_field, is_number, is_whole
from emu3_jax.training.config import MAX_STEPS, OptimizerConfig


@dataclasses.dataclass(frozen=True)
class PixelConfig:
    """The pictures and clips that each step trains on.

    Attributes:
        manifests: JSONL files in the format that `emu3-jax prepare` reads. Their texts are ignored.
        size: height and width of the crops in pixels. A picture is first scaled down so that its shorter side has
            this length. Smaller pictures are refused.
        stills: number of pictures per step.
        clips: number of clips per step.
        frames: number of frames per clip. A longer clip gives a random section, a shorter one repeats its last frame.
        in_memory: keep all pictures in the host's memory, scaled and cropped. For small data sets.
        workers: number of reader threads.
        augment: share of pictures and clips that are augmented: zoomed, mirrored and recoloured at random.
        zoom: largest magnification of the augmentation.
        recolour: standard deviation of the random numbers that the augmentation adds to the 3x3 colour matrix (the
            identity) and to the colours.
        seed: seed of the order of the data and of the crops.
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
    """Weights of the terms of the loss. A weight of 0 removes the term.

    Attributes:
        absolute: weight of the mean absolute difference of pixels, which are in -1..1.
        squared: weight of the mean squared difference of pixels.
        structure: weight of 1 - SSIM.
        commitment: weight of the mean squared distance of latents from their codes.
        adversarial: weight of the discriminator's term, multiplied by VQGAN's adaptive weight (arXiv 2012.09841, 3.1).
        adversarial_from: first step at which the discriminator is trained and its term counts.
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
    """The config of a run that trains the vision tokenizer.

    Attributes:
        directory: directory of the run, see `TrainConfig`.
        vision: config of the vision tokenizer.
        pixels: the training data.
        steps: total number of optimiser steps.
        bundle: bundle whose vision tokenizer the run starts from; empty for random weights.
        image: picture sizes that the exported tokenizer accepts. None: pictures are resized to the area of a crop.
        optimizer: settings of AdamW, for the tokenizer and the discriminator.
        loss: weights of the loss terms.
        dtype: dtype of activations and products while training, "float32" or "bfloat16".
        precision: precision of float32 products while training, "default" or "highest".
        remat: recompute the insides of blocks in the backward pass. Saves memory for large crops.
        average: decay of the moving average of the weights. The averaged weights are evaluated and exported.
        code_decay: decay of the moving averages that update the codebook (van den Oord et al., arXiv 1711.00937, A.1).
        dead_below: a code is dead if fewer latents per step than this are nearest to it, on average. A dead code is
            replaced by a latent of the batch, sampled in proportion to its squared distance from its own code.
        norm_momentum: weight of a step's batch statistics in the stored statistics of batch norms.
        batch_statistics_until: share of the run during which batch norms use the batch's statistics. The rest of the
            run uses the stored statistics, so it trains exactly the network that is exported.
        export_dtype: dtype of the exported weights, "float32" or "bfloat16" (half the file size).
        evaluation: manifests whose pictures and clips are all reconstructed in an evaluation.
        mesh: mesh axes and their sizes. Only `data` is used; -1 takes all remaining devices.
        seed: seed of random weights, augmentation and the replacement of dead codes.
        log_every, checkpoint_every, evaluate_every, keep: see `TrainConfig`.
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
            other = " (Emu3.5's vision tokenizer cannot be trained here)" if field == "vision" else ""
            check_field(self, field, isinstance(getattr(self, field), kind), f"a {kind.__name__}{other}")
        check_field(self, "image", isinstance(self.image, ImageConfig | None), "an ImageConfig or None")
        for field in ("steps", "log_every", "checkpoint_every", "evaluate_every", "keep"):
            check_field(self, field, is_whole(getattr(self, field), 1), "a whole number >= 1")
        check_field(self, "steps", self.steps <= MAX_STEPS, f"at most {MAX_STEPS}")
        ok = is_whole(self.seed, 0) and self.seed <= MAX_SEED
        check_field(self, "seed", ok, f"a whole number from 0 to {MAX_SEED}")
        check_field(self, "mesh", isinstance(self.mesh, str | Mapping), 'text like "data=-1"')
        ok = self.optimizer.warmup_steps < self.steps
        legal = f"less than steps ({self.steps}), for example --set optimizer.warmup_steps={self.steps // 2}"
        check_field(self.optimizer, "warmup_steps", ok, legal)
        check_field(self.optimizer, "algorithm", self.optimizer.algorithm == "adamw", "adamw for a vision tokenizer")
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
        check_field(self.pixels, "size", self.pixels.size % factor == 0, f"a multiple of {factor}, the pixels per code")
        check_field(
            self.pixels, "frames", self.pixels.frames % frames == 0, f"a multiple of {frames}, the frames per code"
        )
        check_paths(self, "evaluation", "a tuple of files")
        check_field(self, "vision", self.vision.in_channels == 3, "a VisionConfig with in_channels=3")

    @property
    def image_config(self) -> ImageConfig:
        """The picture sizes of the exported tokenizer: `image`, or the area of a crop."""
        area = self.pixels.size**2
        return ImageConfig(min_pixels=area, max_pixels=area) if self.image is None else self.image

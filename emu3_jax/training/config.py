"""The config of a decoder's training run, and `load_config`, which reads a config from a Python file."""

import contextlib
import dataclasses
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from emu3_jax.config import DecoderConfig
from emu3_jax.data.config import MAX_SEED, DataConfig, Source, check_path
from emu3_jax.errors import Emu3Error
from emu3_jax.fields import check_field, is_number, is_whole
from emu3_jax.foreign import read_bytes
from emu3_jax.generation import defaults
from emu3_jax.media.sizes import check_generated_area, check_ratio
from emu3_jax.models.adapters import Adapter
from emu3_jax.models.decoder import REMAT_POLICIES
from emu3_jax.training.grpo_config import GrpoConfig
from emu3_jax.training.overrides import override
from emu3_jax.training.preference_config import PreferenceConfig
from emu3_jax.user_code import run_file, what_failed

ENTRY = "config"  # the function that a config file defines
MAX_STEPS = 2**31 - 1  # devices count steps in int32
_MODULE = "emu3_jax_config_file"
_MAX_FILE = 16 << 20  # largest config file, in bytes


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon, with linear warm-up and cosine decay.

    The defaults are the reference's fine-tuning recipe (`scripts/t2i_sft.sh` of the Emu3 repository).

    Attributes:
        learning_rate: peak learning rate, reached at the end of the warm-up.
        final_learning_rate: learning rate at the last step, where the cosine ends.
        warmup_steps: number of steps of linear warm-up from 0.
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment.
        eps: added to the square root of the second moment.
        weight_decay: decoupled weight decay, multiplied by the learning rate. The scales of norms do not decay.
        clip_norm: largest global norm of the gradients. Larger gradients are scaled down to this norm.
        first_moment_dtype: "float32" or "bfloat16". bfloat16 saves two bytes per weight.
        algorithm: "adamw" or "muon". Muon (https://kellerjordan.github.io/posts/muon/) makes the momentum of each
            matrix of the layers orthogonal. It has momentum 0.95, no second moment, and updates of the size of AdamW's
            (arXiv 2502.16982). AdamW updates the other weights, at the same learning rate.
    """

    learning_rate: float = 1e-5
    final_learning_rate: float = 1e-6
    warmup_steps: int = 30
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-6
    weight_decay: float = 0.1
    clip_norm: float = 5.0
    first_moment_dtype: str = "float32"
    algorithm: str = "adamw"

    def __post_init__(self) -> None:
        for field in ("learning_rate", "eps", "clip_norm"):
            check_field(self, field, is_number(getattr(self, field)) and getattr(self, field) > 0, "a number > 0")
        ok = is_number(self.final_learning_rate) and 0 <= self.final_learning_rate <= self.learning_rate
        check_field(self, "final_learning_rate", ok, f"from 0 to learning_rate ({self.learning_rate})")
        check_field(self, "weight_decay", is_number(self.weight_decay) and self.weight_decay >= 0, "a number >= 0")
        for field in ("beta1", "beta2"):
            value = getattr(self, field)
            check_field(self, field, is_number(value) and 0 <= value < 1, "from 0 to below 1")
        check_field(self, "warmup_steps", is_whole(self.warmup_steps, 0), "a whole number >= 0")
        legal = ("float32", "bfloat16")
        check_field(self, "warmup_steps", self.warmup_steps <= MAX_STEPS, f"at most {MAX_STEPS}")
        check_field(self, "first_moment_dtype", self.first_moment_dtype in legal, " or ".join(legal))
        check_field(self, "algorithm", self.algorithm in ("adamw", "muon"), "adamw or muon")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model to train, and how its layers are computed.

    Attributes:
        bundle: directory of the model bundle. Training reads its text tokenizer, its decoder weights (unless
            `random`) and, for `samples`, its vision tokenizer. `emu3-jax plan` does not open it.
        decoder: config of the decoder, or None for the bundle's. If the weights come from the bundle, the shapes must
            equal the bundle's shapes. Only `image_area`, `max_positions`, `clip_frames` and `clip_layout` may differ;
            the trained model keeps the new values.
        random: start from random weights instead of the bundle's weights (pretraining).
        dtype: dtype of activations and matrix products, "bfloat16" or "float32". Trained weights are float32.
        remat: what the backward pass recomputes in each layer: "none", "dots" or "full". See `Decoder`.
        unroll: number of layers that one iteration of the loop over layers computes. The number of layers or more: no
            loop. Then a step of a small decoder takes less time, but each layer adds to the time of compilation, and
            on CPUs `remat` saves hardly any memory. Results are equal up to rounding, and a run may resume with
            another value.
        attention: implementation of attention. See `models.attention`.
        dropout: share of activations that training sets to zero. See `Decoder`. The published models used 0. Use
            dropout when training reads the same data many times.
        noise: largest share of a row's visual tokens that training replaces by random visual tokens in the input. The
            targets do not change. Each row's share is `noise` times the square of a uniform random number, so most
            rows get little noise. Noise makes earlier visual tokens less predictive, so the model must use the
            prompt. Without noise the model learns the prompt late or never: once the beginning of a picture is
            known, the prompt's few bits hardly change the loss.
        noise_in: which visual tokens get noise: "all", or "targets", those that the model learns to write. Use
            "targets" where the prompt holds pictures that the answer must keep, as in edits. "auto": "targets" in rows
            with pictures that the model learns to write, and "all" in others, such as rows of questions about pictures.
    """

    bundle: str
    decoder: DecoderConfig | None = None
    random: bool = False
    dtype: str = "bfloat16"
    remat: str = "full"
    unroll: int = 1
    attention: str = "auto"
    dropout: float = 0.0
    noise: float = 0.0
    noise_in: str = "all"

    def __post_init__(self) -> None:
        check_path(self, "bundle", "a bundle's directory", remote=True)
        check_field(self, "decoder", isinstance(self.decoder, DecoderConfig | None), "a DecoderConfig or None")
        if self.random:
            check_field(self, "decoder", self.decoder is not None, "a DecoderConfig where random is True")
        check_field(self, "dtype", self.dtype in ("bfloat16", "float32"), "bfloat16 or float32")
        legal = ("none", *REMAT_POLICIES)
        check_field(self, "remat", self.remat in legal, " or ".join(legal))
        check_field(self, "unroll", is_whole(self.unroll, 1), "a whole number >= 1")
        ok = is_number(self.dropout) and 0 <= self.dropout < 1
        check_field(self, "dropout", ok, "a number from 0 to below 1")
        check_field(self, "noise", is_number(self.noise) and 0 <= self.noise <= 1, "a number from 0 to 1")
        check_field(self, "noise_in", self.noise_in in ("all", "targets", "auto"), "all, targets or auto")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Sample pictures that a run generates while it trains, in `DIRECTORY/samples/STEP`.

    Attributes:
        prompts: prompts, one picture each.
        every: number of steps between two sets of pictures. The last step gets a set too.
        ratio: aspect ratio, width:height.
        area: area in pixels, or None for the area that the model was trained for.
        guidance: classifier-free guidance scale.
    """

    prompts: tuple[str, ...]
    every: int = 1000
    ratio: str = "1:1"
    area: int | None = None
    guidance: float = defaults.GUIDANCE

    def __post_init__(self) -> None:
        ok = isinstance(self.prompts, tuple) and self.prompts and all(isinstance(p, str) for p in self.prompts)
        check_field(self, "prompts", ok, "a tuple of at least one text")
        check_field(self, "every", is_whole(self.every, 1), "a whole number >= 1")
        check_field(self, "ratio", isinstance(self.ratio, str), "width:height, such as 16:9")
        check_field(self, "area", self.area is None or is_whole(self.area, 1), "a whole number >= 1, or None")
        check_ratio(self.ratio)
        if self.area is not None:  # the least one depends on the vision tokenizer
            check_generated_area(self.area, "samples.area")
        check_field(self, "guidance", is_number(self.guidance) and self.guidance >= 0, "a number >= 0")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The config of a run that trains the decoder.

    Attributes:
        directory: directory of the run. It gets checkpoints, metrics, samples and, at the end, the trained model as a
            bundle. If it already holds checkpoints of this run, the run resumes from the newest one.
        model: the model to train.
        data: the training data. `data.sequence_length` is the length of a row in tokens.
        batch_size: rows per step, over all devices and all `accumulation` parts.
        steps: total number of optimiser steps.
        optimizer: settings of AdamW.
        adapter: settings of low-rank adapters (LoRA, QLoRA) that are trained beside frozen weights, or None to train
            all weights.
        preference: the loss of preference pairs, where `data` has them (the task `Preference`); else None. A pair takes
            two rows, so `batch_size` is twice the number of pairs in a step.
        grpo: settings of GRPO, which draws its own pictures or answers, so that `data.sources` is empty; else None. A
            picture takes one row, or two, see `GrpoConfig.guided_policy`. An answer takes one.
        accumulation: number of equal parts of a batch that a step computes one after the other, to save memory.
            Without dropout and noise, the result equals that of one part up to rounding.
        vision_weight: weight of visual targets in the loss; text targets have weight 1. The paper's pretraining used
            0.5 (arXiv 2409.18869, 3.2).
        mesh: sizes of the mesh axes data, fsdp, sequence and tensor, such as "data=2,fsdp=-1". -1 takes all remaining
            devices.
        seed: seed of random weights, dropout, noise and sample pictures. `data` has its own seed.
        log_every: number of steps between two lines of metrics. A line describes its own step, not a mean over steps.
        checkpoint_every: number of steps between two checkpoints. The last step gets a checkpoint too.
        keep: number of checkpoints to keep. Older ones are deleted.
        evaluation: pairs (name, source). An evaluation computes the loss of every record of a source. The metrics
            carry the name.
        evaluate_every: number of steps between two evaluations. The last step gets an evaluation too.
        samples: sample pictures while training, or None.
        profile: (steps to skip, steps to record) of a JAX profile, counted from the start of this process, or None.
    """

    directory: str
    model: ModelConfig
    data: DataConfig
    batch_size: int
    steps: int
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    adapter: Adapter | None = None
    preference: PreferenceConfig | None = None
    grpo: GrpoConfig | None = None
    accumulation: int = 1
    vision_weight: float = 1.0
    mesh: str = "fsdp=-1"
    seed: int = 0
    log_every: int = 1
    checkpoint_every: int = 500
    keep: int = 3
    evaluation: tuple[tuple[str, Source], ...] = ()
    evaluate_every: int = 500
    samples: SampleConfig | None = None
    profile: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_path(self, "directory", "a directory", remote=True)
        for field, kind in (("model", ModelConfig), ("data", DataConfig), ("optimizer", OptimizerConfig)):
            check_field(self, field, isinstance(getattr(self, field), kind), f"a {kind.__name__}")
        least = {"batch_size": 1, "steps": 1, "accumulation": 1, "seed": 0, "log_every": 1, "checkpoint_every": 1}
        for field, minimum in {**least, "keep": 1, "evaluate_every": 1}.items():
            check_field(self, field, is_whole(getattr(self, field), minimum), f"a whole number >= {minimum}")
        for field, most in {"steps": MAX_STEPS, "seed": MAX_SEED}.items():
            check_field(self, field, getattr(self, field) <= most, f"at most {most}")
        ok = self.batch_size * self.data.sequence_length < 2**31
        check_field(self, "batch_size", ok, "less than 2**31 tokens at this data.sequence_length")
        check_field(self, "mesh", isinstance(self.mesh, str | Mapping), 'text like "fsdp=-1" or "data=2,tensor=4"')
        check_field(self, "vision_weight", is_number(self.vision_weight) and self.vision_weight >= 0, "a number >= 0")
        ok = self.batch_size % self.accumulation == 0
        check_field(self, "accumulation", ok, f"a divisor of batch_size ({self.batch_size})")
        ok = self.optimizer.warmup_steps < self.steps
        legal = f"less than steps ({self.steps}), for example --set optimizer.warmup_steps={self.steps // 2}"
        check_field(self.optimizer, "warmup_steps", ok, legal)
        check_field(self, "adapter", isinstance(self.adapter, Adapter | None), "an Adapter or None")
        ok = self.adapter is None or not self.model.random
        check_field(self, "adapter", ok, "None where the model starts from random weights")
        ok = self.adapter is None or self.optimizer.algorithm == "adamw"
        check_field(self.optimizer, "algorithm", ok, "adamw for adapters")
        ok = isinstance(self.evaluation, tuple) and all(
            isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], Source)
            for item in self.evaluation
        )
        check_field(self, "evaluation", ok, "a tuple of (name, Source)")
        self._check_preference()
        self._check_grpo()
        check_field(self, "samples", isinstance(self.samples, SampleConfig | None), "a SampleConfig or None")
        ok = self.profile is None or (
            isinstance(self.profile, tuple) and len(self.profile) == 2 and all(is_whole(v, 1) for v in self.profile)
        )
        check_field(self, "profile", ok, "(first step, steps) or None")

    @property
    def updates(self) -> int:
        """Number of updates of the weights in a whole run: the steps, times GRPO's `iterations`."""
        return self.steps * (1 if self.grpo is None else self.grpo.iterations)

    @property
    def together(self) -> int:
        """Number of rows that belong together: of a preference pair, or of a picture that GRPO draws with guidance."""
        if self.grpo is not None:
            return self.grpo.rows
        return 2 if self.data.pairs else 1

    @property
    def gather_weights(self) -> bool:
        """Whether the weights for drawing are gathered, see `GrpoConfig`."""
        return self.grpo is not None and self.grpo.gather_weights

    @property
    def visual_only(self) -> bool:
        """Whether a step computes only the logits of visual tokens: where GRPO draws pictures."""
        return self.grpo is not None and self.grpo.max_new_tokens is None

    def _check_preference(self) -> None:
        preference = self.preference
        check_field(self, "preference", isinstance(preference, PreferenceConfig | None), "a PreferenceConfig or None")
        check_field(
            self,
            "preference",
            (preference is not None) == self.data.pairs,
            "a PreferenceConfig where data.sources have the task Preference, and None where they have other tasks",
        )
        ok = all(source.pairs == self.data.pairs for _, source in self.evaluation)
        check_field(self, "evaluation", ok, "sources with the task Preference if and only if data.sources have it")
        if preference is None:
            return
        rows = 2 * self.accumulation
        check_field(self, "batch_size", self.batch_size % rows == 0, f"a multiple of {rows}: a pair takes two rows")
        self._check_tuned("preference pairs are trained")
        ok = preference.reference != "adapters_off" or self.adapter is not None or not preference.compares
        check_field(preference, "reference", ok, "stored where all weights are trained (adapter is None)")

    def _check_grpo(self) -> None:
        grpo = self.grpo
        check_field(self, "grpo", isinstance(grpo, GrpoConfig | None), "a GrpoConfig or None")
        if grpo is None:
            if not self.data.sources:
                raise Emu3Error("data field sources is empty: name at least one directory of prepared data")
            return
        if self.data.sources or self.data.packing or self.data.loss_on_padding:
            raise Emu3Error(
                f"GRPO draws its own {grpo.noun}s, one a row: data needs sources=(), packing=0 and "
                "loss_on_padding=False"
            )
        check_field(self, "evaluation", not self.evaluation, "empty where grpo is set; grpo.held_out has its prompts")
        rows = grpo.n * grpo.rows
        of = f"{grpo.n} {grpo.noun}s per prompt" + (", each with two rows" if grpo.rows == 2 else "")
        check_field(self, "batch_size", self.batch_size % rows == 0, f"a multiple of {rows}: {of}")
        parts = grpo.rows * self.accumulation
        ok = self.batch_size % parts == 0
        check_field(self, "batch_size", ok, f"a multiple of {parts}: accumulation must not separate a picture's rows")
        self._check_tuned("GRPO trains")

    def _check_tuned(self, why: str) -> None:
        for field in ("dropout", "noise"):
            check_field(self.model, field, not getattr(self.model, field), f"0 where {why}: it would change the ratios")
        check_field(self.model, "random", not self.model.random, f"False where {why}: that needs a trained model")


def load_config(file: str | os.PathLike, overrides: Sequence[str] = ()) -> Any:
    """Runs a config file, calls its function `config`, and applies overrides to the returned config.

    Args:
        file: path of a Python file, ending in `.py`. The file is executed with all rights of the user. Its printed
            output goes to standard error, because standard output belongs to the command.
        overrides: texts "path.to.field=value". See `overrides.override`.

    Returns:
        The config.

    Raises:
        Emu3Error: the file does not exist, does not end in `.py`, or fails while it runs; or an override is not legal.
    """
    file = pathlib.Path(file)
    if not file.is_file():
        raise Emu3Error(f"{file}: no such config file; the repository's folder configs/ has examples")
    if file.suffix != ".py":
        raise Emu3Error(f"{file}: a config file is a Python program, so its name must end in .py")
    source = read_bytes(file, _MAX_FILE, "give a config file in Python")
    with _running(file):
        try:
            module = run_file(str(file), source, _MODULE)
            entry = getattr(module, ENTRY, None)
            if not callable(entry):
                raise Emu3Error(f"defines no function `{ENTRY}` that returns the config; see configs/")
            config = entry()
        finally:
            sys.modules.pop(_MODULE, None)
    return override(config, overrides) if overrides else config


@contextlib.contextmanager
def _running(file: pathlib.Path) -> Iterator[None]:
    """Turns every exception of a block that runs the user's file, even `SystemExit`, into a one-line `Emu3Error`."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except Emu3Error as error:
        raise Emu3Error(f"{file}: {error}") from error
    except BaseException as error:
        said, line = what_failed(error, str(file))
        raise Emu3Error(f"{file}{f' line {line}' if line else ''}: {said}; correct the file") from error

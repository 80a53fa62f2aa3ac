"""The whole recipe of a run as one frozen config, and the Python files that hold one."""

import contextlib
import dataclasses
import os
import pathlib
import sys
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from emu3_jax.config import DecoderConfig
from emu3_jax.data.config import MAX_SEED, DataConfig, Source, check_path
from emu3_jax.errors import Emu3Error
from emu3_jax.fields import check_field, is_number, is_whole
from emu3_jax.foreign import read_bytes
from emu3_jax.generation import defaults
from emu3_jax.media.sizes import generate_size
from emu3_jax.models.adapters import Adapter
from emu3_jax.models.decoder import REMAT_POLICIES
from emu3_jax.training.overrides import override

ENTRY = "config"  # the function that a config file defines
MAX_STEPS = 2**31 - 1  # of a run: devices count them in int32
_MAX_FILE = 16 << 20  # bytes of a config file


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up and cosine decay. Defaults: the reference's fine-tuning recipe (its `scripts/t2i_sft.sh`).

    Attributes:
        learning_rate: at its peak, after the warm-up.
        final_learning_rate: where the cosine ends, at the last step.
        warmup_steps: steps of linear warm-up from 0.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, times the learning rate; the norms' scales do not decay.
        clip_norm: gradients are scaled down to this global norm.
        first_moment_dtype: "float32", or "bfloat16", which saves two bytes a weight.
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


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What is trained, and how its layers are computed.

    Attributes:
        bundle: the model's directory: its tokenizer, its weights unless `random`, and for pictures while training its
            vision tokenizer. Not needed by `plan`.
        decoder: the decoder's shapes; None for those of the bundle. With weights from the bundle they must be equal;
            `image_area`, `max_positions` and what clips are may be new ones, and are the trained model's.
        random: starts from random weights, for pretraining.
        dtype: of the products; the weights that are trained are float32.
        remat: what the backward pass computes again, layer by layer: "none", "dots" or "full", see `Decoder`.
        attention: the implementation, see `models.attention`.
        dropout: share of activations that is zeroed while training, see `Decoder`. The published models were trained
            with none; it is for data that are read many times over.
        noise: up to which share of a row's visual tokens the model sees as random ones while training; targets stay as
            they are. The share of each row is `noise` times the square of a uniform number, so many rows have little
            of it. Noise makes earlier visual tokens less predictive, so the model must use the prompt: its few bits
            hardly change the loss of a picture whose beginning is known, and are learned late or not at all.
    """

    bundle: str
    decoder: DecoderConfig | None = None
    random: bool = False
    dtype: str = "bfloat16"
    remat: str = "full"
    attention: str = "auto"
    dropout: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        check_path(self, "bundle", "a bundle's directory", remote=True)
        check_field(self, "decoder", isinstance(self.decoder, DecoderConfig | None), "a DecoderConfig or None")
        if self.random:
            check_field(self, "decoder", self.decoder is not None, "given where weights are random")
        check_field(self, "dtype", self.dtype in ("bfloat16", "float32"), "bfloat16 or float32")
        legal = ("none", *REMAT_POLICIES)
        check_field(self, "remat", self.remat in legal, " or ".join(legal))
        ok = is_number(self.dropout) and 0 <= self.dropout < 1
        check_field(self, "dropout", ok, "a number from 0, and less than 1")
        check_field(self, "noise", is_number(self.noise) and 0 <= self.noise <= 1, "a number from 0 to 1")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Pictures while training, in `DIRECTORY/samples/STEP`.

    Attributes:
        prompts: the texts, one picture each.
        every: steps between them; there is one set at the end as well.
        ratio: width:height.
        area: pixels; None for the area that the model was trained for.
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
        generate_size(self.ratio, 512 * 512 if self.area is None else self.area)  # refused now, not after a day
        check_field(self, "guidance", is_number(self.guidance) and self.guidance >= 0, "a number >= 0")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run.

    Attributes:
        directory: of the run: checkpoints, metrics, samples, and at the end the model as a bundle. A run that finds
            its checkpoints there goes on from the last one.
        model: what is trained.
        data: what it is trained on; `data.sequence_length` is the length of a row.
        batch_size: rows of a step, over all devices and accumulated parts.
        steps: optimiser steps in all.
        optimizer: AdamW's numbers.
        adapter: trains low-rank adapters beside frozen weights (LoRA, QLoRA) instead of the weights, or None.
        accumulation: parts that a step's rows are computed in, one after the other; the result is that of one part.
        vision_weight: weight of visual targets in the loss where text is a target too (0.5 in the paper's
            pretraining, arXiv 2409.18869, 3.2).
        mesh: sizes of the axes data, fsdp, sequence and tensor; -1 is all that is left.
        seed: of random weights and of the pictures' seeds; the data have their own.
        log_every: steps between lines of metrics, which are about their last step.
        checkpoint_every: steps between checkpoints; there is one after the last step as well.
        keep: checkpoints that are kept, the newest.
        evaluation: sources of which every record is evaluated, by the names they get in the metrics.
        evaluate_every: steps between evaluations; there is one at the end as well.
        samples: pictures while training, or None.
        profile: first step and number of steps whose profile is recorded, or None.
    """

    directory: str
    model: ModelConfig
    data: DataConfig
    batch_size: int
    steps: int
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    adapter: Adapter | None = None
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
        check_field(self.optimizer, "warmup_steps", ok, f"less than steps ({self.steps})")
        check_field(self, "adapter", isinstance(self.adapter, Adapter | None), "an Adapter or None")
        ok = self.adapter is None or not self.model.random
        check_field(self, "adapter", ok, "None where the model starts from random weights")
        ok = isinstance(self.evaluation, tuple) and all(
            isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], Source)
            for item in self.evaluation
        )
        check_field(self, "evaluation", ok, "a tuple of (name, Source)")
        check_field(self, "samples", isinstance(self.samples, SampleConfig | None), "a SampleConfig or None")
        ok = self.profile is None or (
            isinstance(self.profile, tuple) and len(self.profile) == 2 and all(is_whole(v, 1) for v in self.profile)
        )
        check_field(self, "profile", ok, "(first step, steps) or None")


def load_config(file: str | os.PathLike, overrides: Sequence[str] = ()) -> Any:
    """Runs a config file and changes fields of what its function `config` returns.

    Args:
        file: Python whose name ends in `.py`; it is run, as any script of the user's. What it prints goes to standard
            error, for standard output is the command's own.
        overrides: "path.to.field=value", see `overrides.override`.

    Raises:
        Emu3Error: no such file, one with another ending, a file that fails in any way, or an override that is not
            legal.
    """
    file = pathlib.Path(file)
    if not file.is_file():
        raise Emu3Error(f"{file}: no such config file; configs/ has examples")
    if file.suffix != ".py":
        raise Emu3Error(f"{file}: a config file is run, so its name must end in .py; see configs/")
    source = read_bytes(file, _MAX_FILE, "give a config file in Python")
    # Not `runpy`: it also runs what is in a zip file, whatever its name, and compiled code.
    module = types.ModuleType("emu3_jax_config_file")
    module.__file__ = str(file)
    with _running(file):
        # Classes that the file declares find their module by its name.
        sys.modules[module.__name__] = module
        try:
            exec(compile(source, str(file), "exec", dont_inherit=True), module.__dict__)
            entry = getattr(module, ENTRY, None)
            if not callable(entry):
                raise Emu3Error(f"defines no function `{ENTRY}` that returns the config; see configs/")
            config = entry()
        finally:
            sys.modules.pop(module.__name__, None)
    return override(config, overrides) if overrides else config


@contextlib.contextmanager
def _running(file: pathlib.Path) -> Iterator[None]:
    """For a block that runs the user's file: whatever it raises, down to `SystemExit`, is one line that names it."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except Emu3Error as error:
        raise Emu3Error(f"{file}: {error}") from error
    except BaseException as error:
        places = traceback.walk_tb(error.__traceback__)
        lines = [line for frame, line in places if frame.f_code.co_filename == str(file)]
        if isinstance(error, SyntaxError) and error.filename == str(file):
            lines.append(error.lineno or 1)
        where = f" line {lines[-1]}" if lines else ""
        try:
            reason = f"{error!s:.200}"
        except Exception:  # a class of the file's own
            reason = ""
        said = type(error).__name__ + (f": {reason}" if reason else "")
        raise Emu3Error(f"{file}{where}: {said}; correct the file") from error

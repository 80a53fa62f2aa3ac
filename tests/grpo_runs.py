"""What the tests of GRPO on pictures and on answers share."""

import dataclasses
import pathlib

from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.preference.grpo import GrpoJob
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.training.config import TrainConfig
from emu3_jax.training.metrics import read_metrics

_TIMES = ("seconds", "pictures_per", "answers_per")


def change(config: TrainConfig, directory: pathlib.Path, grpo: dict | None = None, **fields) -> TrainConfig:
    """A config with another directory, other fields of `grpo` and other fields."""
    settings = dataclasses.replace(config.grpo, **(grpo or {}))
    return dataclasses.replace(config, directory=str(directory), grpo=settings, **fields)


def lines(directory: pathlib.Path, group: str = "train") -> list[dict]:
    """The metrics of a run, without times."""
    found = [line for line in read_metrics(directory) if line["group"] == group]
    return [{name: value for name, value in line.items() if not name.startswith((*_TIMES, "group"))} for line in found]


def job(config: TrainConfig) -> GrpoJob:
    """The job of a config. Call it within `use_mesh`."""
    bundle = Bundle.open(config.model.bundle)
    return GrpoJob(config, bundle, bundle.decoder_config, make_mesh(config.mesh))

"""Config files of training, for commands."""

import pathlib

from emu3_jax.training.config import TrainConfig

_IMPORTS = """from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import Preference, TextToImage
from emu3_jax.models.adapters import Adapter
from emu3_jax.training.config import ModelConfig, OptimizerConfig, SampleConfig, TrainConfig
from emu3_jax.training.preference_config import PreferenceConfig
"""


def write_config(file: pathlib.Path, config: TrainConfig) -> pathlib.Path:
    """Writes a file that holds a config, and returns its path."""
    file.write_text(f"{_IMPORTS}\n\ndef config():\n    return {config!r}\n")
    return file

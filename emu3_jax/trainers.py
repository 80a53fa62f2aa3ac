"""`emu3_jax.train`: trains the decoder, from data or by GRPO, or the vision tokenizer, as a config describes."""

import importlib
from typing import TYPE_CHECKING

from emu3_jax import distributed
from emu3_jax.errors import Emu3Error
from emu3_jax.printable import shown
from emu3_jax.training.config import TrainConfig
from emu3_jax.training.vision_config import VisionTrainConfig

if TYPE_CHECKING:
    from emu3_jax.training.runner import Outcome

_EXTRA = ("array_record", "grain", "optax", "tensorboardX")  # packages of the extra `train`; grain needs the first


def train(
    config: TrainConfig | VisionTrainConfig,
    *,
    adapter_only: bool = False,
    verify: bool = False,
    progress: bool | None = None,
) -> "Outcome":
    """Trains a model to the config's last step, as `emu3-jax train` does.

    A run resumes from the newest checkpoint in `config.directory`. Ctrl-C and SIGTERM end it after the current step,
    with a checkpoint; call `train` again to resume. If environment variables describe several processes, it joins them.

    Args:
        config: what to train, on which data, and where to write.
        adapter_only: whether to export only the trained LoRA adapter, to `DIRECTORY/adapter`, instead of the model.
        verify: whether to check the files of the config's bundle against their checksums first.
        progress: True shows a progress bar on a terminal and lines in a log, None shows only the bar, False nothing.

    Returns:
        An `Outcome`. Its `model` is the directory of the trained bundle or adapter, for `emu3_jax.load`. It is None if
        the run was stopped before its last step; `step` is the last step taken.

    Raises:
        Emu3Error: bad input, a loss that is not finite, files that cannot be written, or the extra `train` is not
            installed. Checkpoints that were written before are kept.
    """
    _require_extra()
    if isinstance(config, TrainConfig):
        from emu3_jax.training.decoder_job import DecoderJob
        from emu3_jax.training.loop import train as train_decoder

        job = DecoderJob
        if config.grpo is not None:
            from emu3_jax.preference.grpo import GrpoJob

            job = GrpoJob
        distributed.start()
        return train_decoder(config, progress, verify=verify, adapter_only=adapter_only, job=job)
    if not isinstance(config, VisionTrainConfig):
        raise Emu3Error(f"config is {shown(config)}: give a TrainConfig or VisionTrainConfig")
    if adapter_only:
        raise Emu3Error("the config trains a vision tokenizer, which has no adapter: leave adapter_only out")
    from emu3_jax.training.vision import train_vision

    distributed.start()
    return train_vision(config, progress, verify=verify)


def _require_extra() -> None:
    from emu3_jax.training.metrics import without_torch

    for name in _EXTRA:
        try:
            with without_torch():
                importlib.import_module(name)
        except ImportError as missing:
            raise Emu3Error(
                f"training needs {name}, which is not installed: pip install 'emu3-jax[train]'"
            ) from missing

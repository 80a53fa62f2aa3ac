"""Train a model, as a config file says: pretrain or fine-tune a decoder, or train a vision tokenizer.

The config names the run's directory; the trained model is DIRECTORY/model. Run the same command again after an
interruption: it resumes from the newest checkpoint.

examples:
  emu3-jax train configs/photos_laptop.py
  emu3-jax train configs/photos_laptop.py --adapter-only --set steps=500
"""

import argparse

from emu3_jax.cli import common


def add_arguments(command: argparse.ArgumentParser) -> None:
    common.add_config(command, "a TrainConfig or VisionTrainConfig", "--set steps=500 --set adapter.rank=16")
    command.add_argument(
        "--adapter-only",
        action="store_true",
        help="write the trained LoRA adapter alone to DIRECTORY/adapter, and no model",
    )
    common.add_verify(command)
    common.add_quiet(command)


def run(options: argparse.Namespace) -> int:
    from emu3_jax import distributed
    from emu3_jax.errors import Emu3Error
    from emu3_jax.printable import printable
    from emu3_jax.trainers import train
    from emu3_jax.training.config import TrainConfig, load_config
    from emu3_jax.training.vision_config import VisionTrainConfig

    config = load_config(options.config, options.set)
    if not isinstance(config, TrainConfig | VisionTrainConfig):
        raise Emu3Error(
            f"{options.config}: config() returns a {type(config).__name__}, training needs a TrainConfig or "
            "VisionTrainConfig"
        )
    if options.adapter_only and isinstance(config, VisionTrainConfig):
        raise Emu3Error(f"{options.config} trains a vision tokenizer, which has no adapter: leave --adapter-only out")
    outcome = train(config, adapter_only=options.adapter_only, verify=options.verify, progress=common.progress(options))
    if distributed.first():
        where = printable(config.directory)
        if outcome.model is None:
            print(f"{where}: stopped after step {outcome.step} of {config.steps}; run the same command again to resume")
        else:
            what = "adapter" if options.adapter_only else "model"
            print(f"{printable(str(outcome.model))}: the {what} after {outcome.step} steps")
        if outcome.skipped:
            print(
                f"{where}: {outcome.skipped} records were longer than {config.data.sequence_length} tokens "
                "and were skipped (counted once per epoch); raise data.sequence_length to train on them"
            )
    if outcome.signal is not None:
        distributed.leave()  # after Ctrl-C the process ends without Python's exit handlers, which would do this
    return 0 if outcome.signal is None else 128 + outcome.signal  # as a shell reports it: 130, 143

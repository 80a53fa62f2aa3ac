"""Measure a model on held-out data.

Prints the figures as JSON. Writes them to DIR/evaluation.json, and a page of pictures to DIR/index.html.

examples:
  emu3-jax evaluate configs/eval_emoji.py -o evaluation
"""

import argparse
import dataclasses

from emu3_jax.cli import common, outputs


def add_arguments(command: argparse.ArgumentParser) -> None:
    common.add_config(command, "an EvaluateConfig", "--set cases=128")
    command.add_argument(
        "-o",
        "--output",
        type=common.place_text,
        metavar="DIR",
        help="directory to write to (default: the config's)",
    )
    outputs.add_no_clobber(command)
    common.add_adapter(command)
    common.add_verify(command)
    common.add_quiet(command)


def run(options: argparse.Namespace) -> int:
    import json

    import emu3_jax
    from emu3_jax import storage
    from emu3_jax.errors import Emu3Error
    from emu3_jax.evaluation import run as evaluation
    from emu3_jax.evaluation.config import EvaluateConfig
    from emu3_jax.evaluation.items import Data
    from emu3_jax.training.config import load_config

    config = load_config(options.config, options.set)
    if not isinstance(config, EvaluateConfig):
        raise Emu3Error(
            f"{options.config}: config() returns a {type(config).__name__}, evaluation needs an EvaluateConfig"
        )
    if options.output is not None:
        config = dataclasses.replace(config, directory=options.output)
    if options.adapter is not None:
        config = dataclasses.replace(config, adapter=options.adapter)
    evaluation.check_directory(config.directory)
    directory = storage.place(config.directory)
    files = [directory / evaluation.FIGURES_FILE, directory / evaluation.PAGE_FILE]
    written = outputs.Outputs(files, no_clobber=options.no_clobber)
    data = Data(config.data if config.needs_data else None)
    model = emu3_jax.load(config.model, adapter=config.adapter, quantize=config.quantize, verify=options.verify)
    figures, page = evaluation.evaluate(model, data, config, common.progress(options))
    written.look()
    evaluation.write(config.directory, figures, page, replace=not options.no_clobber)
    written.report()
    print(json.dumps(figures, indent=2))
    return 0

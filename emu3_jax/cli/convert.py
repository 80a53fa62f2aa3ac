"""Convert PyTorch checkpoints (upstream, transformers 4 or 5 layout), or a training run's last one, to a bundle."""

import argparse
import pathlib

from emu3_jax.cli import common


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "sources", nargs="+", type=common.path_text, metavar="SRC", help="directory, hub id, or a training run"
    )
    command.add_argument("-o", "--output", type=common.path, required=True, metavar="BUNDLE")
    command.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="of the decoder (default: as stored)"
    )
    command.add_argument("--template", choices=("chat", "stage1"), help="chat prompt (default: by the source's name)")
    common.add_quiet(command)


def run(options: argparse.Namespace) -> None:
    from emu3_jax.checkpoints.convert import convert

    first = pathlib.Path(options.sources[0])
    if (first / "run.json").is_file():
        _convert_run(first, options)
        return
    convert(options.sources, options.output, dtype=options.dtype, template=options.template, progress=not options.quiet)
    print(options.output)


def _convert_run(directory: pathlib.Path, options: argparse.Namespace) -> None:
    from emu3_jax.errors import Emu3Error
    from emu3_jax.training.run_directory import read_identity

    if len(options.sources) > 1 or options.template or options.dtype:
        raise Emu3Error(f"{directory} is a training run: convert it alone, without --template and --dtype")
    if "vision" in read_identity(directory):
        from emu3_jax.training.vision_export import export_vision_run as export_run
    else:
        from emu3_jax.training.weights import export_run
    step = export_run(directory, options.output)
    print(f"{options.output}: the model after step {step}")

"""Convert PyTorch checkpoints (upstream, transformers 4 or 5 layout) to a bundle."""

import argparse
import pathlib

from emu3_jax.cli import common


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("sources", nargs="+", metavar="SRC", help="directory or hub id")
    command.add_argument("-o", "--output", type=pathlib.Path, required=True, metavar="BUNDLE")
    command.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="of the decoder (default: as stored)"
    )
    command.add_argument("--template", choices=("chat", "stage1"), help="chat prompt (default: by the source's name)")
    common.add_quiet(command)


def run(options: argparse.Namespace) -> None:
    from emu3_jax.checkpoints.convert import convert

    convert(options.sources, options.output, dtype=options.dtype, template=options.template, progress=not options.quiet)
    print(options.output)

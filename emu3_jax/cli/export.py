"""Export a bundle to PyTorch safetensors, bit for bit what it was converted from.

examples:
  emu3-jax export out/emu3-gen --layout transformers -o out/emu3-gen-hf
"""

import argparse

from emu3_jax.cli import common


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("bundle", type=common.place, metavar="BUNDLE", help="bundle to export")
    command.add_argument("-o", "--output", type=common.place, required=True, metavar="DIR", help="directory to write")
    command.add_argument(
        "--layout",
        choices=("upstream", "transformers"),
        required=True,
        help="upstream: names and files of the published checkpoints, for the reference's code; transformers: for "
        "transformers 5",
    )
    common.add_verify(command)
    common.add_quiet(command)


def run(options: argparse.Namespace) -> None:
    from emu3_jax.checkpoints.bundle import Bundle
    from emu3_jax.checkpoints.export import export

    export(
        Bundle.open(options.bundle, verify=options.verify),
        options.output,
        options.layout,
        progress=common.progress(options),
    )
    print(options.output)

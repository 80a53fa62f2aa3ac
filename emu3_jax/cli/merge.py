"""Merge a LoRA adapter into a bundle's decoder: a new bundle, complete with vision tokenizer and text tokenizer.

The adapter is one that `emu3-jax train --adapter-only` or the PEFT library wrote.
"""

import argparse

from emu3_jax.cli import common


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "bundle", type=common.place, metavar="BUNDLE", help="the bundle that the adapter was trained on"
    )
    command.add_argument("--adapter", type=common.place, required=True, metavar="DIR", help="the adapter's directory")
    command.add_argument("-o", "--output", type=common.place, required=True, metavar="NEW", help="the new bundle")
    command.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of the new decoder (default: that of the training; for adapters by PEFT, the bundle's)",
    )
    common.add_verify(command)
    common.add_quiet(command)


def run(options: argparse.Namespace) -> None:
    from emu3_jax.checkpoints.bundle import Bundle
    from emu3_jax.checkpoints.merged import merge_bundle

    bundle = Bundle.open(options.bundle, verify=options.verify)
    settings = {"verify": options.verify, "progress": common.progress(options)}
    merge_bundle(bundle, options.adapter, options.output, options.dtype, **settings)
    print(options.output)

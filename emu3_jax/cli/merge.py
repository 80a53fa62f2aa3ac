"""Merge a LoRA adapter into a bundle's decoder, and write a new bundle.

`emu3-jax train --adapter-only` and the PEFT library write adapters. The new bundle is complete: it has the vision
tokenizer and the text tokenizer too.

examples:
  emu3-jax merge out/emu3-gen --adapter run/adapter -o merged
"""

import argparse

from emu3_jax.cli import common


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("bundle", type=common.place, metavar="BUNDLE", help="bundle that the adapter was trained on")
    command.add_argument("--adapter", type=common.place, required=True, metavar="DIR", help="directory of the adapter")
    command.add_argument("-o", "--output", type=common.place, required=True, metavar="NEW", help="new bundle to write")
    command.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="dtype of the new decoder (default: as in training; for adapters by PEFT, as in BUNDLE)",
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

"""Quantise a bundle's decoder on disk: a new bundle of half the size, which loads faster and needs no option.

The new bundle generates what the full bundle generates with `--quantize`. Keep the full bundle to train, merge or
export.

examples:
  emu3-jax quantize out/emu3-gen -o out/emu3-gen-int8
"""

import argparse

from emu3_jax.cli import common


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("bundle", type=common.place, metavar="BUNDLE", help="full bundle")
    command.add_argument("-o", "--output", type=common.place, required=True, metavar="NEW", help="new bundle to write")
    common.add_quantize(command, default="int8", stored=True)
    common.add_verify(command)
    common.add_quiet(command)


def run(options: argparse.Namespace) -> None:
    from emu3_jax.checkpoints.bundle import Bundle
    from emu3_jax.checkpoints.quantized import quantize_bundle

    bundle = Bundle.open(options.bundle, verify=options.verify)
    quantize_bundle(bundle, options.output, options.quantize, progress=common.progress(options))
    print(options.output)

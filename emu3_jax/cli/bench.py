"""Measure speed and memory, with random weights or a bundle's. Prints JSON lines.

--compare transformers also runs transformers with the same shapes on the same device.

examples:
  emu3-jax bench decode --preset small
  emu3-jax bench decode --rows 1 8 --compare transformers
"""

import argparse
import contextlib
import math

from emu3_jax.benchmarks import TOKENS_PER_PASS
from emu3_jax.cli import common
from emu3_jax.cli.usage import number
from emu3_jax.media.sizes import MAX_AREA
from emu3_jax.printable import shown

_DECODE = """Time the decode loop: milliseconds per token, and the share of the device's bandwidth.

examples:
  emu3-jax bench decode --preset small
  emu3-jax bench decode --model --whole
"""
_VISION = """Time the vision tokenizer: seconds per picture, encoded and decoded.

examples:
  emu3-jax bench vision --size 512
"""
_TRAIN = """Time the train step: milliseconds per step, tokens per second, MFU and memory.

examples:
  emu3-jax bench train --preset small --tokens 1024
  emu3-jax bench train --rows 2 --remat dots --mesh fsdp=2 --compare transformers
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    kinds = command.add_subparsers(dest="kind", required=True, metavar="KIND", title="what to measure")
    _add_decode(kinds.add_parser("decode", help="the decode loop", description=_DECODE))
    _add_vision(kinds.add_parser("vision", help="the vision tokenizer", description=_VISION))
    _add_train(kinds.add_parser("train", help="the train step", description=_TRAIN))


def _add_decode(command: argparse.ArgumentParser) -> None:
    _add_preset(command, ("8b", "emu35-34b", "small"))
    _add_model(command)
    common.add_dtype(command)
    common.add_quantize(command)
    command.add_argument(
        "--kernels",
        choices=("auto", "xla", "pallas", "pallas-hopper", "pallas-tpu"),
        default="auto",
        help="how attention is computed (default: %(default)s)",
    )
    command.add_argument(
        "--rows",
        type=common.whole(1, 4096),
        nargs="+",
        default=[1],
        metavar="N",
        help="pictures at once, one or more numbers (default: 1)",
    )
    command.add_argument(
        "--area",
        type=common.whole(1, MAX_AREA),
        metavar="N",
        help="pixels of the picture (default: what the model was trained for)",
    )
    command.add_argument(
        "--parallel",
        type=common.parallel,
        nargs="+",
        default=["off"],
        metavar="W",
        help="tokens of a pass per picture (2 to 128), off or auto; one or more (default: off)",
    )
    command.add_argument(
        "--tokens-per-pass",
        type=_rate,
        nargs="+",
        default=TOKENS_PER_PASS,
        metavar="N",
        help="with --parallel, say how long a picture takes if a pass settles this many tokens on average; passes of a "
        "preset settle the first of these numbers (default: 2.5 3.2, estimates for 8 B)",
    )
    _add_steps(command, 256, "steps timed per cache length")
    command.add_argument(
        "--whole", action="store_true", help="also time one whole picture to its pixels, and print its peak memory"
    )
    command.add_argument(
        "--logits", action="store_true", help="also say how much --quantize changes the logits of random weights"
    )
    command.add_argument(
        "--automaton",
        action="store_true",
        help="also time the loop of interleave within pictures, whose head computes all ids, and its automaton alone",
    )
    command.add_argument(
        "--mesh",
        metavar="AXIS=N[,...]",
        help="spread a preset over several devices, for example tensor=2 (default: one device)",
    )
    command.add_argument("--profile", action="store_true", help="also list the GPU kernels of a step by their time")
    _add_compare(command)


def _rate(text: str) -> float:
    """The type of `--tokens-per-pass`."""
    with contextlib.suppress(argparse.ArgumentTypeError):
        found = number(text)
        if 1 <= found <= 128:
            return found
    raise argparse.ArgumentTypeError(f"{shown(text)} is not a number from 1 to 128")


def _add_vision(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--size",
        type=common.whole(1, math.isqrt(MAX_AREA)),
        default=256,
        metavar="PIXELS",
        help="height and width of the picture (default: %(default)s)",
    )
    _add_preset(command, ("270m", "455m", "small"))
    _add_model(command)
    command.add_argument("--fast", action="store_true", help="also decode at the device's default precision")
    command.add_argument(
        "--repeat",
        type=common.whole(1, 10_000),
        default=5,
        metavar="N",
        help="timed runs, of which the shortest counts (default: %(default)s)",
    )
    _add_compare(command)


def _add_train(command: argparse.ArgumentParser) -> None:
    _add_preset(command, ("8b", "small"))
    command.add_argument(
        "--layers", type=common.whole(1, 1024), metavar="N", help="layers of the decoder (default: all of the preset)"
    )
    command.add_argument(
        "--tokens",
        type=common.whole(1, 2**20),
        default=10240,
        metavar="N",
        help="tokens per row (default: %(default)s)",
    )
    command.add_argument(
        "--rows", type=common.whole(1, 4096), default=1, metavar="N", help="rows per step (default: %(default)s)"
    )
    command.add_argument(
        "--remat",
        choices=("full", "dots", "none"),
        default="full",
        help="what the backward pass computes again instead of keeping it (default: %(default)s)",
    )
    command.add_argument(
        "--unroll",
        type=common.whole(1, 1024),
        default=1,
        metavar="N",
        help="layers that one iteration of the loop over layers computes (default: %(default)s)",
    )
    command.add_argument(
        "--attention",
        choices=("auto", "cudnn", "splash", "xla"),
        default="auto",
        help="how attention is computed (default: %(default)s)",
    )
    command.add_argument(
        "--adapter",
        type=common.whole(0, 4096),
        default=0,
        metavar="RANK",
        help="train LoRA adapters of this rank; 0 trains all weights (default: %(default)s)",
    )
    command.add_argument(
        "--base",
        choices=("float32", "bfloat16", "int8", "nf4"),
        default="bfloat16",
        help="how the frozen weights are kept under --adapter (default: %(default)s)",
    )
    command.add_argument(
        "--preference",
        choices=("stored", "adapters_off"),
        help="train by DPO with this reference, two rows a pair (default: next-token cross-entropy)",
    )
    command.add_argument(
        "--mesh", default="fsdp=-1", metavar="AXIS=N[,...]", help="how devices are used (default: %(default)s)"
    )
    _add_steps(command, 5, "timed steps")
    _add_compare(command, "on the same device, or by FSDP2 on as many as --mesh says (not -1)")
    command.add_argument("--profile", action="store_true", help="also list the GPU kernels of two steps by their time")
    command.add_argument(
        "--compile",
        dest="compiled",
        action="store_true",
        help="with --compare, also run transformers with its layers under torch.compile",
    )


def _add_preset(command: argparse.ArgumentParser, presets: tuple[str, ...]) -> None:
    command.add_argument(
        "--preset", choices=presets, default=presets[0], help="shapes of the random weights (default: %(default)s)"
    )


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model",
        nargs="?",
        const="embedded",
        type=common.place_text,
        metavar="BUNDLE",
        help="measure this bundle instead of a preset; without a name, the small embedded model",
    )


def _add_steps(command: argparse.ArgumentParser, default: int, text: str) -> None:
    command.add_argument(
        "--steps", type=common.whole(1, 100_000), default=default, metavar="N", help=f"{text} (default: %(default)s)"
    )


def _add_compare(command: argparse.ArgumentParser, where: str = "on the same device") -> None:
    command.add_argument(
        "--compare", choices=("transformers",), help=f"also run transformers with the same shapes {where}"
    )


def run(options: argparse.Namespace) -> None:
    import importlib
    import json

    arguments = {k: v for k, v in vars(options).items() if k not in ("command", "kind", "run")}
    for figures in importlib.import_module(f"emu3_jax.benchmarks.{options.kind}").run(**arguments):
        print(json.dumps(figures), flush=True)

"""Measure: figures as JSON lines, both sides of a comparison in one run."""

import argparse
import math

from emu3_jax.cli import common
from emu3_jax.media.sizes import MAX_AREA


def add_arguments(command: argparse.ArgumentParser) -> None:
    kinds = command.add_subparsers(dest="kind", required=True, metavar="{decode,vision,train}")
    decode = kinds.add_parser("decode", help="the decode loop, random weights: ms per token, share of bandwidth")
    decode.add_argument("--preset", choices=("8b", "small"), default="8b", help="decoder shapes (default: %(default)s)")
    decode.add_argument(
        "--model",
        nargs="?",
        const="embedded",
        type=common.place_text,
        metavar="BUNDLE",
        help="a bundle, or without a name the embedded model, in place of a preset",
    )
    common.add_quantize(decode)
    decode.add_argument(
        "--kernels",
        choices=("auto", "xla", "pallas"),
        default="auto",
        help="of attention (default: %(default)s)",
    )
    decode.add_argument(
        "--rows", type=common.whole(1, 4096), nargs="+", default=[1], help="pictures at once (default: 1)"
    )
    decode.add_argument(
        "--area", type=common.whole(1, MAX_AREA), help="pixels of the picture (default: as many as the model draws)"
    )
    decode.add_argument(
        "--steps",
        type=common.whole(1, 100_000),
        default=256,
        help="steps timed per cache length (default: %(default)s)",
    )
    decode.add_argument("--whole", action="store_true", help="also time one whole picture; of a bundle, to its pixels")
    decode.add_argument(
        "--logits", action="store_true", help="also how far --quantize moves the logits of a preset's random weights"
    )
    decode.add_argument("--mesh", metavar="AXIS=N[,...]", help="spread a preset over devices, for example tensor=2")
    decode.add_argument("--profile", action="store_true", help="also the GPU kernels of a step, by their time")
    decode.add_argument("--compare", choices=("transformers",), help="also run this peer, same shapes, same device")
    vision = kinds.add_parser("vision", help="the vision tokenizer with random weights: seconds per picture")
    vision.add_argument(
        "--size",
        type=common.whole(1, math.isqrt(MAX_AREA)),
        default=256,
        help="picture's height and width (default: %(default)s)",
    )
    vision.add_argument("--preset", choices=("270m", "small"), default="270m", help="shapes (default: %(default)s)")
    vision.add_argument(
        "--model",
        nargs="?",
        const="embedded",
        type=common.place_text,
        metavar="BUNDLE",
        help="a bundle, or without a name the embedded model, in place of a preset",
    )
    vision.add_argument("--fast", action="store_true", help="also decoding at the device's default precision")
    vision.add_argument(
        "--repeat",
        type=common.whole(1, 10_000),
        default=5,
        help="timed runs; the shortest counts (default: %(default)s)",
    )
    vision.add_argument("--compare", choices=("transformers",), help="also run this peer, same shapes, same device")
    train = kinds.add_parser("train", help="the train step, random weights: ms per step, tokens/s, MFU, memory")
    train.add_argument("--preset", choices=("8b", "small"), default="8b", help="decoder shapes (default: %(default)s)")
    train.add_argument("--layers", type=common.whole(1, 1024), help="fewer layers than the preset has")
    train.add_argument("--tokens", type=common.whole(1, 2**20), default=10240, help="of a row (default: %(default)s)")
    train.add_argument("--rows", type=common.whole(1, 4096), default=1, help="of a step (default: %(default)s)")
    train.add_argument("--remat", choices=("full", "dots", "none"), default="full", help="default: %(default)s")
    train.add_argument("--attention", choices=("auto", "cudnn", "splash", "xla"), default="auto", help="default: auto")
    train.add_argument(
        "--adapter", type=common.whole(0, 4096), default=0, metavar="RANK", help="train adapters of this rank (LoRA)"
    )
    train.add_argument("--base", choices=("float32", "bfloat16", "int8", "nf4"), default="bfloat16", help="with those")
    train.add_argument("--mesh", default="fsdp=-1", metavar="AXIS=N[,...]", help="default: %(default)s")
    train.add_argument("--steps", type=common.whole(1, 100_000), default=5, help="timed steps (default: %(default)s)")
    train.add_argument("--compare", choices=("transformers",), help="also run this peer, same shapes, same device")
    train.add_argument("--profile", action="store_true", help="also the GPU kernels of two more steps, by their time")
    train.add_argument(
        "--compile", dest="compiled", action="store_true", help="also the peer with its layers under torch.compile"
    )


def run(options: argparse.Namespace) -> None:
    import importlib
    import json

    arguments = {k: v for k, v in vars(options).items() if k not in ("command", "kind", "run")}
    for figures in importlib.import_module(f"emu3_jax.benchmarks.{options.kind}").run(**arguments):
        print(json.dumps(figures), flush=True)

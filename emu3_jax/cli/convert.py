"""Convert PyTorch checkpoints to a bundle.

SRC is the directory of a checkpoint, its id on the Hugging Face hub, or the directory of a training run, whose newest
checkpoint is taken. Layouts of the reference and of transformers 4 and 5 are recognised. Give a decoder and a vision
tokenizer together, and the bundle has both.

examples:
  emu3-jax convert BAAI/Emu3-Gen BAAI/Emu3-VisionTokenizer -o out/emu3-gen
  emu3-jax convert BAAI/Emu3-Gen BAAI/Emu3-VisionTokenizer --quantize int8 -o out/emu3-gen-int8
  emu3-jax convert run -o tuned
"""

import argparse
import pathlib

from emu3_jax import storage
from emu3_jax.cli import common


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "sources",
        nargs="+",
        type=common.place_text,
        metavar="SRC",
        help="checkpoint's directory or hub id, or a training run",
    )
    command.add_argument("-o", "--output", type=common.place, required=True, metavar="BUNDLE", help="bundle to write")
    command.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="dtype of the decoder, or of the weights that --quantize leaves as they are (default: as stored)",
    )
    common.add_quantize(command, stored=True)
    command.add_argument(
        "--template", choices=("chat", "stage1"), help="prompt template of the decoder (default: by the name of SRC)"
    )
    command.add_argument(
        "--adapter-only",
        action="store_true",
        help="of a training run, write the LoRA adapter alone, in the format of the PEFT library",
    )
    common.add_quiet(command)


def run(options: argparse.Namespace) -> None:
    from emu3_jax.checkpoints.convert import convert
    from emu3_jax.errors import Emu3Error

    first = storage.place(options.sources[0])
    if storage.is_file(first / "run.json"):
        _convert_run(first, options)
        return
    if options.adapter_only:
        raise Emu3Error(f"{first} is not a training run: --adapter-only needs one; give one, or leave the option out")
    convert(
        options.sources,
        options.output,
        dtype=options.dtype,
        template=options.template,
        quantize=options.quantize,
        progress=common.progress(options),
    )
    print(options.output)


def _convert_run(directory: pathlib.Path, options: argparse.Namespace) -> None:
    from emu3_jax.errors import Emu3Error
    from emu3_jax.training.run_directory import read_identity

    if len(options.sources) > 1 or options.template or options.dtype:
        raise Emu3Error(f"{directory} is a training run: convert it alone, without --template and --dtype")
    if options.quantize:
        raise Emu3Error(
            f"{directory} is a training run: convert it without --quantize, and then run `emu3-jax quantize BUNDLE`"
        )
    if options.adapter_only:
        from emu3_jax.training.weights import export_adapter as export_run
    elif "vision" in read_identity(directory):
        from emu3_jax.training.vision_export import export_vision_run as export_run
    else:
        from emu3_jax.training.weights import export_run
    step = export_run(directory, options.output)
    print(f"{options.output}: the {'adapter' if options.adapter_only else 'model'} after step {step}")

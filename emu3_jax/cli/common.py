"""Arguments that several commands share."""

import argparse
import pathlib
import sys
from collections.abc import Callable, Iterator

from emu3_jax import storage
from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import local_path
from emu3_jax.generation import defaults
from emu3_jax.printable import shown


def path(text: str) -> pathlib.Path:
    """The type of arguments that are local files or directories."""
    try:
        return local_path(text)
    except Emu3Error as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def path_text(text: str) -> str:
    """The type of arguments that are local files or directories and stay as they were typed."""
    path(text)
    return text


def place(text: str) -> pathlib.Path:
    """The type of arguments that are files or directories, perhaps in a bucket."""
    try:
        return storage.place(text)
    except Emu3Error as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def place_text(text: str) -> str:
    """The type of arguments that are directories, perhaps in a bucket, and stay as they were typed."""
    place(text)
    return text


def whole(least: int, most: int) -> Callable[[str], int]:
    """The type of arguments that are whole numbers from `least` to `most`."""

    def parse(text: str) -> int:
        number = int(text) if len(text) < 20 else most + 1  # Python takes long for long ones
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number from {least} to {most}")
        return number

    parse.__name__ = "whole number"
    return parse


def add_model(command: argparse.ArgumentParser) -> None:
    """`--model`, `--vision`, `--verify`, `--dtype`, `--quantize`, `--mesh`, `--quiet`."""
    command.add_argument(
        "--model", type=place_text, metavar="BUNDLE", help="bundle to use (default: the embedded model)"
    )
    command.add_argument(
        "--vision", type=place_text, metavar="BUNDLE", help="take the vision tokenizer from this bundle"
    )
    add_verify(command)
    add_dtype(command)
    add_quantize(command)
    command.add_argument("--mesh", metavar="AXIS=N[,...]", help="spread the model over devices, for example tensor=4")
    add_quiet(command)


def add_adapter(command: argparse.ArgumentParser) -> None:
    """`--adapter`, beside `--model`."""
    command.add_argument(
        "--adapter",
        type=place_text,
        metavar="DIR",
        help="merge this LoRA adapter into the model, from `train --adapter-only` or PEFT",
    )


def add_verify(command: argparse.ArgumentParser) -> None:
    """`--verify`."""
    command.add_argument(
        "--verify",
        action="store_true",
        help="first compare the files of the model with their checksums, as doctor does",
    )


def add_dtype(command: argparse.ArgumentParser) -> None:
    """`--dtype`."""
    command.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="the decoder's dtype (default: the bundle's)"
    )


def add_quantize(command: argparse.ArgumentParser, default: str | None = None, *, stored: bool = False) -> None:
    """`--quantize`. `stored`: of a bundle that is written."""
    if stored:
        text = "how the decoder is stored: int8 (8-bit weights and KV cache), int8-weights (weights alone), fp8"
        text += f" (default: {default or 'in full'})"
    else:
        text = "narrow weights and KV cache: half the memory, other results (default: as the bundle is stored)"
    command.add_argument("--quantize", choices=("int8", "int8-weights", "fp8"), default=default, help=text)


def add_fast_pixels(command: argparse.ArgumentParser) -> None:
    """`--fast-pixels`."""
    command.add_argument("--fast-pixels", action="store_true", help="decode pixels at the device's default precision")


def add_clip_format(command: argparse.ArgumentParser, name: str) -> None:
    """An option `name` with the endings that `save_clip` writes."""
    formats = ("webp", "png", "gif", "mp4", "webm")
    command.add_argument(name, choices=formats, default="webp", help="of clips (default: %(default)s)")


def add_independent(command: argparse.ArgumentParser) -> None:
    """`--independent`."""
    command.add_argument(
        "--independent",
        action="store_true",
        help="clips in pieces of 4 frames that know nothing of each other, as upstream's script cuts them",
    )


def add_resampling(command: argparse.ArgumentParser) -> None:
    """`--fps` and `--frames` of clips that are read."""
    command.add_argument(
        "--fps",
        type=float,
        metavar="F",
        help="of clips, take F frames a second (default: as they are); not of pictures",
    )
    command.add_argument(
        "--frames", type=int, metavar="N", help="take N frames spread over each clip; with --fps, the first N at most"
    )


def add_tile(command: argparse.ArgumentParser) -> None:
    """`--tile`."""
    command.add_argument(
        "--tile",
        type=int,
        metavar="PIXELS",
        help="large frames in overlapping tiles of this side, for less memory: an approximation, with other results",
    )


def add_quiet(command: argparse.ArgumentParser) -> None:
    """`--quiet`."""
    command.add_argument("--quiet", action="store_true", help="show no progress: neither a bar nor lines")


def add_set(command: argparse.ArgumentParser) -> None:
    """`--set`."""
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change a field of the config: --set steps=500 --set adapter.rank=16 (any number, in any order)",
    )


def add_generation(command: argparse.ArgumentParser) -> None:
    """What is generated beside the prompts, and how tokens are sampled."""
    command.add_argument("--area", type=int, help="pixels (default: what the model was trained for)")
    command.add_argument("--negative", nargs="+", default=[""], metavar="TEXT", help="what to avoid, or one each")
    command.add_argument(
        "--guidance",
        type=float,
        nargs="+",
        default=[defaults.GUIDANCE],
        help=f"scale, or one each (default: {defaults.GUIDANCE})",
    )
    add_sampling(command, temperature=defaults.TEMPERATURE)


def add_sampling(command: argparse.ArgumentParser, temperature: float) -> None:
    """How tokens are sampled."""
    command.add_argument("--temperature", type=float, default=temperature, help="0 is greedy (default: %(default)s)")
    command.add_argument("--top-k", type=int, default=defaults.TOP_K, help="candidates kept (default: %(default)s)")
    command.add_argument(
        "--top-p", type=float, default=defaults.TOP_P, help="probability mass kept (default: %(default)s)"
    )
    command.add_argument(
        "--seed",
        type=int,
        default=defaults.SEED,
        help="seed of the first row; each next row adds 1 (default: %(default)s)",
    )
    command.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    command.add_argument(
        "--batch-size", type=int, default=defaults.BATCH_SIZE, help="rows computed at once (default: %(default)s)"
    )
    command.add_argument(
        "--deterministic",
        action="store_true",
        help="the same result for a row beside any other rows, in bfloat16 too: batches are filled up to --batch-size",
    )
    command.add_argument("--allow-special", action="store_true", help="let control tokens in prompts act as such")


def one_or_each(values: list):
    """The value for all rows where there is one, else one for each."""
    return values[0] if len(values) == 1 else values


def generation(options: argparse.Namespace) -> dict:
    """What the options of `add_generation` say, as keyword arguments of `generate_sequences` and `generate_clips`."""
    same = ("area", "temperature", "top_k", "top_p", "seed", "greedy", "allow_special", "batch_size", "deterministic")
    each = {name: one_or_each(getattr(options, name)) for name in ("negative", "guidance")}
    return {**{name: getattr(options, name) for name in same}, **each}


def load_model(options: argparse.Namespace):
    """The model that the options name."""
    import emu3_jax

    return emu3_jax.load(
        options.model,
        adapter=getattr(options, "adapter", None),  # of the commands that use the decoder
        vision=options.vision,
        dtype=options.dtype,
        mesh=options.mesh,
        quantize=options.quantize,
        fast_pixels=getattr(options, "fast_pixels", False),  # of the commands that generate
        verify=options.verify,
    )


def progress(options: argparse.Namespace) -> bool | None:
    """False shows nothing; None shows what `progress.by_default` says: a bar on a terminal, lines in a log."""
    return False if options.quiet else None


def lines(mark: str) -> Iterator[str]:
    """Lines of standard input that say something; on a terminal, `mark` asks for each."""
    while True:
        if sys.stdin.isatty():
            print(mark, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()

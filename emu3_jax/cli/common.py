"""Arguments of the command line that several commands share."""

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Callable, Iterator

from emu3_jax import storage
from emu3_jax.cli.usage import whole_number
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
    """The type of arguments that are local files or directories. The value stays a text, as it was typed."""
    path(text)
    return text


def place(text: str) -> pathlib.Path:
    """The type of arguments that are files or directories, local or in a bucket."""
    try:
        return storage.place(text)
    except Emu3Error as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def place_text(text: str) -> str:
    """The type of arguments that are directories, local or in a bucket. The value stays a text, as it was typed."""
    place(text)
    return text


def text(value: str) -> str:
    """The type of arguments that are texts. A terminal in another encoding than UTF-8 gives half characters."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"{shown(value)} is not UTF-8: give the text in UTF-8") from error
    return value


def whole(least: int, most: int) -> Callable[[str], int]:
    """The type of arguments that are whole numbers from `least` to `most`."""

    def parse(text: str) -> int:
        with contextlib.suppress(argparse.ArgumentTypeError):
            found = whole_number(text)
            if least <= found <= most:
                return found
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number from {least} to {most}")

    return parse


def parallel(text: str) -> int | str:
    """The type of `--parallel`: auto, off, or a number of tokens."""
    if text in ("auto", "off"):
        return text
    try:
        return whole(2, defaults.MOST_PARALLEL)(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not {defaults.LEGAL_PARALLEL}") from None


def ahead(text: str) -> int:
    """The type of `--zipar`."""
    try:
        return whole(1, defaults.MOST_ZIPAR)(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not {defaults.LEGAL_ZIPAR}") from None


def section(command: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """The options that --help shows under a title of their own."""
    for group in command._action_groups:
        if group.title == title:
            return group
    return command.add_argument_group(title)


def add_vision_model(command: argparse.ArgumentParser) -> None:
    """`--model`, `--vision`, `--verify` and `--quiet`: commands that use no decoder need no more."""
    group = section(command, "model")
    group.add_argument(
        "--model", type=place_text, metavar="BUNDLE", help="bundle to use (default: the small embedded model)"
    )
    group.add_argument(
        "--vision",
        type=place_text,
        metavar="BUNDLE",
        help="take the vision tokenizer from this bundle (default: from that of --model)",
    )
    add_verify(group)
    add_quiet(command)


def add_model(command: argparse.ArgumentParser) -> None:
    """The options of `add_vision_model`, and `--dtype`, `--quantize` and `--mesh`."""
    add_vision_model(command)
    group = section(command, "model")
    add_dtype(group)
    add_quantize(group)
    group.add_argument(
        "--mesh",
        metavar="AXIS=N[,...]",
        help="spread the model over several devices, for example tensor=4 (default: one device)",
    )


def add_showing(command: argparse.ArgumentParser) -> None:
    """`--clips-as`, `--frames` and `--fps`: how a clip is shown in a prompt."""
    command.add_argument(
        "--clips-as",
        choices=("auto", "clip", "images"),
        default="auto",
        help="show a clip as a clip, or its frames as pictures (default: as the model was trained)",
    )
    command.add_argument(
        "--frames",
        type=int,
        metavar="N",
        help="frames to show per clip (default: the training length, or 8 when shown as pictures)",
    )
    command.add_argument(
        "--fps",
        type=float,
        metavar="X",
        help="frames per second to show of a clip (default: spread --frames over all of it)",
    )


def add_adapter(command: argparse.ArgumentParser) -> None:
    """`--adapter`, beside `--model`."""
    section(command, "model").add_argument(
        "--adapter",
        type=place_text,
        metavar="DIR",
        help="merge this LoRA adapter into the model; `train --adapter-only` and the PEFT library write adapters",
    )


def add_verify(command: argparse._ActionsContainer) -> None:
    """`--verify`."""
    command.add_argument(
        "--verify", action="store_true", help="first compare the model's files with their checksums, as doctor does"
    )


def add_dtype(command: argparse._ActionsContainer) -> None:
    """`--dtype`."""
    command.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="dtype of the decoder's weights and computation (default: as the bundle stores them)",
    )


def add_quantize(command: argparse._ActionsContainer, default: str | None = None, *, stored: bool = False) -> None:
    """`--quantize`. `stored`: of a bundle that is written."""
    if stored:
        text = "how to store the decoder: int8 (8-bit weights and KV cache), int8-weights (weights alone), or fp8 "
        text += f"(8-bit floats, int8 KV cache) (default: {default or 'in full'})"
    else:
        text = "keep the decoder's weights, and the KV cache, in 8 bits: half the memory, results change "
        text += "(default: as the bundle stores them)"
    command.add_argument("--quantize", choices=("int8", "int8-weights", "fp8"), default=default, help=text)


def add_fast_pixels(command: argparse.ArgumentParser) -> None:
    """`--fast-pixels`."""
    section(command, "model").add_argument(
        "--fast-pixels",
        action="store_true",
        help="decode pixels at the device's default precision: faster, pixels change a little, tokens do not",
    )


def add_clip_format(command: argparse.ArgumentParser, name: str) -> None:
    """An option `name` with the endings that `save_clip` writes."""
    formats = ("webp", "png", "gif", "mp4", "webm")
    command.add_argument(
        name,
        choices=formats,
        default="webp",
        help="format of clips; webp and png are lossless, mp4 and webm need the extra video (default: %(default)s)",
    )


def add_independent(command: argparse.ArgumentParser, text: str) -> None:
    """`--independent`; `text` is its help."""
    command.add_argument("--independent", action="store_true", help=text)


def add_resampling(command: argparse.ArgumentParser) -> None:
    """`--fps` and `--frames` for reading clips."""
    command.add_argument(
        "--fps",
        type=float,
        metavar="X",
        help="resample clips to X frames per second (default: keep their rate); pictures stay as they are",
    )
    command.add_argument(
        "--frames",
        type=int,
        metavar="N",
        help="take N frames spread over each clip; with --fps, at most the first N (default: all)",
    )


def add_tile(command: argparse.ArgumentParser, verb: str) -> None:
    """`--tile`; `verb` is "encode" or "decode"."""
    command.add_argument(
        "--tile",
        type=int,
        metavar="PIXELS",
        help=f"{verb} frames with longer sides in overlapping tiles of this side: less memory, other results",
    )


def add_quiet(command: argparse.ArgumentParser) -> None:
    """`--quiet`."""
    command.add_argument("--quiet", action="store_true", help="show no progress")


def add_config(command: argparse.ArgumentParser, kind: str, example: str, *, optional: bool = False) -> None:
    """`CONFIG.py` and `--set`; `kind` is what its `config()` returns, and `example` is words with `--set`."""
    command.add_argument(
        "config",
        nargs="?" if optional else None,
        type=path,
        metavar="CONFIG.py",
        help=f"Python file whose function config() returns {kind}; the repository's folder configs/ has examples",
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help=f"change a field of the config, for example {example}; may be repeated",
    )


def add_generation(command: argparse.ArgumentParser, what: str) -> None:
    """What is generated beside the prompts, and how tokens are sampled; `what` is "picture" or "clip"."""
    command.add_argument(
        "--area", type=int, metavar="N", help=f"pixels of a {what} (default: what the model was trained for)"
    )
    group = section(command, "sampling")
    group.add_argument(
        "--negative",
        nargs="+",
        type=text,
        default=[""],
        metavar="TEXT",
        help="what to avoid, one for all prompts or one per prompt (default: nothing)",
    )
    group.add_argument(
        "--guidance",
        type=float,
        nargs="+",
        default=[defaults.GUIDANCE],
        metavar="X",
        help="guidance scale, one for all prompts or one per prompt: larger follows the prompt more closely, 1 is none "
        f"and takes half the work (default: {defaults.GUIDANCE})",
    )
    add_sampling(command, what, temperature=defaults.TEMPERATURE)
    section(command, "sampling").add_argument(
        "--zipar",
        type=ahead,
        metavar="S",
        help=f"compute rows of the {what} together, each S tokens behind the one above it: fewer passes, but another "
        f"{what}, and with a small S a rough preview; not with --parallel W (default: exact)",
    )


def add_sampling(command: argparse.ArgumentParser, what: str, temperature: float) -> None:
    """How tokens are sampled; `what` is "picture", "clip" or "answer"."""
    group = section(command, "sampling")
    group.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        metavar="X",
        help="larger is more random, 0 always takes the likeliest token (default: %(default)s)",
    )
    group.add_argument(
        "--top-k",
        type=int,
        default=defaults.TOP_K,
        metavar="N",
        help="sample among the N likeliest tokens (default: %(default)s)",
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=defaults.TOP_P,
        metavar="X",
        help="sample among the likeliest tokens whose probabilities add up to X (default: %(default)s)",
    )
    group.add_argument("--greedy", action="store_true", help="the same as --temperature 0")
    group.add_argument(
        "--seed",
        type=int,
        default=defaults.SEED,
        metavar="N",
        help=f"seed of the first {what}; each next one adds 1 (default: %(default)s)",
    )
    group.add_argument(
        "--batch-size",
        type=int,
        default=defaults.BATCH_SIZE,
        metavar="N",
        help=f"{what}s computed at once; more take more memory (default: %(default)s)",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help=f"make each {what} independent of the others of its batch, in bfloat16 too: batches are filled up, which "
        "takes time",
    )
    group.add_argument(
        "--parallel",
        type=parallel,
        default=defaults.PARALLEL,
        metavar="W",
        help="tokens that a pass of the decoder checks at once (2 to 128), or off; auto chooses for pictures and clips "
        "on NVIDIA GPUs from Ampere on, is 8 for one picture or clip of a small model on CPUs, and off elsewhere; in "
        "float32 the result stays the same, up to rounding (default: %(default)s)",
    )
    group.add_argument(
        "--allow-special",
        action="store_true",
        help="let control tokens in prompts act as such (default: refuse such prompts)",
    )


def one_or_each(values: list):
    """The only value, which then counts for all rows, or the list with one value per row."""
    return values[0] if len(values) == 1 else values


def generation(options: argparse.Namespace) -> dict:
    """The options of `add_generation`, as keyword arguments of `generate_sequences` and `generate_clips`.

    Raises:
        Emu3Error: --zipar and --parallel W do not go together.
    """
    from emu3_jax.generation.zipar import check_zipar

    check_zipar(options.zipar, options.parallel)
    same = (
        "area",
        "temperature",
        "top_k",
        "top_p",
        "seed",
        "greedy",
        "allow_special",
        "batch_size",
        "deterministic",
        "parallel",
        "zipar",
    )
    each = {name: one_or_each(getattr(options, name)) for name in ("negative", "guidance")}
    return {**{name: getattr(options, name) for name in same}, **each}


def load_model(options: argparse.Namespace):
    """Loads the model that the options name."""
    import emu3_jax

    return emu3_jax.load(
        options.model,
        adapter=getattr(options, "adapter", None),  # only commands that use the decoder have it
        vision=options.vision,
        dtype=getattr(options, "dtype", None),
        mesh=getattr(options, "mesh", None),
        quantize=getattr(options, "quantize", None),
        fast_pixels=getattr(options, "fast_pixels", False),  # only commands that generate have it
        verify=options.verify,
    )


def progress(options: argparse.Namespace) -> bool | None:
    """False shows nothing; None shows what `progress.by_default` says: a bar on a terminal, lines in a log."""
    return False if options.quiet else None


def lines(mark: str) -> Iterator[str]:
    """Yields the lines of standard input that are not blank. On a terminal, prints the prompt `mark` before each."""
    while True:
        if sys.stdin.isatty():
            print(mark, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()

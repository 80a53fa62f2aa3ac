"""Generate pictures from prompts: DIR/000.png and so on.

The small embedded model knows prompts such as "a cat", "flag of Japan", "clipart of a house", "noto emoji of pizza" (or
3d, flat, twemoji, vintage), "a large blue star on a white background" and "a blue star above a red heart on a white
background". It was trained on no photographs.

With -n N, the first N pictures show the first prompt, the next N the second one. The first picture has the seed --seed,
and each next one adds 1. To make one picture again, pass its seed: --seed plus its number.

examples:
  emu3-jax generate "a cat" "a large blue star on a white background" -o out
  emu3-jax generate "twemoji emoji of strawberry" -n 4 --seed 7 --guidance 5 -o strawberries
  emu3-jax generate --prompts-file prompts.txt --format webp --json -o out
"""

import argparse
import contextlib
import typing

from emu3_jax.cli import common, outputs
from emu3_jax.generation import defaults

FORMATS = ("png", "jpg", "webp")  # `media.picture_files.PICTURE_FORMATS`, which would load Pillow
_NUMBERS = {
    "seed": int,
    "top_k": int,
    "guidance": float,
    "temperature": float,
    "top_p": float,
    "passes": int,
    "zipar": int,
}


def add_arguments(command: argparse.ArgumentParser) -> None:
    prompts = command.add_mutually_exclusive_group(required=True)
    prompts.add_argument(
        "prompts", nargs="*", type=common.text, default=[], metavar="PROMPT", help="what to show, in one argument"
    )
    prompts.add_argument(
        "--prompts-file",
        type=common.path,
        metavar="FILE",
        help="read prompts from this file, one a line (UTF-8, blank lines are skipped); - reads standard input",
    )
    command.add_argument(
        "-o", "--output", type=common.place, required=True, metavar="DIR", help="directory to write to"
    )
    command.add_argument(
        "-n",
        type=common.whole(1, 100_000),
        default=1,
        metavar="N",
        help="pictures per prompt, with different seeds (default: %(default)s)",
    )
    command.add_argument(
        "--format",
        choices=FORMATS,
        default="png",
        help="png and webp are lossless, jpg has quality 95; each file says how its picture was made: png in text "
        "fields, jpg and webp as JSON in the EXIF comment (default: %(default)s)",
    )
    command.add_argument(
        "--ratio",
        nargs="+",
        default=["1:1"],
        metavar="W:H",
        help="width:height, one for all prompts or one per prompt (default: 1:1)",
    )
    common.add_generation(command, "picture")
    command.add_argument(
        "--save-tokens", action="store_true", help="also write DIR/tokens.npz: the ids of picture i under the name i"
    )
    command.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object per picture, in place of its file name: file, replaced, prompt, seed, ratio, size, "
        "guidance and so on",
    )
    outputs.add_no_clobber(command)
    common.add_model(command)
    common.add_adapter(command)
    common.add_fast_pixels(command)


def run(options: argparse.Namespace) -> None:
    from emu3_jax import distributed
    from emu3_jax.cli.output import json_line
    from emu3_jax.errors import Emu3Error
    from emu3_jax.files import files_into
    from emu3_jax.media.codes import save_codes
    from emu3_jax.media.picture_files import check_about, save_picture
    from emu3_jax.text.prompt_files import read_prompts

    source = None if options.prompts else read_prompts(options.prompts_file)
    prompts = options.prompts if source is None else source.prompts
    count = options.n * len(prompts)
    if count > defaults.MAX_PICTURES:
        raise Emu3Error(
            f"{len(prompts):,} prompts with -n {options.n} are {count:,} pictures, but one run makes at most "
            f"{defaults.MAX_PICTURES:,}: lower -n, or give fewer prompts"
        )
    for prompt in prompts:
        check_about(options.format, {"prompt": prompt, "negative": max(options.negative, key=len)})
    files = [options.output / f"{row:0{max(3, len(str(count - 1)))}d}.{options.format}" for row in range(count)]
    tokens = options.output / "tokens.npz"

    settings = common.generation(options)
    distributed.start()
    # All processes of a mesh compute; the first one shows and writes.
    first = distributed.first()
    if first:
        written = outputs.Outputs([*files, tokens] if options.save_tokens else files, no_clobber=options.no_clobber)
    model = common.load_model(options)
    about: dict[int, dict[str, str]] = {}
    ids = {}
    with contextlib.nullcontext() if source is None else source.naming_lines(options.n):
        generations = model.stream_sequences(
            prompts,
            n=options.n,
            ratio=common.one_or_each(options.ratio),
            **settings,
            progress=common.progress(options),
        )
        if not first:
            for _ in generations:
                pass
            return
        with files_into(options.output, replace=not options.no_clobber) as directory:
            for row, generation in generations:
                about[row] = generation.image.info
                save_picture(generation.image, directory / files[row].name, about[row])
                if options.save_tokens:
                    ids[str(row)] = generation.ids
            if options.save_tokens:
                save_codes(directory / tokens.name, ids)
            written.look()
    written.report()
    for row, file in enumerate(files):
        print(json_line(_figures(file, file in written.replaced, about[row])) if options.json else file)


def _figures(file: typing.Any, replaced: bool, about: dict[str, str]) -> dict[str, typing.Any]:
    """The JSON object of a picture."""
    named = {name.replace("-", "_"): value for name, value in about.items()}
    return {
        "file": str(file),
        "replaced": replaced,
        **{name: _NUMBERS.get(name, str)(value) for name, value in named.items()},
    }

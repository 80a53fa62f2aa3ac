"""Writes prompts for preference tuning of the embedded model: emoji in styles that its training did not show.

    python scripts/style_prompts.py DIR -o out/style_prompts.txt
    python scripts/style_prompts.py DIR --kinds held-out undrawn seen --count 1000 -o out/style_prompts.txt
    emu3-jax sample out/style_prompts.txt -n 8 -o out/style_samples
    emu3-jax score out/style_samples --reward judge --data DIR

DIR is the data of scripts/build_emoji.py at the size of the model's pictures. For the embedded model that is
out/pictures64/emoji, which scripts/build_pictures.py writes. The kinds of prompts are:

- held-out: the thing has a picture in this style, but training did not see it
- undrawn: the thing has no picture in this style
- seen: captions of training pictures

All things appear in training, in this style or in others. The prompts of `emu3-jax evaluate configs/eval_emoji.py`
are never written, so the tuning never sees the prompts that its figure text_to_image measures. --other-things also
leaves out the things of those prompts, in all styles. An evaluation with other values of `cases` or `seed` has
other prompts: give the same --cases and --seed here.
"""

import argparse
import collections
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from emoji_data.concepts import STYLES, fixed_number

from emu3_jax.errors import Emu3Error
from emu3_jax.evaluation.config import EvaluateConfig
from emu3_jax.evaluation.items import Data
from emu3_jax.evaluation.text_to_image import choose_cases
from emu3_jax.files import new_file

KINDS = ("held-out", "undrawn", "seen")
_CASES = 256  # of configs/eval_emoji.py


def choose_prompts(
    data: Data, config: EvaluateConfig, kinds: Sequence[str] = KINDS[:2], *, other_things: bool = False
) -> list[tuple[str, str]]:
    """All prompts that may be used, as pairs (kind, prompt), in a random order that depends only on the prompts.

    Args:
        data: the evaluation data.
        config: config of the evaluation, whose prompts are left out.
        kinds: kinds of prompts, of `KINDS`.
        other_things: leave out the things of the evaluation's prompts in all styles.

    Raises:
        Emu3Error: there are no such prompts.
    """
    held_out, cases = choose_cases(data, config)
    training = data.where("picture", "train", config.groups)
    asked, things = {item.caption for item in cases}, {item.concept for item in cases} if other_things else set()
    drawn = {item.caption for item in data.where("picture", None, config.groups)}
    every = {dataclasses.replace(item, style=style).caption: item for item in training for style in STYLES}
    found = {
        "held-out": {item.caption: item for item in held_out},
        "undrawn": {caption: item for caption, item in every.items() if caption not in drawn},
        "seen": {item.caption: item for item in training},
    }
    prompts = [
        (kind, caption)
        for kind in kinds
        for caption, item in found[kind].items()
        if caption not in asked and item.concept not in things
    ]
    if not prompts:
        raise Emu3Error(f"{data.directory} has no prompts of the kinds {', '.join(kinds)}: choose other --kinds")
    return sorted(prompts, key=lambda prompt: fixed_number(0, "style prompt", prompt[1]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=pathlib.Path, metavar="DIR", help="data of scripts/build_emoji.py")
    parser.add_argument("-o", "--output", type=pathlib.Path, required=True, metavar="FILE", help="new file of prompts")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=KINDS[:2], help="kinds of prompts (default: held-out undrawn)"
    )
    parser.add_argument("--count", type=int, metavar="N", help="number of prompts, drawn at random (default: all)")
    parser.add_argument("--other-things", action="store_true", help="leave out the things of the evaluation's prompts")
    parser.add_argument(
        "--cases", type=int, default=_CASES, metavar="N", help="cases of the evaluation (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the evaluation (default: %(default)s)")
    given = parser.parse_args(arguments)
    try:
        config = EvaluateConfig("out/evaluation", data=str(given.data), cases=given.cases, seed=given.seed)
        prompts = choose_prompts(Data(given.data), config, given.kinds, other_things=given.other_things)
        if given.count is not None and not 1 <= given.count <= len(prompts):
            raise Emu3Error(f"count is {given.count}: there are {len(prompts)} prompts, give 1 to {len(prompts)}")
        prompts = prompts[: given.count]
        if given.output.exists():
            raise Emu3Error(f"{given.output} exists: name a new file")
        with new_file(given.output, replace=False) as temporary:
            temporary.write_text("".join(f"{prompt}\n" for _, prompt in prompts), encoding="utf-8")
    except Emu3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for kind, count in collections.Counter(kind for kind, _ in prompts).items():
        print(f"{kind}: {count}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Parallel decoding of the embedded model against sequential decoding: are the tokens equal, and how many passes fewer?

    python scripts/parallel_decoding.py [--windows 8 16 32] [--emoji 125] [--shapes 131] [--clips 32] [--model BUNDLE]

Generates pictures (and clips of 8 frames) in float32, each prompt with its own seed, once with `parallel="off"` and
once with each W. Then it asks the model to describe the pictures, and asks two questions about each clip, of which the
second repeats a part of the first answer (greedily). Prints a table for `docs/performance.md`. The counts do not
depend on the machine's speed.
"""

import argparse
import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import emu3_jax
from emu3_jax.generation import session
from emu3_jax.generation.language import Batching, GeneratedGrid, Grid, Language, generate_grids
from emu3_jax.generation.rows import Sampling
from emu3_jax.generation.schedule import text_schedule
from emu3_jax.text.prompts import next_turn_prompt, understanding_prompt

SIZES, COLOURS = ("small", "large"), ("red", "blue", "yellow", "green", "purple", "orange", "black", "white")
SHAPES, GROUNDS = ("star", "circle", "square", "heart"), ("white", "black", "gray", "yellow")
MOVES = ("moves right", "moves down", "grows", "blinks")
STYLES = ("noto", "twemoji", "3d", "flat", "vintage")
THINGS = (
    "hamburger", "pineapple", "rainbow", "avocado", "tiger face", "hammer", "sailboat", "mushroom", "rocket", "volcano",
    "cactus", "strawberry", "dog face", "pizza", "rose", "cat face", "guitar", "banana", "castle", "bicycle", "snowman",
    "red heart", "sun", "tree", "fish",
)  # fmt: skip
IMAGE, CLIP, MOTION = "Describe the image.", "Describe the clip.", "What does the shape do?"


def emoji_prompts(count: int) -> list[str]:
    """At most 125."""
    return [f"{style} emoji of {thing}" for thing, style in itertools.product(THINGS, STYLES)][:count]


def shape_prompts(count: int) -> list[str]:
    """At most 256."""
    words = itertools.product(COLOURS, SHAPES, SIZES, GROUNDS)
    return [f"a {s} {c} {x} on a {g} background" for c, x, s, g in words][:count]


def clip_prompts(count: int) -> list[str]:
    """At most 256."""
    words = itertools.product(COLOURS, SHAPES, SIZES, MOVES)
    return [f"a {s} {c} {x} {move} on a gray background" for c, x, s, move in words][:count]


def answers(
    language: Language, prompts: Sequence[Sequence[int]], batch: int, parallel: int | str
) -> tuple[list[list[int]], np.ndarray]:
    """Greedy answers of at most 32 tokens, without their EOS, and the passes that each took."""
    found, passes, eos = [], [], language.config.tokens.eos
    for first in range(0, len(prompts), batch):
        rows = [session.Row(ids, text_schedule(32)) for ids in prompts[first : first + batch]]
        settings = Sampling(temperature=0.0).settings(len(rows))
        made = session.run(language.params, language.config, rows, settings, parallel=parallel)
        found += [ids[: (ids == eos).argmax() if (ids == eos).any() else None].tolist() for ids in made.ids]
        passes.append(made.passes)
    return found, np.concatenate(passes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", nargs="+", type=int, default=[8, 16, 32], metavar="W")
    parser.add_argument("--emoji", type=int, default=125)
    parser.add_argument("--shapes", type=int, default=131)
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--model", type=pathlib.Path)
    options = parser.parse_args()
    model = emu3_jax.load(options.model, dtype="float32")
    side = round(model.language.config.image_area**0.5) // model.vision.config.spatial_factor
    latents = 2  # of 4 frames each

    def make(prompts: list[str], size: tuple[int, ...], parallel: int | str) -> list[GeneratedGrid]:
        grids = [Grid(prompt, "", size) for prompt in prompts]
        settings = Sampling(guidance=options.guidance).settings(len(prompts))
        batching = Batching(options.batch_size, progress=None, parallel=parallel)
        return generate_grids(model.language, grids, settings, batching=batching)

    def compare(what: str, made: Callable[[int | str], tuple[list[Any], np.ndarray]]) -> list[Any]:
        """Prints a line per W. `made(parallel)` gives each row's tokens and passes. Returns the sequential tokens."""
        truth, before = made("off")
        for window in options.windows:
            found, passes = made(window)
            equal = sum(np.array_equal(a, b) for a, b in zip(found, truth, strict=True))
            factors = before / passes
            print(
                f"| {what} | {window} | {equal} of {len(truth)} | {before.mean():.1f} to {passes.mean():.1f} | "
                f"{before.sum() / passes.sum():.2f}x | {factors.min():.2f}x | {factors.max():.2f}x |",
                flush=True,
            )
        return truth

    print(f"guidance {options.guidance:g}, float32\n\n| what | W | equal | passes | fewer by | least | most |")
    print("|---|---|---|---|---|---|---|")
    codes = {}
    for what, prompts, size in (
        ("pictures of emoji", emoji_prompts(options.emoji), (side, side)),
        ("pictures of shapes", shape_prompts(options.shapes), (side, side)),
        ("clips of two latent frames", clip_prompts(options.clips), (latents, side, side)),
    ):

        def grids(
            parallel: int | str, prompts: list[str] = prompts, size: tuple[int, ...] = size
        ) -> tuple[list[Any], np.ndarray]:
            made = make(prompts, size, parallel)
            return [grid.codes for grid in made], np.asarray([grid.passes for grid in made])

        codes[what] = compare(what, grids) if prompts else []

    language = model.language
    pieces = language.tokenizer, language.config.tokens, language.templates

    def asked(inputs: list[list[int]]) -> Callable[[int | str], tuple[list[Any], np.ndarray]]:
        return lambda parallel: answers(language, inputs, options.batch_size, parallel)

    if pictures := codes["pictures of emoji"]:
        compare("descriptions of these emoji", asked([understanding_prompt(*pieces, IMAGE, one) for one in pictures]))
    if clips := codes["clips of two latent frames"]:
        first = [understanding_prompt(*pieces, CLIP, one) for one in clips]
        second = [language.config.tokens.eos, *next_turn_prompt(*pieces, MOTION)]
        said = compare("descriptions of these clips", asked(first))
        both = [[*ids, *answer, *second] for ids, answer in zip(first, said, strict=True)]
        compare("then, what the shape does", asked(both))


if __name__ == "__main__":
    main()

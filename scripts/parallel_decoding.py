"""Parallel decoding of the embedded model against sequential decoding: are the tokens equal, and how many passes fewer?

    python scripts/parallel_decoding.py [--windows 8 16 32] [--emoji 125] [--shapes 131] [--clips 32] [--model BUNDLE]

Generates pictures (and clips of 8 frames) in float32, each prompt with its own seed, once with `parallel="off"` and
once with each W. Prints a table for `docs/performance.md`. The counts do not depend on the machine's speed.
"""

import argparse
import itertools
import pathlib

import numpy as np

import emu3_jax
from emu3_jax.generation.language import Batching, GeneratedGrid, Grid, generate_grids
from emu3_jax.generation.rows import Sampling

SIZES, COLOURS = ("small", "large"), ("red", "blue", "yellow", "green", "purple", "orange", "black", "white")
SHAPES, GROUNDS = ("star", "circle", "square", "heart"), ("white", "black", "gray", "yellow")
MOVES = ("moves right", "moves down", "grows", "blinks")
STYLES = ("noto", "twemoji", "3d", "flat", "vintage")
THINGS = (
    "hamburger", "pineapple", "rainbow", "avocado", "tiger face", "hammer", "sailboat", "mushroom", "rocket", "volcano",
    "cactus", "strawberry", "dog face", "pizza", "rose", "cat face", "guitar", "banana", "castle", "bicycle", "snowman",
    "red heart", "sun", "tree", "fish",
)  # fmt: skip


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

    print(f"guidance {options.guidance:g}, float32\n\n| what | W | equal | passes | fewer by | least | most |")
    print("|---|---|---|---|---|---|---|")
    for what, prompts, size in (
        ("emoji", emoji_prompts(options.emoji), (side, side)),
        ("shapes", shape_prompts(options.shapes), (side, side)),
        ("clips", clip_prompts(options.clips), (latents, side, side)),
    ):
        if not prompts:
            continue
        sequential = make(prompts, size, "off")
        before = np.asarray([grid.passes for grid in sequential])
        for window in options.windows:
            several = make(prompts, size, window)
            passes = np.asarray([grid.passes for grid in several])
            equal = sum((a.ids == b.ids).all() for a, b in zip(several, sequential, strict=True))
            factors = before / passes
            print(
                f"| {what} | {window} | {equal} of {len(prompts)} | {before.mean():.0f} to {passes.mean():.1f} | "
                f"{before.sum() / passes.sum():.2f}x | {factors.min():.2f}x | {factors.max():.2f}x |",
                flush=True,
            )


if __name__ == "__main__":
    main()

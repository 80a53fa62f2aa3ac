"""Draws the figures of docs/preference.md: reward curves of runs by GRPO, and pictures of two models side by side.

python scripts/reward_figures.py curves out/grpo_0 out/grpo_1 out/grpo_2 -o docs/grpo_curves.svg
python scripts/reward_figures.py pictures out/before out/after --per-row 4 -o docs/grpo_pictures.png

`curves` reads metrics.jsonl of each run, and draws the mean reward of every `--window` steps. `pictures` takes the PNG
files of two directories that `emu3-jax generate` wrote with the same prompts, -n and seeds: those of the first
directory on the left, those of the second on the right.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from PIL import Image

from emu3_jax.errors import Emu3Error
from emu3_jax.evaluation.page import Curve, line_chart
from emu3_jax.files import new_file
from emu3_jax.training.metrics import read_metrics

_ZOOM, _GAP = 3, 8  # size of a picture's pixel, and space between pictures and halves, in pixels of the result


def curves(runs: Sequence[pathlib.Path], window: int) -> str:
    """An SVG with one line for each run.

    Raises:
        Emu3Error: a run has fewer steps than a window, or other steps than the first run.
    """
    lines: dict[str, tuple[float, ...]] = {}
    for run in runs:
        rewards = [line["reward"] for line in read_metrics(run) if line["group"] == "train" and "reward" in line]
        whole = len(rewards) // window * window
        if not whole:
            raise Emu3Error(f"{run} has {len(rewards)} lines of metrics with rewards: lower --window, or train longer")
        lines[run.name] = tuple(np.reshape(rewards[:whole], (-1, window)).mean(axis=1).tolist())
    counts = {len(values) for values in lines.values()}
    if len(counts) > 1 or len(lines) < len(runs):
        raise Emu3Error("the runs have different numbers of steps, or equal names: give finished runs of one config")
    steps = tuple(float(window * (place + 1)) for place in range(counts.pop()))
    return line_chart(Curve("step", steps, lines))


def pictures(before: pathlib.Path, after: pathlib.Path, per_row: int) -> Image.Image:
    """The pictures of both directories, `per_row` of each in a row.

    Raises:
        Emu3Error: a directory has no PNG file, or they have different files.
    """
    halves = []
    for directory in (before, after):
        files = sorted(directory.glob("*.png"))
        if not files:
            raise Emu3Error(f"{directory} has no PNG file: draw with emu3-jax generate")
        halves.append([np.asarray(Image.open(file).convert("RGB")).repeat(_ZOOM, 0).repeat(_ZOOM, 1) for file in files])
    if len(halves[0]) != len(halves[1]):
        raise Emu3Error(f"{before} has {len(halves[0])} pictures, {after} has {len(halves[1])}: draw the same prompts")
    rows = []
    for first in range(0, len(halves[0]), per_row):
        row = []
        for half in halves:
            row += [np.pad(one, ((0, _GAP), (0, _GAP), (0, 0)), constant_values=255) for one in half[first:][:per_row]]
            row.append(np.full((row[-1].shape[0], _GAP, 3), 255, np.uint8))
        rows.append(np.concatenate(row[:-1], axis=1))
    return Image.fromarray(np.concatenate(rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    drawn = kinds.add_parser("curves", help="reward curves of runs")
    drawn.add_argument("runs", nargs="+", type=pathlib.Path, metavar="RUN", help="directories of runs")
    drawn.add_argument("--window", type=int, default=25, metavar="N", help="steps of a point (default: %(default)s)")
    shown = kinds.add_parser("pictures", help="pictures of two models side by side")
    shown.add_argument("before", type=pathlib.Path, metavar="BEFORE", help="directory of pictures")
    shown.add_argument("after", type=pathlib.Path, metavar="AFTER", help="directory of pictures")
    shown.add_argument(
        "--per-row", type=int, default=4, metavar="N", help="pictures of a prompt (default: %(default)s)"
    )
    for kind in (drawn, shown):
        kind.add_argument("-o", "--output", type=pathlib.Path, required=True, metavar="FILE", help="file to write")
    options = parser.parse_args(arguments)
    try:
        with new_file(options.output) as temporary:
            if options.kind == "curves":
                temporary.write_text(curves(options.runs, max(1, options.window)) + "\n")
            else:
                pictures(options.before, options.after, max(1, options.per_row)).save(temporary, "PNG", optimize=True)
    except Emu3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

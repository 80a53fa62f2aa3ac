"""Times pictures and clips of bundles after warm-up, in turn: one token per pass of the decoder, and several.

    python scripts/picture_speed.py                # the embedded model
    python scripts/picture_speed.py OTHER BUNDLE   # other bundles, beside each other

The prompts suit the embedded models of this project. The script prints the median of the runs, in seconds.
"""

import argparse
import functools
import pathlib
import statistics
import time

import emu3_jax
from emu3_jax.cli.common import parallel, whole

PICTURES = ("3d emoji of rainbow", "a red car", "a dog", "flag of Japan")
CLIPS, FRAMES = ("a large yellow heart moves right on a black background",), 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", type=pathlib.Path, metavar="BUNDLE", help="default: the embedded model")
    parser.add_argument("--runs", type=whole(1, 1000), default=5, help="runs of each kind (default: %(default)s)")
    parser.add_argument(
        "--parallel", nargs="+", type=parallel, default=["off", 4, 8, 16], metavar="W", help="default: off 4 8 16"
    )
    options = parser.parse_args()
    jobs = {}
    for bundle in options.bundles or [None]:
        model, name = emu3_jax.load(bundle), str(bundle or "embedded")
        for window in options.parallel:
            settings = {"parallel": window, "progress": False}
            jobs[f"{name}: picture, {window}"] = PICTURES, functools.partial(model.generate, **settings)
            jobs[f"{name}: clip, {window}"] = CLIPS, functools.partial(model.generate_clips, frames=FRAMES, **settings)
    seconds = {name: [] for name in jobs}
    for run in range(options.runs + 1):
        for name, (prompts, make) in jobs.items():
            for prompt in prompts:
                began = time.perf_counter()
                make(prompt, seed=run)
                if run:  # the first run warms up
                    seconds[name].append(time.perf_counter() - began)
    for name, found in seconds.items():
        print(f"{name}: {statistics.median(found):.2f} s ({min(found):.2f} to {max(found):.2f})")


if __name__ == "__main__":
    main()

"""Adds further views of the drawings and clips to the data of scripts/build_pictures.py, for the last fine-tuning.

python scripts/picture_views.py out/pictures64
python scripts/picture_views.py out/pictures64 --name further --seed 2 --keep-colours

The directory gets NAME/ with pictures and clips, and two manifests: NAME_questions.jsonl, with all questions about a
picture in one conversation, in random order, and NAME_clips.jsonl. Only items of the training have views, with the
captions and answers of the items. A view is turned by at most 12 degrees, moved, larger or smaller, with other gamma
and saturation unless colours are kept. Views of shapes are drawn anew, with `procedural.Variation`.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import pathlib
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from emoji_data.manifests import about, caption, turns, write_lines
from picture_data.captions import GROUPS, asked
from PIL import Image, ImageEnhance

from emu3_jax.errors import Emu3Error
from emu3_jax.evaluation import procedural
from emu3_jax.files import new_directory
from emu3_jax.foreign import parse_json, read_bytes
from emu3_jax.media.clips import Clip, load_clip, save_clip
from emu3_jax.media.images import load_image
from emu3_jax.progress import Progress

NAME = "views"
# Views to add of each item.
AMOUNTS = {"picture": 16, "procedural_picture": 4, "clip": 4, "procedural_clip": 3}
_BYTES_PER_VIEW = 20_000  # a generous bound for the disk check
_TURN = 12.0  # degrees
_SIZE = (0.7, 1.4)
_SATURATION = (0.6, 1.4)
_GAMMA = (0.75, 1.33)


def build(
    data: pathlib.Path,
    *,
    name: str = NAME,
    amounts: Mapping[str, int] = AMOUNTS,
    seed: int = 1,
    keep_colours: bool = False,
    workers: int = 1,
) -> dict[str, int]:
    """Writes all views and manifests, and returns the number of lines of each manifest.

    Args:
        data: directory that scripts/build_pictures.py wrote.
        name: of the directory in `data`, and start of the manifests' names.
        amounts: views to add of each item of a kind.
        seed: of the views and of the order of questions.
        keep_colours: whether drawings keep their gamma and saturation.
        workers: processes that draw.

    Raises:
        Emu3Error: `workers` is below 1, `name` is no plain name, or `data` is no such directory, has views of that name
            already, or cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise Emu3Error(f"name is {name!r}: use letters, digits, _ and - only")
    if workers < 1:
        raise Emu3Error(f"workers is {workers}: it must be 1 or more")
    items = [item for item in _items(data / "items.jsonl") if item["split"] == "train"]
    items = [item for item in items if item["kind"] != "picture" or item["group"] in GROUPS]
    lines: dict[str, list[dict]] = {"questions": [], "clips": []}
    with new_directory(data / name, sum(amounts[item["kind"]] for item in items) * _BYTES_PER_VIEW) as target:
        for kind in amounts:
            (target / kind).mkdir()
        draw = functools.partial(_draw, _Task(data, name, target, amounts, seed, keep_colours))
        with contextlib.ExitStack() as stack:
            apply = map
            if workers > 1:
                context = multiprocessing.get_context("spawn")
                pool = stack.enter_context(concurrent.futures.ProcessPoolExecutor(workers, context))
                apply = functools.partial(pool.map, chunksize=16)
            with Progress(True, len(items), "items", name="views") as progress:
                for manifest, rows in apply(draw, enumerate(items)):
                    lines[manifest] += rows
                    progress.update()
        for manifest, rows in lines.items():
            write_lines(data / f"{name}_{manifest}.jsonl", rows)
    return {manifest: len(rows) for manifest, rows in lines.items()}


def _items(file: pathlib.Path) -> list[dict]:
    """The items that build_pictures.py wrote. Drawings of other data have no `look`, which questions ask for."""
    remedy = "give a directory that scripts/build_pictures.py wrote"
    found = []
    for number, line in enumerate(read_bytes(file, 1 << 28, remedy).splitlines(), start=1):
        item = parse_json(line, f"{file} line {number}", remedy)
        if not isinstance(item, dict):
            raise Emu3Error(f"{file} line {number} is no JSON object: {remedy}")
        needed = ("name", "file", "kind", "split", *(("group", "look") if item.get("kind") == "picture" else ()))
        if missing := [field for field in needed if field not in item]:
            raise Emu3Error(f"{file} line {number} has no {missing[0]}: {remedy}")
        found.append(item)
    return found


@dataclasses.dataclass(frozen=True)
class _Task:
    """The arguments of `build`. `target` is where views are written before they get their place."""

    data: pathlib.Path
    name: str
    target: pathlib.Path
    amounts: Mapping[str, int]
    seed: int
    keep_colours: bool


def _draw(task: _Task, numbered: tuple[int, dict]) -> tuple[str, list[dict]]:
    """Writes the views of one item, and returns its lines and the name of their manifest."""
    number, item = numbered
    chance, shown = random.Random(f"{task.seed} {item['name']}"), [item["file"]]
    for view, frames in enumerate(_views(task, item, chance)):
        file = f"{item['kind']}/{number:05}_{view}.webp"
        if _save(frames, task.target / file):
            shown.append(f"{task.name}/{file}")
    if item["kind"].endswith("clip"):
        text = caption(item)
        return "clips", [{"clip": file, "text": text, "name": f"{item['name']}@{i}"} for i, file in enumerate(shown)]
    told, rows = asked(item) if item["kind"] == "picture" else about(item), []
    for place, file in enumerate(shown):
        pairs = list(told.items())
        chance.shuffle(pairs)
        rows.append({"image": file, "conversation": turns(pairs), "name": f"{item['name']}@{place}"})
    return "questions", rows


@dataclasses.dataclass(frozen=True)
class View:
    """Another look at a drawing on white.

    Attributes:
        degrees: how far it is turned.
        size: factor of its size.
        place: (right, down), moved by these shares of the side.
        saturation: factor.
        gamma: exponent of values from 0 to 1. White stays white.
    """

    degrees: float
    size: float
    place: tuple[float, float]
    saturation: float
    gamma: float

    @classmethod
    def draw(cls, chance: random.Random) -> "View":
        """Draws a view. A smaller drawing moves farther."""
        size = chance.uniform(*_SIZE)
        room = abs(1 - size) / 2 + 0.04
        place = chance.uniform(-room, room), chance.uniform(-room, room)
        gamma = _GAMMA[0] * (_GAMMA[1] / _GAMMA[0]) ** chance.random()
        return cls(chance.uniform(-_TURN, _TURN), size, place, chance.uniform(*_SATURATION), gamma)

    def apply(self, picture: Image.Image) -> Image.Image:
        """The view of an RGB picture, at the same size in pixels."""
        side = np.asarray(picture.size)
        angle = np.deg2rad(self.degrees)
        turn = np.asarray([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / self.size
        offset = side / 2 - turn @ (side / 2 + np.asarray(self.place) * side)
        matrix = np.column_stack([turn, offset]).ravel().tolist()
        turned = picture.transform(
            picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor="white"
        )
        table = [round(255 * (value / 255) ** self.gamma) for value in range(256)] * 3
        return ImageEnhance.Color(turned).enhance(self.saturation).point(table)


def _views(task: _Task, item: dict, chance: random.Random) -> Iterator[Clip]:
    """Yields views of an item. A picture is a clip of one frame. All frames of a clip have the same view."""
    file = task.data / item["file"]
    whole = load_clip(file) if item["kind"].endswith("clip") else Clip(np.asarray(load_image(file))[None])
    for _ in range(task.amounts[item["kind"]]):
        if item["kind"].startswith("procedural"):
            frames = _redrawn(item, whole.frames.shape[1], chance)
        else:
            view = View.draw(chance)
            if task.keep_colours:
                view = dataclasses.replace(view, saturation=1.0, gamma=1.0)
            frames = np.stack([np.asarray(view.apply(Image.fromarray(frame))) for frame in whole.frames])
        yield Clip(frames, whole.fps)


def _redrawn(item: dict, side: int, chance: random.Random) -> np.ndarray:
    """The frames of a scene, varied: uint8 [T, side, side, 3], one frame of a still."""
    moving = item["kind"] == "procedural_clip"
    scene = procedural.Motion if moving else procedural.Still
    drawn = scene(**{field.name: item[field.name] for field in dataclasses.fields(scene)})
    variation = procedural.Variation.draw(np.random.default_rng(chance.randrange(1 << 32)))
    if moving:
        return procedural.rasterise_clip(drawn, side, variation)
    return procedural.rasterise_still(drawn, side, variation)[None]


def _save(view: Clip, path: pathlib.Path) -> bool:
    """Writes a picture, or a clip if it can be read back: encoders merge equal frames, which may lose their number."""
    if len(view.frames) == 1:
        Image.fromarray(view.frames[0]).save(path, lossless=True, method=0)
        return True
    save_clip(view.frames, path, view.fps)
    if np.array_equal(load_clip(path).frames, view.frames):
        return True
    path.unlink()
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=pathlib.Path, metavar="DIR", help="directory that build_pictures.py wrote")
    parser.add_argument(
        "--name", default=NAME, help=f"of the directory and manifests in DIR (default: {NAME})", metavar="NAME"
    )
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the views (default: 1)")
    parser.add_argument("--keep-colours", action="store_true", help="do not change gamma and saturation of drawings")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes that draw (default: all CPUs)"
    )
    given = parser.parse_args(arguments)
    try:
        counts = build(
            given.data,
            name=given.name,
            seed=given.seed,
            keep_colours=given.keep_colours,
            workers=given.workers,
        )
    except Emu3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, count in counts.items():
        print(f"{name}: {count}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

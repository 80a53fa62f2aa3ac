"""Adds further views of the drawings and clips to the data of scripts/build_pictures.py, for the last fine-tuning.

python scripts/picture_views.py out/pictures64

The directory gets views/ with pictures and clips, and three manifests: views_questions.jsonl (all questions about a
picture in one conversation, in random order), views_clips.jsonl and views_clip_questions.jsonl. Only items of the
training have views, with the captions and answers of the items. A view is turned by at most 12 degrees, moved, larger
or smaller, with other gamma and saturation. Views of shapes are drawn anew, with `procedural.Variation`.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import random
import sys
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from build_emoji import PROCEDURAL_FPS
from emoji_data.manifests import about, caption, write_lines
from picture_data.captions import GROUPS, asked
from PIL import Image, ImageEnhance

from emu3_jax.errors import Emu3Error
from emu3_jax.evaluation import procedural
from emu3_jax.files import new_directory
from emu3_jax.foreign import read_bytes
from emu3_jax.media.clips import load_clip, save_clip
from emu3_jax.progress import each

DIRECTORY = "views"
_BYTES_PER_VIEW = 20_000  # a generous bound for the disk check
_TURN = 12.0  # degrees
_SIZE = (0.72, 1.12)
_SATURATION = (0.6, 1.4)
_GAMMA = (0.75, 1.33)


@dataclasses.dataclass(frozen=True)
class Amounts:
    """How many views to add of each item."""

    pictures: int = 10
    shapes: int = 4
    clips: int = 4
    moving_shapes: int = 3


def build(data: pathlib.Path, *, amounts: Amounts = Amounts(), seed: int = 1) -> dict[str, int]:
    """Writes all views and manifests, or nothing, and returns the number of lines of each manifest.

    Args:
        data: directory that scripts/build_pictures.py wrote.
        amounts: views of each item.
        seed: of the views and of the order of questions.

    Raises:
        Emu3Error: `data` is no such directory, has views already, or cannot be written.
    """
    text = read_bytes(data / "items.jsonl", 1 << 28, "build the data first (python scripts/build_pictures.py DIR)")
    items = [item for item in map(json.loads, text.splitlines()) if item["split"] == "train"]
    kinds = {kind: [item for item in items if item["kind"] == kind] for kind in {item["kind"] for item in items}}
    drawings = [item for item in kinds.get("picture", ()) if item["group"] in GROUPS]
    count = len(drawings) * amounts.pictures + sum(map(len, kinds.values())) * 8
    lines: dict[str, list[dict]] = {"questions": [], "clips": [], "clip_questions": []}
    with new_directory(data / DIRECTORY, count * _BYTES_PER_VIEW) as target:
        for folder in ("pictures", "shapes", "clips", "moving_shapes"):
            (target / folder).mkdir()
        for number, item in enumerate(each(drawings, True, "drawings", name="pictures")):
            chance = random.Random(f"{seed} {item['name']}")
            shown = [item["file"], *item.get("views", ()), *item.get("closeups", ())]
            with Image.open(data / item["file"]) as picture:
                picture = picture.convert("RGB")
            for view in range(amounts.pictures):
                file = f"pictures/{number:05}_{view}.webp"
                View.draw(chance).apply(picture).save(target / file, lossless=True, method=0)
                shown.append(f"{DIRECTORY}/{file}")
            lines["questions"] += _conversations(item["name"], "image", shown, asked(item), chance)
        for item in each(kinds.get("procedural_picture", ()), True, "scenes", name="shapes"):
            chance, shown = random.Random(f"{seed} {item['name']}"), [item["file"]]
            still = procedural.Still(**{field.name: item[field.name] for field in dataclasses.fields(procedural.Still)})
            for view in range(amounts.shapes):
                file = f"shapes/{pathlib.PurePath(item['name']).name}_{view}.webp"
                pixels = procedural.rasterise_still(still, _side(data, item), _variation(chance))
                Image.fromarray(pixels).save(target / file, lossless=True, method=0)
                shown.append(f"{DIRECTORY}/{file}")
            lines["questions"] += _conversations(item["name"], "image", shown, about(item), chance)
        for kind, amount in (("clip", amounts.clips), ("procedural_clip", amounts.moving_shapes)):
            for item in each(kinds.get(kind, ()), True, "clips", name="clips"):
                chance = random.Random(f"{seed} {item['name']}")
                shown = [item["file"]]
                for view, (frames, fps) in enumerate(_clips(data, item, amount, chance)):
                    folder = "clips" if kind == "clip" else "moving_shapes"
                    file = f"{folder}/{pathlib.PurePath(item['name']).name}_{view}.webp"
                    save_clip(frames, target / file, fps)
                    if np.array_equal(load_clip(target / file).frames, frames):
                        shown.append(f"{DIRECTORY}/{file}")
                    else:  # encoders merge equal frames, which may lose their number
                        (target / file).unlink()
                lines["clips"] += [
                    {"clip": file, "text": caption(item), "name": f"{item['name']}@{number}"}
                    for number, file in enumerate(shown)
                ]
                lines["clip_questions"] += _conversations(item["name"], "clip", shown, about(item), chance)
    for name, rows in lines.items():
        write_lines(data / f"{DIRECTORY}_{name}.jsonl", rows)
    return {name: len(rows) for name, rows in lines.items()}


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


def _variation(chance: random.Random) -> procedural.Variation:
    return procedural.Variation.draw(np.random.default_rng(chance.randrange(1 << 32)))


def _side(data: pathlib.Path, item: dict) -> int:
    with Image.open(data / item["file"]) as picture:
        return picture.width


def _clips(data: pathlib.Path, item: dict, amount: int, chance: random.Random) -> Iterator[tuple[np.ndarray, float]]:
    """Frames and frames per second of each view. All frames of a clip have the same view."""
    if item["kind"] == "clip":
        clip = load_clip(data / item["file"])
        for _ in range(amount):
            view = View.draw(chance)
            yield np.stack([np.asarray(view.apply(Image.fromarray(frame))) for frame in clip.frames]), clip.fps
        return
    motion = procedural.Motion(**{field.name: item[field.name] for field in dataclasses.fields(procedural.Motion)})
    for _ in range(amount):
        yield procedural.rasterise_clip(motion, _side(data, item), _variation(chance)), PROCEDURAL_FPS


def _conversations(
    name: str, medium: str, files: Iterable[str], asked: dict[str, str], chance: random.Random
) -> Iterator[dict]:
    """A conversation about each file with all questions, in random order."""
    for number, file in enumerate(files):
        pairs = list(asked.items())
        chance.shuffle(pairs)
        roles = itertools.cycle(("user", "assistant"))
        turns = [{"role": next(roles), "text": text} for pair in pairs for text in pair]
        yield {medium: file, "conversation": turns, "name": f"{name}@{number}"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=pathlib.Path, metavar="DIR", help="directory that build_pictures.py wrote")
    try:
        counts = build(parser.parse_args(arguments).data)
    except Emu3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, count in counts.items():
        print(f"{name}: {count}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

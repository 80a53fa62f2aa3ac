"""Builds the data of the embedded model: emoji at 64x64 pixels, icons, clip art, scenes of shapes, edits and stories.

python scripts/build_pictures.py out/pictures64

The directory gets emoji/ (what build_emoji.py makes), pictures/ and items.jsonl with manifests (*.jsonl) of short
prompts and questions about all pictures, two_shapes/, arrangements/, stories/, NOTICE and summary.json.
docs/picture_data.md describes them. The script needs the extra `emoji`. It downloads packages that are not in the
cache: with npm (about 760 MB, or 32 MB with --no-clips), and with apt-get (25 MB).
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Iterable, Sequence

import arrangements
import build_emoji
import numpy as np
import stories
import two_shapes
from emoji_data.concepts import Concept, load_concepts
from emoji_data.manifests import write_lines
from emoji_data.packages import Package, fetch
from picture_data import debian, splits
from picture_data.captions import caption, manifests, people
from picture_data.colours import main_colour
from picture_data.debian import DebianPackage
from picture_data.drawings import Drawing, load_clipart, load_icons
from picture_data.rasterise import Rasteriser
from picture_data.sources import CLIPART, ICONS, TABLES
from picture_data.words import Things, phrase
from PIL import Image

from emu3_jax.errors import Emu3Error
from emu3_jax.evaluation import people_prompts, procedural
from emu3_jax.files import new_directory
from emu3_jax.progress import each

NOTICE = TABLES / "notice.txt"
_BYTES_PER_PIXEL = 160_000  # bytes of the whole directory per pixel of a picture: a generous bound for the disk check
_STEP = 16  # pixels; pictures are compared in 16 x 16 blocks


@dataclasses.dataclass(frozen=True)
class Sources:
    """The packages to build from."""

    emoji: build_emoji.Sources = dataclasses.field(default_factory=build_emoji.Sources)
    icons: dict[str, Package] = dataclasses.field(default_factory=lambda: ICONS)
    clipart: DebianPackage = CLIPART


@dataclasses.dataclass(frozen=True)
class Amounts:
    """How many procedural pictures and documents to draw."""

    two_shapes: int = 6_000
    arrangements: int = 12_000
    stories: int = 20_000
    edits: int = 20_000


def build(
    directory: pathlib.Path,
    cache: pathlib.Path,
    *,
    size: int = 64,
    clips: bool = True,
    seed: int = build_emoji.SEED,
    sources: Sources | None = None,
    amounts: Amounts = Amounts(),
    scenes: tuple[Sequence[procedural.Still], Sequence[procedural.Motion]] | None = None,
) -> dict:
    """Writes the whole data set, or nothing, and returns its summary.

    Args:
        directory: new directory for the data set.
        cache: directory of the packages. Nothing in it is ever deleted.
        size: side of pictures and frames in pixels, a multiple of 16 from 64 to 256.
        clips: whether to read the animated packages.
        seed: seed of splits and captions.
        sources: packages to use instead of the pinned ones.
        amounts: of procedural data.
        scenes: as in `build_emoji.build`.

    Raises:
        Emu3Error: `size` is none of these, `directory` exists, a package cannot be fetched, or a file cannot be
            written.
    """
    if size % _STEP or not 64 <= size <= 256:
        raise Emu3Error(f"size is {size}: it must be a multiple of {_STEP} from 64 to 256")
    sources = sources or Sources()
    with new_directory(directory, _BYTES_PER_PIXEL * size**2) as target:
        packages = {name: fetch(package, cache) for name, package in sources.icons.items()}
        clipart = debian.fetch(sources.clipart, cache)
        emoji = build_emoji.build(
            target / "emoji", cache, size=size, clips=clips, seed=seed, sources=sources.emoji, scenes=scenes
        )
        concepts = load_concepts(fetch(sources.emoji.labels, cache))
        drawings, unused = _load(packages, clipart, concepts, size)
        items, others = _emoji_items(target)
        pixels = np.stack([np.asarray(Image.open(target / item["file"])) for item in items])
        decided = splits.split(drawings, items, pixels, concepts, seed)
        for item, picture in zip(items, pixels, strict=True):
            item["colour"] = main_colour(picture)
        items += _write(target, drawings, decided, unused)
        write_lines(target / "items.jsonl", [*({**item, "caption": caption(item)} for item in items), *others])
        lines = manifests(items)
        for name, rows in lines.items():
            write_lines(target / f"{name}.jsonl", rows)
        write_lines(target / people_prompts.FILE, people(lines["prompts_train"], items))
        drawn = _draw_scenes(target, amounts, size)
        (target / "NOTICE").write_bytes(NOTICE.read_bytes())
        summary = {
            "arguments": {"size": size, "clips": clips, "seed": seed, **dataclasses.asdict(amounts)},
            "packages": [dataclasses.asdict(package) for package in (*sources.icons.values(), sources.clipart)],
            "items": _count(items),
            "manifests": {name: len(rows) for name, rows in lines.items()},
            "scenes": drawn,
            "unused": {reason: sorted(names) for reason, names in sorted(unused.items())},
            "emoji": {name: emoji[name] for name in ("items", "manifests")},
        }
        (target / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return summary


def _load(
    packages: dict[str, pathlib.Path], clipart: pathlib.Path, concepts: dict[str, Concept], size: int
) -> tuple[list[Drawing], dict[str, list[str]]]:
    """All drawings in a fixed order, and the names of unused ones by reason."""
    things = Things(concepts.values())
    drawings, unused = [], collections.defaultdict(list)
    with Rasteriser() as rasteriser:
        sets = {name: load_icons(name, tarball, concepts, things, size) for name, tarball in packages.items()}
        sets["clipart"] = load_clipart(clipart, things, size, rasteriser)
        for name, found in sets.items():
            for result in each(found, True, "drawings", name=name):
                if isinstance(result, Drawing):
                    drawings.append(result)
                else:
                    unused[result[1]].append(result[0])
    return sorted(drawings, key=lambda drawing: drawing.name), unused


def _emoji_items(target: pathlib.Path) -> tuple[list[dict], list[dict]]:
    """The emoji pictures as items of the whole data set, and the clips and procedural items."""
    lines = (target / "emoji" / "items.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    items = [item for item in found if item["kind"] == "picture"]
    others = [item for item in found if item["kind"] != "picture"]
    for item in others:
        item["name"], item["file"] = f"emoji/{item['name']}", f"emoji/{item['file']}"
    for item in items:
        item["source"], item["look"] = "emoji", f"{item['style']} emoji"
        item["phrase"] = phrase(item["label"])
        item["name"], item["file"] = f"emoji/{item['name']}", f"emoji/{item['file']}"
        for views in ("views", "closeups"):
            item[views] = [f"emoji/{file}" for file in item.get(views, [])]
    return items, others


def _write(
    target: pathlib.Path, drawings: Sequence[Drawing], decided: Sequence[str | None], unused: dict[str, list[str]]
) -> list[dict]:
    """Writes the drawings, and returns their items."""
    items, taken = [], collections.Counter()
    for drawing, split in each(list(zip(drawings, decided, strict=True)), True, "drawings", name="writing"):
        if split is None:
            unused["nearly the same as emoji of two splits"].append(drawing.name)
            continue
        folder = drawing.style.replace(" ", "_")
        (target / "pictures" / folder).mkdir(parents=True, exist_ok=True)
        slug = f"pictures/{folder}/" + re.sub(r"[^a-z0-9]+", "-", drawing.label.lower()).strip("-")
        taken[slug] += 1
        name = f"{slug}-{taken[slug]}"
        files = [f"{name}.webp", *(f"{name}_{number}.webp" for number in range(1, len(drawing.views)))]
        files = files if split == splits.TRAIN else files[:1]
        for file, view in zip(files, drawing.views, strict=False):
            Image.fromarray(view).save(target / file, lossless=True)
        smaller = 1 + (len(drawing.views) - 1) // 2
        items.append(
            {
                "name": name,
                "file": files[0],
                "kind": "picture",
                "style": drawing.style,
                "concept": drawing.concept,
                "label": drawing.label.removeprefix("~"),
                "phrase": phrase(drawing.label),
                "group": drawing.group,
                "split": split,
                "views": files[1:smaller],
                "closeups": files[smaller:],
                "source": drawing.name.split("/")[0],
                "look": drawing.kind,
                "colour": main_colour(drawing.views[0]),
                "drawing": drawing.name,
            }
        )
    return items


def _draw_scenes(target: pathlib.Path, amounts: Amounts, size: int) -> dict:
    """Writes the procedural parts, with the captions of all still scenes, and returns the parts' summaries."""
    stories.write(target / "stories", amounts.stories, amounts.edits, size=size)
    summaries = {
        "two_shapes": two_shapes.build(target / "two_shapes", count=amounts.two_shapes, size=size),
        "arrangements": arrangements.build(target / "arrangements", count=amounts.arrangements, size=size),
        "stories": {"stories": amounts.stories, "edits": amounts.edits},
    }
    for name in ("prompts.txt", "held_out.txt"):
        parts = [(target / part / name).read_text() for part in ("two_shapes", "arrangements")]
        (target / f"scene_{name}").write_text("".join(parts))
    return summaries


def _count(items: Iterable[dict]) -> dict[str, dict[str, int]]:
    counts: dict[str, collections.Counter] = {}
    for item in items:
        counts.setdefault(f"{item['source']} {item['look']}", collections.Counter())[item["split"]] += 1
    return {name: dict(sorted(row.items())) | {"all": row.total()} for name, row in counts.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path, metavar="DIR", help="new directory for the data set")
    parser.add_argument(
        "--size", type=int, default=64, metavar="PIXELS", help="side of pictures (default: %(default)s)"
    )
    parser.add_argument("--cache", type=pathlib.Path, metavar="DIR", help="cache of packages (default: DIR-packages)")
    parser.add_argument("--no-clips", action="store_true", help="do not read the animated packages (730 MB)")
    parser.add_argument(
        "--seed", type=int, default=build_emoji.SEED, help="seed of splits and captions (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    cache = given.cache or given.directory.with_name(given.directory.name + "-packages")
    try:
        summary = build(given.directory, cache, size=given.size, clips=not given.no_clips, seed=given.seed)
    except Emu3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for title in ("items", "manifests"):
        for name, count in summary[title].items():
            print(f"{title} {name}: {count}")
    for reason, names in summary["unused"].items():
        print(f"unused, {reason}: {len(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

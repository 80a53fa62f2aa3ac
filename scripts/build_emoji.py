"""Builds captioned emoji pictures and clips from open packages, and coloured shapes.

python scripts/build_emoji.py out/emoji

At 32x32 pixels these were the data of the former embedded model. scripts/build_pictures.py makes those of the one that
the package has; they include what this script makes with --size 64. The directory gets pictures/, clips/, procedural/,
items.jsonl, manifests (*.jsonl), NOTICE and summary.json. The script needs the extra `emoji`, and npm to download
packages that are not in the cache (about 760 MB in all; 30 MB with --no-clips).
"""

import argparse
import collections
import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Iterable, Sequence

import numpy as np
from emoji_data import packages
from emoji_data.concepts import (
    CLIP_STYLE,
    MAIN_GROUPS,
    STYLES,
    Concept,
    held_out_styles,
    is_held_out,
    is_held_out_triple,
    load_concepts,
)
from emoji_data.manifests import build_manifests, write_lines
from emoji_data.packages import Package, fetch
from emoji_data.pictures import load_characters, load_clips, load_drawings, load_pictures
from PIL import Image

from emu3_jax.errors import Emu3Error
from emu3_jax.evaluation import procedural
from emu3_jax.files import new_directory
from emu3_jax.media.clips import load_clip, save_clip
from emu3_jax.progress import each

NOTICE = pathlib.Path(__file__).parent / "emoji_data" / "notice.txt"
ALIKE = 16.0  # two styles draw a concept alike if their mean difference, of 255, is below this; others differ by 38
_COMPARED = 32  # pixels a side at which styles are compared
PROCEDURAL_FPS = 4.0
SMALLER, CLOSEUPS = 5, 6  # numbers of smaller views and close-ups per training picture, so that its codes vary
SEED = 1  # with seed 0, a third of the held-out concepts would be the 24 clock faces
_BYTES_PER_PIXEL = 300_000  # bytes of the whole directory per pixel of a picture: a generous bound for the disk check


@dataclasses.dataclass(frozen=True)
class Sources:
    """The packages to build from."""

    labels: Package = packages.LABELS
    pictures_3d: Package = packages.PICTURES_3D
    drawings: dict[str, Package] = dataclasses.field(default_factory=lambda: packages.DRAWINGS)
    clips: tuple[Package, ...] = packages.CLIPS


class _Unused:
    """Names of unused pictures and clips by reason, for the summary."""

    def __init__(self):
        self._names = collections.defaultdict(list)

    def add(self, reason: str, name: str) -> None:
        self._names[reason].append(name)

    def summary(self) -> dict[str, dict]:
        return {r: {"count": len(names), "names": sorted(names)} for r, names in sorted(self._names.items())}


def build(
    directory: pathlib.Path,
    cache: pathlib.Path,
    *,
    size: int = 32,
    clips: bool = True,
    seed: int = SEED,
    sources: Sources | None = None,
    scenes: tuple[Sequence[procedural.Still], Sequence[procedural.Motion]] | None = None,
) -> dict:
    """Writes the whole data set, or nothing, and returns its summary.

    Args:
        directory: new directory for the data set.
        cache: directory of the packages' tarballs. Nothing in it is ever deleted.
        size: side of pictures and frames in pixels, at least 16.
        clips: whether to read the animated packages.
        seed: seed of splits and captions.
        sources: packages to use instead of the pinned ones.
        scenes: procedural stills and clips to rasterise, by default all.

    Raises:
        Emu3Error: `directory` exists, a package cannot be fetched, or a file cannot be written.
    """
    if size < 16:
        raise Emu3Error(f"size is {size}: the pictures must be at least 16 pixels wide")
    sources = sources or Sources()
    used = [sources.labels, sources.pictures_3d, *sources.drawings.values(), *(sources.clips if clips else ())]
    with new_directory(directory, _BYTES_PER_PIXEL * size**2) as target:
        tarballs = {package: fetch(package, cache) for package in each(used, True, "packages", name="fetching")}
        concepts = load_concepts(tarballs[sources.labels])
        unused = _Unused()
        items, held_clips = _write_pictures(target, sources, tarballs, concepts, size=size, seed=seed, unused=unused)
        if clips:
            paths = [tarballs[package] for package in sources.clips]
            items += _write_clips(target, paths, concepts, size=size, seed=seed, held_clips=held_clips, unused=unused)
        stills, motions = scenes or (list(procedural.all_stills()), list(procedural.all_clips()))
        items += _write_scenes(target, stills, motions, size, seed)
        write_lines(target / "items.jsonl", items)
        manifests = build_manifests(items, concepts.values(), seed)
        for name, lines in manifests.items():
            write_lines(target / f"{name}.jsonl", lines)
        (target / "NOTICE").write_bytes(NOTICE.read_bytes())
        summary = _summarise(items, manifests, used, unused, {"size": size, "clips": clips, "seed": seed})
        (target / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return summary


def _write_pictures(
    target: pathlib.Path,
    sources: Sources,
    tarballs: dict[Package, pathlib.Path],
    concepts: dict[str, Concept],
    *,
    size: int,
    seed: int,
    unused: _Unused,
) -> tuple[list[dict], set[str]]:
    """Writes all pictures. Returns their items, and the codepoints whose clips are held out too."""
    labelled = set(concepts)
    characters = {style: load_characters(tarballs[package]) for style, package in sources.drawings.items()}
    if not characters.get("vintage"):
        characters["vintage"] = characters[
            "noto"
        ]  # the older package has no list of characters, but uses the same names
    loaded = {"3d": load_pictures(tarballs[sources.pictures_3d], labelled, size, SMALLER, CLOSEUPS)}
    for style, package in sources.drawings.items():
        loaded[style] = load_drawings(
            tarballs[package], characters[style], labelled, size, smaller=SMALLER, closeups=CLOSEUPS
        )
    found: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
    for style in STYLES:
        for codepoint, result in each(loaded[style], True, "pictures", name=style):
            if isinstance(result, str):
                unused.add(result, f"{style}/{codepoint}")
            else:
                found[codepoint][style] = result
    items, held_clips = [], set()
    for style in STYLES:
        (target / "pictures" / style).mkdir(parents=True)
    for codepoint, pictures in each(sorted(found.items()), True, "concepts", name="writing"):
        concept = concepts[codepoint]
        held = set(pictures) if is_held_out(concept, seed) else held_out_styles(concept, _alike(pictures), seed)
        if {"3d", "flat"} & held:
            held_clips.add(codepoint)
        for style, pixels in pictures.items():
            name = f"pictures/{style}/{codepoint}"
            split = ("concept" if is_held_out(concept, seed) else "style") if style in held else "train"
            item = _item(name, "picture", style, concept, split)
            if split == "train" and item["group"] in MAIN_GROUPS:
                item["views"] = [f"{name}_{number}.webp" for number in range(1, 1 + SMALLER)]
                item["closeups"] = [f"{name}_{number}.webp" for number in range(1 + SMALLER, 1 + SMALLER + CLOSEUPS)]
            files = [item["file"], *item.get("views", []), *item.get("closeups", [])]
            for file, view in zip(files, pixels, strict=False):
                Image.fromarray(view).save(target / file, lossless=True)
            items.append(item)
    return sorted(items, key=lambda item: (STYLES.index(item["style"]), item["concept"])), held_clips


def _alike(pictures: dict[str, np.ndarray]) -> dict[str, set[str]]:
    """For each style, the set of styles that draw this concept alike. Fluent's 3d and flat always count as alike."""
    groups = {style: {style} for style in pictures}
    compared = {style: _to_compare(views[0]) for style, views in pictures.items()}
    for one, other in itertools.combinations(pictures, 2):
        difference = np.abs(compared[one] - compared[other]).mean()
        if difference < ALIKE or {one, other} == {"3d", "flat"}:
            joined = groups[one] | groups[other]
            groups |= dict.fromkeys(joined, joined)
    return groups


def _to_compare(pixels: np.ndarray) -> np.ndarray:
    """A picture at 32x32 pixels if it is larger, so that pictures of all sizes have the same splits."""
    if len(pixels) > _COMPARED:
        pixels = np.asarray(Image.fromarray(pixels).resize((_COMPARED, _COMPARED), Image.Resampling.LANCZOS))
    return pixels.astype(int)


def _write_clips(
    target: pathlib.Path,
    tarballs: Iterable[pathlib.Path],
    concepts: dict[str, Concept],
    *,
    size: int,
    seed: int,
    held_clips: set[str],
    unused: _Unused,
) -> list[dict]:
    """Writes all clips that move, and returns their items."""
    (target / "clips").mkdir()
    items, labelled = {}, set(concepts)
    for tarball in tarballs:
        for codepoint, frames, fps in each(load_clips(tarball, labelled, size), True, "clips", name="reading"):
            if not isinstance(frames, str) and codepoint in items:
                frames = "second picture of its codepoint"
            if isinstance(frames, str):
                unused.add(frames, f"{CLIP_STYLE}/{codepoint}")
                continue
            name, concept = f"clips/{codepoint}", concepts[codepoint]
            if not _write_clip(frames, target / f"{name}.webp", fps):
                unused.add("frames repeat in pairs", f"{CLIP_STYLE}/{codepoint}")
                continue
            split = "style" if codepoint in held_clips else "train"
            items[codepoint] = _item(
                name, "clip", CLIP_STYLE, concept, "concept" if is_held_out(concept, seed) else split
            )
    return [item for _, item in sorted(items.items())]


def _write_clip(frames: np.ndarray, path: pathlib.Path, fps: float) -> bool:
    """Writes a clip and checks that it can be read back. Encoders merge equal frames, which may lose their number."""
    save_clip(frames, path, fps)
    if np.array_equal(load_clip(path).frames, frames):
        return True
    path.unlink()
    return False


def _write_scenes(
    target: pathlib.Path,
    stills: Sequence[procedural.Still],
    clips: Sequence[procedural.Motion],
    size: int,
    seed: int,
) -> list[dict]:
    """Rasterises and writes the procedural stills and clips, and returns their items."""
    (target / "procedural").mkdir()
    items = []
    for scene in each([*stills, *clips], True, "scenes", name="rasterising"):
        moving = isinstance(scene, procedural.Motion)
        name = "procedural/" + "-".join(dataclasses.astuple(scene)).replace(" ", "-")
        path = target / f"{name}.webp"
        if moving:
            save_clip(procedural.rasterise_clip(scene, size), path, PROCEDURAL_FPS)
        else:
            Image.fromarray(procedural.rasterise_still(scene, size)).save(path, lossless=True)
        kind, last = ("clip", scene.motion) if moving else ("picture", scene.position)
        held = is_held_out_triple(kind, scene.colour, scene.shape, last, seed)
        item = {
            "name": name,
            "file": f"{name}.webp",
            "kind": f"procedural_{kind}",
            "style": "procedural",
            "concept": "",
            "label": scene.caption,
            "tags": [],
            "group": "procedural",
            "subgroup": scene.shape,
            "split": "triple" if held else "train",
        }
        items.append(item | dataclasses.asdict(scene))
    return items


def _item(name: str, kind: str, style: str, concept: Concept, split: str) -> dict:
    return {
        "name": name,
        "file": f"{name}.webp",
        "kind": kind,
        "style": style,
        "concept": concept.codepoint,
        "label": concept.label,
        "tags": list(concept.tags),
        "group": concept.group,
        "subgroup": concept.subgroup,
        "split": split,
    }


def _summarise(
    items: list[dict], manifests: dict[str, list[dict]], used: list[Package], unused: _Unused, arguments: dict
) -> dict:
    counts: dict[str, dict[str, int]] = {}
    for item in items:
        row = counts.setdefault(f"{item['kind']} {item['style']}", collections.Counter())
        row[item["split"]] += 1
    return {
        "arguments": arguments,
        "packages": [dataclasses.asdict(package) for package in used],
        "items": {kind: dict(sorted(row.items())) | {"all": row.total()} for kind, row in counts.items()},
        "manifests": {name: len(lines) for name, lines in manifests.items()},
        "unused": unused.summary(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path, metavar="DIR", help="new directory for the data set")
    parser.add_argument(
        "--size", type=int, default=32, metavar="PIXELS", help="side of pictures (default: %(default)s)"
    )
    parser.add_argument("--cache", type=pathlib.Path, metavar="DIR", help="cache of tarballs (default: DIR-packages)")
    parser.add_argument("--no-clips", action="store_true", help="do not read the animated packages (730 MB)")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of splits and captions (default: %(default)s)")
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
        print(f"unused, {reason}: {names['count']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

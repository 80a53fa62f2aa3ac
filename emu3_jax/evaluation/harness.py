"""Draws the prompts of published benchmarks, and lays the pictures out as the benchmarks' own scorers read them.

The layouts are those that the scorers' sources read:

- GenEval (github.com/djghosh13/geneval, `evaluation/evaluate_images.py`): a folder for each prompt, whose name has only
  digits, with `metadata.jsonl` and `samples/NUMBER.png`.
- DPG-Bench (github.com/TencentQQGYLab/ELLA, `dpg_bench/compute_dpg_bench.py`): one file for each prompt, named by the
  prompt's id, with four pictures in a 2x2 grid. The scorer takes every file of the folder for a picture.
- T2I-CompBench (github.com/Karine-Huang/T2I-CompBench, `BLIPvqa_eval/BLIP_vqa.py`, `UniDet_eval/2D_spatial_eval.py`,
  `CLIPScore_eval/CLIP_similarity.py`): `samples/PROMPT_NUMBER.png`. The scorers read the prompt from the name up to the
  first `_`, and sort by the number, which counts the pictures of all prompts.
"""

import csv
import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from emu3_jax.errors import Emu3Error
from emu3_jax.fields import is_count
from emu3_jax.files import new_file
from emu3_jax.foreign import file_name, parse_json, read_bytes, read_object, reading
from emu3_jax.generation import defaults
from emu3_jax.generation.pictures import Generation
from emu3_jax.generation.pipeline import Emu3
from emu3_jax.media.images import save_png
from emu3_jax.printable import printable, shown
from emu3_jax.text.prompt_files import naming_rows

RUN_FILE = "harness.json"  # what the pictures of a directory are of; no scorer reads it
_MAX_BYTES = 64 << 20  # of a file of prompts
_MAX_NAME = 255  # bytes of a file name on common file systems


@dataclasses.dataclass(frozen=True)
class Item:
    """A prompt and the files that its pictures make.

    Attributes:
        place: how errors call the prompt, such as "prompts.txt line 3".
        prompt: the prompt.
        files: paths of the pictures, relative to the output directory: one for each picture, or a single grid.
        metadata: (relative path, content) of a file beside them, or None.
    """

    place: str
    prompt: str
    files: tuple[str, ...]
    metadata: tuple[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class Harness:
    """A benchmark.

    Attributes:
        title: its name.
        pictures: pictures per prompt that its authors draw.
        fixed: whether the scorer needs exactly so many.
        grid: whether the pictures of a prompt are one file.
        published: number of prompts of a published file.
        read: function that reads a file of prompts and returns an `Item` for each; gets the path and the number of
            pictures per prompt.
        scorer: the scorer's command; DIR is the output directory, SIDE the side of a picture in pixels.
    """

    title: str
    pictures: int
    fixed: bool
    grid: bool
    published: int
    read: Callable[[Path, int], list[Item]]
    scorer: str


def _geneval(path: Path, count: int) -> list[Item]:
    """GenEval's `evaluation_metadata.jsonl`: a JSON object on each line."""
    remedy = "give GenEval's prompts/evaluation_metadata.jsonl"
    items = []
    for number, line in _lines(path, remedy):
        place = f"{path} line {number}"
        metadata = parse_json(line.encode(), place, remedy)
        for field in ("prompt", "tag"):
            if not isinstance(metadata, dict) or not isinstance(metadata.get(field), str):
                raise Emu3Error(f"{place} has no text {field!r}, which GenEval's scorer reads: {remedy}")
        folder = f"{len(items):05}"
        files = tuple(f"{folder}/samples/{picture:04}.png" for picture in range(count))
        items.append(Item(place, metadata["prompt"], files, (f"{folder}/metadata.jsonl", json.dumps(metadata))))
    return items


def _dpg(path: Path, count: int) -> list[Item]:
    """DPG-Bench's `dpg_bench.csv`, or the folder of its prompts with a text file for each."""
    remedy = "give DPG-Bench's dpg_bench/prompts or dpg_bench/dpg_bench.csv"
    prompts: dict[str, str] = {}
    if path.is_dir():
        for file in sorted(path.glob("*.txt")):
            prompts[file.stem] = " ".join(line for _, line in _lines(file, remedy))
        if not prompts:
            raise Emu3Error(f"{path} has no .txt files: {remedy}")
    else:
        rows = csv.DictReader(io.StringIO(_text(path, remedy)))
        for column in ("item_id", "text"):
            if column not in (rows.fieldnames or ()):
                raise Emu3Error(f"{path} has no column {column}: {remedy}")
        with reading(path, remedy):
            for row in rows:  # a row for each question about a picture
                name, text = row["item_id"] or "", " ".join((row["text"] or "").split())
                if prompts.setdefault(name, text) != text:
                    raise Emu3Error(f"{path} line {rows.line_num}: {shown(name)} has two texts: {remedy}")
    items = []
    for name, prompt in prompts.items():
        place = f"{path}, prompt {shown(name)}"
        if "." in file_name(name, str(path)):
            raise Emu3Error(f"{place}: the scorer reads names up to the first full stop: rename it")
        items.append(Item(place, prompt, (f"pictures/{name}.png",)))
    return items


def _t2icompbench(path: Path, count: int) -> list[Item]:
    """A file of T2I-CompBench such as `color_val.txt`: a prompt on each line, up to the first tab."""
    items: list[Item] = []
    bad = []
    for number, line in _lines(path, "give a file of T2I-CompBench's examples/dataset"):
        prompt = line.split("\t")[0].strip()
        first = len(items) * count
        files = tuple(f"samples/{prompt}_{first + picture:06}.png" for picture in range(count))
        if (why := _unnameable(prompt, files[-1])) is not None:
            bad.append(f"line {number} ({shown(prompt)}) {why}")
        items.append(Item(f"{path} line {number}", prompt, files))
    if bad:
        raise Emu3Error(f"{path}: prompts name files here, and these cannot: {'; '.join(bad)}: rephrase them")
    return items


def _unnameable(prompt: str, file: str) -> str | None:
    """Why a prompt cannot be the name of a file that the scorers read, or None."""
    if "_" in prompt:
        return "has _, where the scorers end a prompt"
    if "/" in prompt or "\\" in prompt or prompt != printable(prompt):
        return "has a character that no file name may have"
    if len(file.removeprefix("samples/").encode()) > _MAX_NAME:
        return f"has more than {_MAX_NAME} bytes with its number"
    return None


def _text(path: Path, remedy: str) -> str:
    with reading(path, remedy):
        return read_bytes(path, _MAX_BYTES, remedy).decode("utf-8-sig")


def _lines(path: Path, remedy: str) -> list[tuple[int, str]]:
    """The lines of a file that are not blank, with their numbers from 1."""
    lines = [(number, line.strip("\r\n")) for number, line in enumerate(_text(path, remedy).split("\n"), 1)]
    lines = [(number, line) for number, line in lines if line.strip()]
    if not lines:
        raise Emu3Error(f"{path} has no prompts: {remedy}")
    return lines


HARNESSES = {
    "geneval": Harness("GenEval", 4, False, False, 553, _geneval, "python evaluation/evaluate_images.py DIR"),
    "dpg": Harness("DPG-Bench", 4, True, True, 1065, _dpg, "bash dpg_bench/dist_eval.sh DIR/pictures SIDE"),
    "t2icompbench": Harness(
        "T2I-CompBench", 10, False, False, 300, _t2icompbench, "python BLIPvqa_eval/BLIP_vqa.py --out_dir=DIR"
    ),
}


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What `draw` did.

    Attributes:
        prompts: number of prompts of this host.
        pictures: number of their pictures.
        kept: number of these prompts whose files were there before.
        size: (width, height) of a picture in pixels, or None if all were there.
    """

    prompts: int
    pictures: int
    kept: int
    size: tuple[int, int] | None


def read_items(name: str, path: Path, pictures: int | None = None) -> list[Item]:
    """Reads the prompts of a benchmark.

    Args:
        name: key of `HARNESSES`.
        path: the published file or folder.
        pictures: pictures per prompt; by default as many as the benchmark's authors draw.

    Raises:
        Emu3Error: `path` is no such file, or the scorer cannot read so many pictures or such a prompt.
    """
    harness = HARNESSES[name]
    count = harness.pictures if pictures is None else pictures
    if not is_count(count) or (harness.fixed and count != harness.pictures):
        legal = f"{harness.pictures}" if harness.fixed else "a whole number >= 1"
        raise Emu3Error(f"pictures per prompt are {shown(pictures)}: the scorer of {harness.title} needs {legal}")
    return harness.read(path, count)


def draw(
    model: Emu3,
    name: str,
    items: Sequence[Item],
    output: Path,
    *,
    pictures: int | None = None,
    host: int = 0,
    hosts: int = 1,
    **options: Any,
) -> Drawn:
    """Draws the pictures that are missing in `output`. So a run that was interrupted can be repeated.

    Picture i of prompt p has the seed `seed + p * pictures + i`.

    Args:
        model: the model.
        name: key of `HARNESSES`.
        items: prompts, from `read_items` with the same `pictures`.
        output: a directory; made if absent.
        pictures: pictures per prompt; by default as many as the benchmark's authors draw.
        host, hosts: this process draws every `hosts`-th prompt, from number `host` on.
        **options: those of `Emu3.generate`, such as `guidance`, `seed` and `area`, but not `n`.

    Raises:
        Emu3Error: a prompt is not legal, `output` has pictures of another run, or the disk is full. Finished files
            stay.
    """
    if not 0 <= host < hosts:
        raise Emu3Error(f"host is {host} of {hosts}: it must be from 0 to {hosts - 1}")
    count = HARNESSES[name].pictures if pictures is None else pictures
    claim = _Claim(output, _identity(model, name, items, count, options))
    mine = list(range(host, len(items), hosts))
    todo = [number for number in mine if not _complete(output, items[number])]
    size = None
    if todo:
        first = options.pop("seed", defaults.SEED)
        seeds = [first + number * count for number in todo]
        with naming_rows(lambda row: items[todo[row // count]].place):
            generations = model.stream_sequences(
                [items[number].prompt for number in todo], n=count, seed=seeds, **options
            )
            for place, whole in _groups(generations, count):
                size = whole[0].image.size
                claim.write()  # now, when the options proved legal
                _write(output, items[todo[place]], [one.image for one in whole], HARNESSES[name].grid)
    return Drawn(len(mine), len(mine) * count, len(mine) - len(todo), size)


def _groups(generations: Iterator[tuple[int, Generation]], count: int) -> Iterator[tuple[int, list[Generation]]]:
    """The generations of each prompt, with the prompt's index, as soon as all of them are there."""
    waiting: dict[int, dict[int, Generation]] = {}
    for row, generation in generations:
        group = waiting.setdefault(row // count, {})
        group[row % count] = generation
        if len(group) == count:
            yield row // count, [group[place] for place in range(count)]
            del waiting[row // count]


def _write(output: Path, item: Item, pictures: list[Image.Image], grid: bool) -> None:
    """Writes an item's files. The last one is there only if all are."""
    if item.metadata is not None:
        file = output / item.metadata[0]
        file.parent.mkdir(parents=True, exist_ok=True)
        with new_file(file) as temporary:
            temporary.write_text(item.metadata[1], encoding="utf-8")
    if grid:
        width, height = pictures[0].size
        whole = Image.new("RGB", (2 * width, 2 * height))
        for place, picture in enumerate(pictures):
            whole.paste(picture, (place % 2 * width, place // 2 * height))
        whole.info = pictures[0].info
        pictures = [whole]
    for name, picture in zip(item.files, pictures, strict=True):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        save_png(picture, output / name, {key: str(value) for key, value in picture.info.items()})


def _complete(output: Path, item: Item) -> bool:
    """Whether an item's files are there. They are written in order, each all or nothing."""
    return all((output / name).is_file() for name in item.files)


def _identity(model: Emu3, name: str, items: Sequence[Item], count: int, options: dict[str, Any]) -> dict[str, Any]:
    """What determines the pictures, as it stands in `RUN_FILE`."""
    prompts = hashlib.sha256(json.dumps([item.prompt for item in items]).encode()).hexdigest()
    given = {key: value for key, value in sorted(options.items()) if key != "progress"}
    return {"harness": name, "model": model.name, "prompts": prompts, "pictures": count, **given}


class _Claim:
    """Says in `RUN_FILE` what the pictures of a directory are of."""

    def __init__(self, output: Path, run: dict[str, Any]):
        """Compares `run` with the directory's.

        Raises:
            Emu3Error: the directory holds other files or pictures of another run.
        """
        self._file, self._run = output / RUN_FILE, run
        if self._file.exists():
            remedy = "choose another directory (-o DIR)"
            found = read_object(self._file, remedy)
            differing = [key for key in run if found.get(key) != run[key]]
            if differing:
                raise Emu3Error(f"{output} holds pictures of another run (other {', '.join(differing)}): {remedy}")
            return
        # Other hosts may be writing the same file under a hidden name.
        if output.exists() and any(not path.name.startswith(".") and path != self._file for path in output.iterdir()):
            raise Emu3Error(
                f"{output} holds other files, which a scorer may take for pictures: give an empty directory"
            )

    def write(self) -> None:
        """Writes the file, unless it is there."""
        if not self._file.exists():
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with new_file(self._file) as temporary:
                temporary.write_text(json.dumps(self._run, indent=2) + "\n", encoding="utf-8")

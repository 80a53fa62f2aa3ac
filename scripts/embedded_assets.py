"""Makes a trained bundle the embedded model of the package.

    emu3-jax quantize out/pictures_further/model --quantize int8-weights -o out/pictures_int8
    python scripts/embedded_assets.py out/evaluation_pictures/evaluation.json --bundle out/pictures_int8

The script writes emu3_jax/assets/emoji: the compressed bundle, CARD.md with the figures, NOTICE and SHA256SUMS. Commit
the directory only if you want to keep these weights. Without --bundle, the script keeps the weights and writes only
the card and the checksums.

--about names a directory that describes the model: card.md begins the card, aims.json has the aims of figures by their
paths in evaluation.json, tried.md says what was tried, and notice.txt names the sources of the data.
"""

import argparse
import functools
import json
import pathlib
import shutil
import sys
from typing import Any

import numpy as np

from emu3_jax.checkpoints.bundle import Bundle, decoder_dict
from emu3_jax.checkpoints.checksums import write_checksums
from emu3_jax.checkpoints.embedded import DIRECTORY
from emu3_jax.checkpoints.parts import LazyArray, write_part
from emu3_jax.errors import Emu3Error
from emu3_jax.files import new_directory

LIMIT = 30_000_000  # largest size of the whole directory, in bytes
EMOJI = pathlib.Path(__file__).parent / "emoji_data"  # about the former embedded model, of 32x32 pixels
ABOUT = EMOJI.with_name("picture_data")
NOTICE_OF_WEIGHTS = "The weights in this directory were learned from a data set. Its sources:\n\n"

CARD = """{about}## Figures on data that it never saw

The numbers of cases are in the JSON at the end. "Aim" is the goal that was set when the work began. The judge is a
small classifier that names the thing in a picture. Above 100%, the judge recognises generated pictures more often than
true ones; it was partly trained on this tokenizer's reconstructions.

{table}

{tried}
## All figures, with those of each guidance scale

```json
{figures}
```
"""

# Title, format of numbers, path of the figure. Its aim is in `aims.json`, if there is one.
_ROWS = (
    ("Reconstruction of unseen concepts: PSNR", "{:.1f} dB", "reconstruction.pictures.psnr_db"),
    ("Reconstruction of unseen concepts: SSIM", "{:.3f}", "reconstruction.pictures.ssim"),
    ("Codebook in use", "{:.0f}%", "reconstruction.codebook.use_percent"),
    ("Reconstruction of unseen clips: PSNR", "{:.1f} dB", "reconstruction.clips.psnr_db"),
    ("Top-1 of the judge on true pictures in unseen styles", "{:.1%}", "text_to_image.ceilings.truth.top1"),
    (
        "Generated pictures in unseen styles: top-1, divided by top-1 on true pictures",
        "{:.1%}",
        "best.top1_share_of_truth",
    ),
    (
        "Generated pictures in unseen styles: top-5, divided by top-5 on true pictures",
        "{:.1%}",
        "best.top5_share_of_truth",
    ),
    ("Without guidance: top-1, divided by top-1 on true pictures", "{:.1%}", "unguided.top1_share_of_truth"),
    ("Prompts as people write them, of which the judge knows a concept: top-1", "{:.1%}", "people.top1"),
    ("The same: top-5", "{:.1%}", "people.top5"),
    ("Generated pictures: mean distance to the nearest training picture", "{:.4f}", "best.nearest_training_distance"),
    (
        "True pictures: mean distance to the nearest training picture",
        "{:.4f}",
        "text_to_image.nearness_of_references.truth.nearest_training_distance",
    ),
    ("Descriptions of unseen pictures: style right", "{:.1%}", "image_to_text.description.style_right"),
    ("Descriptions of unseen pictures: label exact", "{:.1%}", "image_to_text.description.label_exact"),
    ("Category of unseen concepts right", "{:.1%}", "image_to_text.category.right"),
    (
        "Descriptions of single shapes in unseen combinations: caption exact",
        "{:.1%}",
        "image_to_text.shapes.caption_exact",
    ),
    (
        "Descriptions of moving shapes in unseen combinations: caption exact",
        "{:.1%}",
        "image_to_text.clips.caption_exact",
    ),
    (
        "Descriptions of moving shapes in unseen combinations: motion right",
        "{:.1%}",
        "image_to_text.clips.motion_right",
    ),
    ("Shapes in unseen combinations: colour, shape and place all right", "{:.1%}", "procedural.stills.all_right"),
    ("Two shapes in unseen pairs: all right", "{:.1%}", "two_shapes.all_right"),
    ("Counts of shapes that are not in the training: all right", "{:.1%}", "arrangements.counted_all_right"),
    ("Rows of shapes that are not in the training: all right", "{:.1%}", "arrangements.rows_all_right"),
    ("Moving shapes in unseen combinations: all right", "{:.1%}", "procedural.clips.all_right"),
    ("Moving shapes in unseen combinations: motion right", "{:.1%}", "procedural.clips.motion_right"),
    (
        "Moving shapes, first half given: motion of the second half right",
        "{:.1%}",
        "procedural.extensions.motion_right",
    ),
    ("Moving shapes, first half given: second half all right", "{:.1%}", "procedural.extensions.all_right"),
    (
        "Generated clips of unseen subjects: absolute frame differences, divided by those of true clips",
        "{:.2f}",
        "motion.difference_ratio",
    ),
    (
        "Reconstructions of true clips: absolute frame differences, divided likewise",
        "{:.2f}",
        "motion.reconstruction_difference_ratio",
    ),
    (
        "Generated clips of unseen subjects: squared frame differences, divided by those of true clips",
        "{:.2f}",
        "motion.ratio",
    ),
    (
        "Reconstructions of true clips: squared frame differences, divided likewise",
        "{:.2f}",
        "motion.reconstruction_ratio",
    ),
    ("Edits of unseen subjects: all right", "{:.1%}", "stories.edits.all_right"),
    ("Stories told sentence by sentence: number of pictures right", "{:.1%}", "stories.told.count_right"),
    ("Stories told sentence by sentence: number, order and pictures all right", "{:.1%}", "stories.told.all_right"),
    ("Stories that the model invents: number of pictures right", "{:.1%}", "stories.free.count_right"),
    ("Stories that the model invents: number, order and pictures all right", "{:.1%}", "stories.free.all_right"),
)


def table(figures: dict[str, Any], aims: dict[str, str]) -> str:
    """The Markdown table of the figures that were measured, beside their aims."""
    drawn, people = (figures.get(name, {}) for name in ("text_to_image", "people_prompts"))
    known = {
        "best": _point(drawn, drawn.get("best_guidance")),
        "unguided": _point(drawn, 1.0),
        "people": _point(people, people.get("best_guidance")),
        **figures,
    }
    lines = ["| What | Aim | Got |", "|---|---|---|"]
    for title, form, path in _ROWS:
        value: Any = known
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            lines.append(f"| {title} | {aims.get(path, '')} | {form.format(value)} |")
    return "\n".join(lines)


def _point(figure: dict[str, Any], scale: float | None) -> dict[str, Any]:
    """The point of the figure's guidance curve at this scale, or an empty dict."""
    return next((point for point in figure.get("guidance", ()) if point["scale"] == scale), {})


def write_assets(
    source: pathlib.Path, figures: dict[str, Any], target: pathlib.Path = DIRECTORY, about: pathlib.Path = ABOUT
) -> int:
    """Replaces `target` by the bundle `source`, whole or quantised, with its card. Returns its size in bytes.

    The files of a part whose weights stay the same stay the same, too: the repository would keep both versions.

    Raises:
        Emu3Error: the bundle lacks a part, or the directory would be larger than `LIMIT`.
    """
    bundle = Bundle.open(source)
    for part in ("decoder", "vision", "tokenizer"):
        bundle.require(part)
    configs = {
        "decoder": decoder_dict(bundle.decoder_config, bundle.quantize),
        "vision": {
            "vision": bundle.vision_config.to_dict(),
            "image": bundle.image_config.to_dict(),
            "num_batches_tracked": {},
        },
    }
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    new = target.with_name(target.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    with new_directory(new, LIMIT) as temporary:
        for part, config in configs.items():
            arrays = [_held(path, array) for path, array in bundle.stored_arrays(part)]
            if _unchanged(target, part, config, arrays):
                shutil.copytree(target / part, temporary / part)
                continue
            write_part(temporary / part, config, arrays, compressed=True)
        shutil.copytree(bundle.path / "tokenizer", temporary / "tokenizer")
        (temporary / "NOTICE").write_text(NOTICE_OF_WEIGHTS + _notice(about))
        write_card(temporary, figures, about)
        size = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file())
        if size > LIMIT:
            raise Emu3Error(
                f"{source} takes {size / 1e6:.1f} MB, the limit is {LIMIT / 1e6:.0f} MB: train a smaller model"
            )
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return size


def write_card(assets: pathlib.Path, figures: dict[str, Any], about: pathlib.Path = ABOUT) -> None:
    """Writes CARD.md with the figures into the bundle `assets`, and updates its checksums."""
    bundle = Bundle.open(assets)
    decoder, vision = bundle.decoder_config, bundle.vision_config
    sizes = {
        part: sum(int(np.prod(param.shape)) for param in bundle.params(part)) / 1e6 for part in ("decoder", "vision")
    }
    side = round(decoder.image_area**0.5)
    about_it = (about / "card.md").read_text()
    described = about_it.format(
        vision=sizes["vision"],
        codes=vision.codebook_size,
        side=side,
        grid=side // vision.spatial_factor,
        decoder=sizes["decoder"],
        layers=decoder.num_layers,
        width=decoder.hidden_size,
    )
    card = CARD.format(
        about=described,
        table=table(figures, json.loads((about / "aims.json").read_text())),
        tried=(about / "tried.md").read_text(),
        figures=json.dumps(figures, indent=2),
    )
    (assets / "CARD.md").write_text(card)
    write_checksums(assets)


def _notice(about: pathlib.Path) -> str:
    """What the data's notice says. All data hold emoji, whose notice follows."""
    notice = (about / "notice.txt").read_text()
    if about == EMOJI:
        return notice
    return notice.replace("emoji/NOTICE", "the notice below") + "\n" + (EMOJI / "notice.txt").read_text()


def _unchanged(target: pathlib.Path, part: str, config: dict[str, Any], arrays: list[LazyArray]) -> bool:
    """Whether the bundle `target` has this part already, with this config and these weights."""
    if not target.exists():
        return False
    bundle = Bundle.open(target)
    if not bundle.has(part):
        return False
    written = json.loads((target / part / "config.json").read_text())  # has further entries, of the files
    if any(written.get(name) != value for name, value in json.loads(json.dumps(config)).items()):
        return False
    there = dict(bundle.stored_arrays(part))
    return there.keys() == {array.path for array in arrays} and all(
        there[array.path].dtype == array.dtype and np.array_equal(there[array.path], array.load()) for array in arrays
    )


def _held(path: tuple[str, ...], array: np.ndarray) -> LazyArray:
    return LazyArray(path, array.shape, array.dtype, functools.partial(np.asarray, array))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=pathlib.Path, metavar="evaluation.json")
    parser.add_argument("--bundle", type=pathlib.Path, help="bundle with new weights (default: keep the package's)")
    parser.add_argument("--about", type=pathlib.Path, default=ABOUT, metavar="DIR", help="default: %(default)s")
    options = parser.parse_args()
    try:
        figures = json.loads(options.figures.read_text())
        if options.bundle is None:
            write_card(DIRECTORY, figures, options.about)
        else:
            print(f"{DIRECTORY}: {write_assets(options.bundle, figures, about=options.about) / 1e6:.1f} MB")
    except (Emu3Error, OSError, ValueError) as error:
        sys.exit(f"embedded_assets: error: {error}")

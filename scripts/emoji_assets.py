"""Makes a trained bundle the embedded model of the package.

    python scripts/emoji_assets.py out/evaluation/evaluation.json --bundle out/emoji_sft/model

The script writes emu3_jax/assets/emoji: the compressed bundle, CARD.md with the figures, NOTICE and SHA256SUMS. Commit
the directory only if you want to keep these weights. Without --bundle, the script keeps the weights and writes only
the card and the checksums.
"""

import argparse
import functools
import json
import pathlib
import shutil
import sys
from typing import Any

import numpy as np

from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.checkpoints.checksums import write_checksums
from emu3_jax.checkpoints.embedded import DIRECTORY
from emu3_jax.checkpoints.parts import LazyArray, write_part
from emu3_jax.errors import Emu3Error
from emu3_jax.files import new_directory

LIMIT = 30_000_000  # largest size of the whole directory, in bytes
NOTICE = pathlib.Path(__file__).parent / "emoji_data" / "notice.txt"
TRIED = NOTICE.with_name("tried.md")
NOTICE_OF_WEIGHTS = "The weights in this directory were learned from a data set of emoji. Its sources:\n\n"

CARD = """# The embedded model

A small Emu3. The vision tokenizer has {vision:.1f} M parameters (causal 3D VQ, {codes:,} codes, {side}x{side} pixels
to {grid}x{grid} codes). The decoder has {decoder:.1f} M parameters ({layers} layers, width {width}). The model draws
emoji from text, describes and classifies them, and makes short clips. It is for trying out, testing and measuring this
package. It knows nothing but emoji.

- Data and licences: see NOTICE. `scripts/build_emoji.py` makes the data.
- Recipe: `bash scripts/emoji_model.sh` with the configs `vision_emoji.py`, `emoji_pretrain.py` and `emoji_sft.py`.
- Limits: pictures have {side}x{side} pixels, clips have eight frames. A word that was in no training caption gives
  some emoji, not what the word says. A photograph is described as the emoji that it resembles.

## Figures on data that it never saw

`emu3-jax evaluate configs/eval_emoji.py` printed these figures. The numbers of cases are in the JSON at the end. "Aim"
is the goal that was set when the work began. The judge is a small classifier that names the thing in a picture. Above
100%, the judge recognises generated pictures more often than true ones; it was partly trained on this tokenizer's
reconstructions.

{table}

{tried}
## All figures, with those of each guidance scale

```json
{figures}
```
"""

# Title, goal (a number, or text that is shown as it is), format of numbers, path of the figure.
_ROWS = (
    ("Reconstruction of unseen concepts: PSNR", 26.0, "{:.1f} dB", "reconstruction.pictures.psnr_db"),
    ("Reconstruction of unseen concepts: SSIM", 0.90, "{:.3f}", "reconstruction.pictures.ssim"),
    ("Codebook in use", 80.0, "{:.0f}%", "reconstruction.codebook.use_percent"),
    ("Reconstruction of unseen clips: PSNR", None, "{:.1f} dB", "reconstruction.clips.psnr_db"),
    ("Top-1 of the judge on true pictures in unseen styles", None, "{:.1%}", "text_to_image.ceilings.truth.top1"),
    (
        "Generated pictures in unseen styles: top-1, divided by top-1 on true pictures",
        0.70,
        "{:.1%}",
        "best.top1_share_of_truth",
    ),
    (
        "Generated pictures in unseen styles: top-5, divided by top-5 on true pictures",
        0.85,
        "{:.1%}",
        "best.top5_share_of_truth",
    ),
    ("Without guidance: top-1, divided by top-1 on true pictures", None, "{:.1%}", "unguided.top1_share_of_truth"),
    (
        "Generated pictures: mean distance to the nearest training picture",
        None,
        "{:.4f}",
        "best.nearest_training_distance",
    ),
    (
        "True pictures: mean distance to the nearest training picture",
        None,
        "{:.4f}",
        "text_to_image.nearness_of_references.truth.nearest_training_distance",
    ),
    ("Descriptions of unseen pictures: style right", 0.95, "{:.1%}", "image_to_text.description.style_right"),
    ("Descriptions of unseen pictures: label exact", 0.60, "{:.1%}", "image_to_text.description.label_exact"),
    ("Category of unseen concepts right", 0.60, "{:.1%}", "image_to_text.category.right"),
    (
        "Descriptions of moving shapes in unseen combinations: caption exact",
        None,
        "{:.1%}",
        "image_to_text.clips.caption_exact",
    ),
    (
        "Descriptions of moving shapes in unseen combinations: motion right",
        None,
        "{:.1%}",
        "image_to_text.clips.motion_right",
    ),
    ("Shapes in unseen combinations: colour, shape and place all right", 0.95, "{:.1%}", "procedural.stills.all_right"),
    ("Moving shapes in unseen combinations: all right", 0.95, "{:.1%}", "procedural.clips.all_right"),
    ("Moving shapes in unseen combinations: motion right", 0.90, "{:.1%}", "procedural.clips.motion_right"),
    (
        "Moving shapes, first half given: motion of the second half right",
        0.90,
        "{:.1%}",
        "procedural.extensions.motion_right",
    ),
    ("Moving shapes, first half given: second half all right", 0.90, "{:.1%}", "procedural.extensions.all_right"),
    (
        "Generated clips of unseen subjects: absolute frame differences, divided by those of true clips",
        "0.5 to 2",
        "{:.2f}",
        "motion.difference_ratio",
    ),
    (
        "Reconstructions of true clips: absolute frame differences, divided likewise",
        None,
        "{:.2f}",
        "motion.reconstruction_difference_ratio",
    ),
    (
        "Generated clips of unseen subjects: squared frame differences, divided by those of true clips",
        "0.5 to 2",
        "{:.2f}",
        "motion.ratio",
    ),
    (
        "Reconstructions of true clips: squared frame differences, divided likewise",
        None,
        "{:.2f}",
        "motion.reconstruction_ratio",
    ),
)


def table(figures: dict[str, Any]) -> str:
    """The Markdown table of the figures that were measured, beside their goals."""
    curve = figures.get("text_to_image", {}).get("guidance", [])
    best = figures.get("text_to_image", {}).get("best_guidance")
    points = {"best": [p for p in curve if p["scale"] == best], "unguided": [p for p in curve if p["scale"] == 1.0]}
    known = figures | {name: found[0] for name, found in points.items() if found}
    lines = ["| What | Aim | Got |", "|---|---|---|"]
    for title, aim, form, path in _ROWS:
        value: Any = known
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            wanted = (aim or "") if isinstance(aim, str | None) else form.format(aim)
            lines.append(f"| {title} | {wanted} | {form.format(value)} |")
    return "\n".join(lines)


def write_assets(source: pathlib.Path, figures: dict[str, Any], target: pathlib.Path = DIRECTORY) -> int:
    """Replaces `target` by the bundle `source` with its card. Returns its size in bytes.

    Raises:
        Emu3Error: the bundle lacks a part, or the directory would be larger than `LIMIT`.
    """
    bundle = Bundle.open(source)
    for part in ("decoder", "vision", "tokenizer"):
        bundle.require(part)
    configs = {
        "decoder": bundle.decoder_config.to_dict(),
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
            arrays = [_held(param.path, array) for param, array in bundle.arrays(part)]
            write_part(temporary / part, config, arrays, compressed=True)
        shutil.copytree(bundle.path / "tokenizer", temporary / "tokenizer")
        (temporary / "NOTICE").write_text(NOTICE_OF_WEIGHTS + NOTICE.read_text())
        write_card(temporary, figures)
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


def write_card(assets: pathlib.Path, figures: dict[str, Any]) -> None:
    """Writes CARD.md with the figures into the bundle `assets`, and updates its checksums."""
    bundle = Bundle.open(assets)
    decoder, vision = bundle.decoder_config, bundle.vision_config
    sizes = {
        part: sum(int(np.prod(array.shape)) for _, array in bundle.arrays(part)) / 1e6 for part in ("decoder", "vision")
    }
    side = round(decoder.image_area**0.5)
    card = CARD.format(
        vision=sizes["vision"],
        codes=vision.codebook_size,
        side=side,
        grid=side // vision.spatial_factor,
        decoder=sizes["decoder"],
        layers=decoder.num_layers,
        width=decoder.hidden_size,
        table=table(figures),
        tried=TRIED.read_text(),
        figures=json.dumps(figures, indent=2),
    )
    (assets / "CARD.md").write_text(card)
    write_checksums(assets)


def _held(path: tuple[str, ...], array: np.ndarray) -> LazyArray:
    return LazyArray(path, array.shape, array.dtype, functools.partial(np.asarray, array))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=pathlib.Path, metavar="evaluation.json")
    parser.add_argument("--bundle", type=pathlib.Path, help="bundle with new weights (default: keep the package's)")
    options = parser.parse_args()
    try:
        figures = json.loads(options.figures.read_text())
        if options.bundle is None:
            write_card(DIRECTORY, figures)
        else:
            print(f"{DIRECTORY}: {write_assets(options.bundle, figures) / 1e6:.1f} MB")
    except (Emu3Error, OSError, ValueError) as error:
        sys.exit(f"emoji_assets: error: {error}")

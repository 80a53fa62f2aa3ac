"""The figure "text_to_image": do generated pictures show what the prompt asks for, and are they memorised?

The judge scores them. Its scores on real pictures and on reconstructions are given as upper bounds.
"""

from typing import Any

import numpy as np

from emu3_jax.evaluation import metrics
from emu3_jax.evaluation.config import EvaluateConfig
from emu3_jax.evaluation.items import Data, Item, choose
from emu3_jax.evaluation.judge import Judge, judge_of
from emu3_jax.evaluation.page import Cell, Curve, Row, Section
from emu3_jax.evaluation.reconstruction import Reconstructor
from emu3_jax.generation.pipeline import Emu3


def choose_cases(data: Data, config: EvaluateConfig) -> tuple[list[Item], list[Item]]:
    """The held-out pictures that the figure may ask for, and those of them whose captions it uses as prompts.

    A picture is held out if training has its concept, but in other styles only.
    """
    known = {item.concept for item in data.where("picture", "train", config.groups)}
    held_out = [item for item in data.where("picture", "style", config.groups) if item.concept in known]
    return held_out, choose(held_out, config.cases, config.seed, "text_to_image")


def generate(
    model: Emu3,
    prompts: list[str],
    side: tuple[int, int],
    *,
    guidance: float,
    config: EvaluateConfig,
    progress: bool | None,
) -> np.ndarray:
    """Generates one picture per prompt, uint8 [N, H, W, 3] with (H, W) = `side`.

    All guidance scales use the same seeds.
    """
    height, width = side
    made = model.generate_sequences(
        prompts,
        ratio=f"{width}:{height}",
        area=height * width,
        guidance=guidance,
        progress=progress,
        **config.sampling,
    )
    return np.stack([np.asarray(one.image) for one in made])


def measure(
    model: Emu3,
    data: Data,
    config: EvaluateConfig,
    reconstruct: Reconstructor,
    *,
    skipped: dict[str, str],
    progress: bool | None,
) -> tuple[dict[str, Any], list[Section]]:
    """Scores generated pictures of held-out pairs of concept and style, at every guidance scale.

    Two shares measure memorisation; distances are mean absolute pixel differences:

    - `memorised`: the picture is nearer to a training picture than the average reconstruction of a training picture is
      to its original. This average makes plain drawings look memorised.
    - `copied`: the picture is at least as near to its nearest training picture as that picture's own reconstruction.
      A perfect copy could not be nearer.

    Both shares are also given for the true held-out pictures and for their reconstructions, because some of these have
    near twins among the training pictures.

    Args:
        model: model to evaluate.
        data: evaluation data.
        config: config of the evaluation.
        reconstruct: the model's vision tokenizer.
        skipped: gets the reason if nothing can be measured.
        progress: as in `progress.Progress`.

    Returns:
        The figures, and the sections of the page.
    """
    training = data.where("picture", "train", config.groups)
    held_out, cases = choose_cases(data, config)
    if not cases:
        skipped["text_to_image"] = (
            "the data has no pictures in a held-out style whose concept is in the training pictures"
        )
        return {}, []
    judge, train_pixels = judge_of(data, config.judge, config.groups, reconstruct, reconstruct.digest(), progress)
    held_out_pixels = data.pixels(held_out, progress)
    concepts, prompts = [item.concept for item in cases], [item.caption for item in cases]
    truth = data.pixels(cases)
    again = reconstruct(truth)

    def score(pixels: np.ndarray) -> dict[str, float]:
        return _top(judge.ranks(pixels, concepts, 4 * config.batch_size))

    some = data.pixels(choose(training, config.cases, config.seed, "text_to_image.training"))
    loss = float(metrics.distance(some, reconstruct(some)).mean())

    def closeness(pixels: np.ndarray) -> dict[str, float]:
        indices, distances = metrics.nearest(pixels, train_pixels)
        twins = train_pixels[indices]
        return {
            "nearest_training_distance": float(distances.mean()),
            "memorised": float((distances < loss).mean()),
            "copied": float((distances <= metrics.distance(twins, reconstruct(twins))).mean()),
        }

    ceilings = {"truth": score(truth), "reconstruction": score(again)}
    references = {"truth": closeness(truth), "reconstruction": closeness(again)}
    curve, pictures = [], {}
    for scale in config.guidance:
        pictures[scale] = generate(model, prompts, truth.shape[1:3], guidance=scale, config=config, progress=progress)
        scores = score(pictures[scale])
        shares = {
            f"{name}_share_of_{ceiling}": scores[name] / values[name] if values[name] else None
            for ceiling, values in ceilings.items()
            for name in scores
        }
        curve.append({"scale": scale, **scores, **shares, **closeness(pictures[scale])})
    best = max(curve, key=lambda point: point["top1"])["scale"]
    figures = {
        "cases": len(cases),
        "judge": {
            "file": judge.file and judge.file.name,
            "parameters": judge.parameters,
            "concepts": len(judge.concepts),
            "training_pictures": judge.pictures,
            "cases": len(held_out),
            **_top(judge.ranks(held_out_pixels, [item.concept for item in held_out], 4 * config.batch_size)),
        },
        "ceilings": ceilings,
        "training_reconstruction_distance": {"cases": len(some), "mean": loss},
        "nearness_of_references": references,
        "best_guidance": best,
        "guidance": curve,
    }
    columns = {"truth": truth, "reconstruction": again, f"generated, guidance {best:g}": pictures[best]}
    return figures, [_section(data, config, judge, cases, columns=columns, curve=curve)]


def _top(ranks: np.ndarray) -> dict[str, float]:
    return {"top1": float((ranks < 1).mean()), "top5": float((ranks < 5).mean())}


def _section(
    data: Data,
    config: EvaluateConfig,
    judge: Judge,
    cases: list[Item],
    *,
    columns: dict[str, np.ndarray],
    curve: list[dict[str, Any]],
) -> Section:
    """The section of the page. `columns` maps a column's title to the pictures of all cases."""
    shown = cases[: config.rows]
    labels = {item.concept: item.label for item in data.where("picture", "train", config.groups)}
    cells = []
    for name, pixels in columns.items():
        pixels = pixels[: len(shown)]
        verdicts = judge.verdicts(pixels, 4 * config.batch_size) if shown else []
        cells.append(
            [
                Cell(f"{name}; judge: {labels[verdict]}", picture, verdict == item.concept)
                for item, picture, verdict in zip(shown, pixels, verdicts, strict=True)
            ]
        )
    rows = tuple(Row(item.caption, row) for item, *row in zip(shown, *cells, strict=True))
    scales = tuple(point["scale"] for point in curve)
    lines = {name: tuple(point[name] for point in curve) for name in ("top1", "top5")}
    return Section(
        "Text to image",
        "Held-out pairs of concept and style. A green frame means that the judge names the right concept.",
        rows,
        Curve("guidance scale", scales, lines),
    )

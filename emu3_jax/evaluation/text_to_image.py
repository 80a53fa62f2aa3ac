"""Whether generated pictures show what was asked for, beside the judge's ceilings, and whether they were memorised."""

from typing import Any

import numpy as np

from emu3_jax.evaluation import metrics
from emu3_jax.evaluation.config import EvaluateConfig
from emu3_jax.evaluation.items import Data, Item, choose
from emu3_jax.evaluation.judge import Judge, get_judge
from emu3_jax.evaluation.page import Cell, Curve, Row, Section
from emu3_jax.evaluation.reconstruction import Reconstructor
from emu3_jax.generation.pipeline import Emu3


def generate(
    model: Emu3,
    prompts: list[str],
    side: tuple[int, int],
    *,
    guidance: float,
    config: EvaluateConfig,
    progress: bool | None,
) -> np.ndarray:
    """Pictures of the prompts, uint8 [N, H, W, 3], of `side` = (H, W); the same seeds at every guidance scale."""
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
    """Scores on pairs of concept and style that are held out, at every guidance scale.

    A picture counts as memorised if it is nearer to a training picture than reconstructions of training pictures are to
    their originals on average. That average is unkind to plain drawings, so a second share goes by the twin alone:
    a generated picture counts as copied if it is no farther from its nearest training picture than the tokenizer's
    reconstruction of that training picture is: a perfect copy could not come nearer. Reconstructions of the true
    held-out pictures, some of which have near twins among the training pictures, are counted the same way.

    Returns:
        the figures, and the page's sections.
    """
    training = data.where("picture", "train", config.groups)
    known = {item.concept for item in training}
    held_out = [item for item in data.where("picture", "style", config.groups) if item.concept in known]
    cases = choose(held_out, config.cases, config.seed, "text_to_image")
    if not cases:
        skipped["text_to_image"] = "the data have no pictures of a held-out style whose concept is in training"
        return {}, []
    train_pixels, held_out_pixels = data.pixels(training, progress), data.pixels(held_out, progress)
    judge = get_judge(
        data.directory,
        config.judge,
        train_pixels,
        [item.concept for item in training],
        reconstruct=lambda: reconstruct(train_pixels),
        tokenizer=reconstruct.digest(),
        progress=progress,
    )
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
    """The page's section; `columns` are pictures of all cases, by what they are."""
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
        "Pairs of concept and style that are held out; what the judge sees is green where it is right.",
        rows,
        Curve("guidance scale", scales, lines),
    )

"""The figure "arrangements": do pictures of several shapes have the number, kinds and order that the prompt names?

The prompts are drawn at random among arrangements that are held out of training. The answers are read from the pixels
(see `arrangements`).
"""

from typing import Any

import numpy as np

from emu3_jax.errors import Emu3Error
from emu3_jax.evaluation.arrangements import ATTRIBUTES, SMALLEST_SIDE, draw_arrangement, rasterise, read, right
from emu3_jax.evaluation.config import EvaluateConfig
from emu3_jax.evaluation.page import Cell, Row, Section
from emu3_jax.evaluation.text_to_image import generate
from emu3_jax.generation.pipeline import Emu3

_CASES = 256  # if the config does not say


def measure(model: Emu3, config: EvaluateConfig, *, progress: bool | None) -> tuple[dict[str, Any], list[Section]]:
    """Measures the shares of right attributes.

    Args:
        model: model to evaluate.
        config: config of the evaluation.
        progress: as in `progress.Progress`.

    Returns:
        The figures (shares from 0 to 1), and the sections of the page. `counted_all_right` and `rows_all_right` are
        `all_right` of the counted shapes and of the rows and columns.

    Raises:
        Emu3Error: the model's pictures are too small to be read.
    """
    rng, side = np.random.default_rng([config.seed, 3]), round(model.language.config.image_area**0.5)
    if side < SMALLEST_SIDE:
        raise Emu3Error(
            f"figures names arrangements: the model's pictures have {side} pixels a side, at least {SMALLEST_SIDE} are "
            "needed; take another model or leave the figure out"
        )
    wanted = [draw_arrangement(rng, unseen=True) for _ in range(config.cases or _CASES)]
    options = {"guidance": config.procedural_guidance, "config": config, "progress": progress}
    made = generate(model, [scene.caption for scene in wanted], (side, side), **options)
    seen = [read(pixels) for pixels in made]
    grades = [right(scene, one) for scene, one in zip(wanted, seen, strict=True)]
    shares = np.array([[grade[name] for name in ATTRIBUTES] for grade in grades])
    whole, in_rows = shares.all(axis=1), np.array([scene.order is not None for scene in wanted])
    figures = {
        "cases": len(wanted),
        **{f"{name}_right": float(share) for name, share in zip(ATTRIBUTES, shares.mean(axis=0), strict=True)},
        "all_right": float(whole.mean()),
        **{
            f"{name}_all_right": float(whole[chosen].mean()) if chosen.any() else None
            for name, chosen in (("counted", ~in_rows), ("rows", in_rows))
        },
        "guidance": config.procedural_guidance,
    }
    rows = []
    for scene, pixels, one, ok in list(zip(wanted, made, seen, whole, strict=True))[: config.rows]:
        told = "; ".join(f"{colour or '?'} {shape or '?'}" for colour, shape, _ in one.shapes) or "nothing"
        truth = rasterise(scene, side, np.random.default_rng(0))
        rows.append(Row(scene.caption, (Cell("truth", truth), Cell(f"read: {told}", pixels, bool(ok)))))
    text = "Arrangements that training does not see. A green frame means that all is right."
    return figures, [Section("Several shapes", text, tuple(rows))]

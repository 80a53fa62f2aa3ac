"""The figure "two_shapes": do pictures of two shapes have the colours, forms and relation that the prompt names?

The prompts are drawn at random among pairs of shapes that are held out of training. The answers are read from the
pixels (see `relations`).
"""

from typing import Any

import numpy as np

from emu3_jax.evaluation.config import EvaluateConfig
from emu3_jax.evaluation.page import Cell, Row, Section
from emu3_jax.evaluation.relations import ATTRIBUTES, draw_two_shapes, rasterise, read, right
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
        The figures (shares from 0 to 1), and the sections of the page. `mean_right` is the mean share of attributes
        that are right, which is the reward `procedural`.
    """
    rng, side = np.random.default_rng([config.seed, 2]), round(model.language.config.image_area**0.5)
    wanted = [draw_two_shapes(rng, unseen=True) for _ in range(config.cases or _CASES)]
    options = {"guidance": config.procedural_guidance, "config": config, "progress": progress}
    made = generate(model, [scene.caption for scene in wanted], (side, side), **options)
    seen = [read(pixels) for pixels in made]
    grades = [right(scene, one) for scene, one in zip(wanted, seen, strict=True)]
    shares = np.array([[grade[name] for name in ATTRIBUTES] for grade in grades])
    figures = {
        "cases": len(wanted),
        **{f"{name}_right": float(share) for name, share in zip(ATTRIBUTES, shares.mean(axis=0), strict=True)},
        "mean_right": float(shares.mean()),
        "all_right": float(shares.all(axis=1).mean()),
        "guidance": config.procedural_guidance,
    }
    rows = []
    for scene, pixels, one, ok in list(zip(wanted, made, seen, shares.all(axis=1), strict=True))[: config.rows]:
        told = "; ".join(f"{colour or '?'} {shape or '?'}" for colour, shape, _ in one.shapes) or "nothing"
        rows.append(
            Row(scene.caption, (Cell("truth", rasterise(scene, side)), Cell(f"read: {told}", pixels, bool(ok))))
        )
    text = "Pairs of shapes that training does not see together. A green frame means that all is right."
    return figures, [Section("Two shapes", text, tuple(rows))]

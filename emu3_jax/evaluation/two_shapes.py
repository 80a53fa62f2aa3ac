"""The figure "two_shapes": do pictures of two shapes have the colours, forms and relation that the prompt names?

The prompts are drawn at random among pairs of shapes that are held out of training. The answers are read from the
pixels (see `relations`).
"""

from typing import Any

import numpy as np

from emu3_jax.evaluation.config import EvaluateConfig
from emu3_jax.evaluation.drawn_scenes import CASES, grade
from emu3_jax.evaluation.page import Section
from emu3_jax.evaluation.relations import ATTRIBUTES, draw_two_shapes, rasterise, read, right
from emu3_jax.generation.pipeline import Emu3


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
    wanted = [draw_two_shapes(rng, unseen=True) for _ in range(config.cases or CASES)]
    graded = grade(model, wanted, read, right, ATTRIBUTES, config, side, progress)
    figures = {
        "cases": len(wanted),
        **graded.figures,
        "mean_right": float(graded.shares.mean()),
        "all_right": float(graded.whole.mean()),
        "guidance": config.procedural_guidance,
    }
    rows = graded.rows(config.rows, lambda scene: rasterise(scene, side))
    text = "Pairs of shapes that training does not see together. A green frame means that all is right."
    return figures, [Section("Two shapes", text, rows)]

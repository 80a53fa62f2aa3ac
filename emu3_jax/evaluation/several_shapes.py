"""The figure "arrangements": do pictures of several shapes have the number, kinds and order that the prompt names?

The prompts are drawn at random among arrangements that are held out of training. The answers are read from the pixels
(see `arrangements`).
"""

from typing import Any

import numpy as np

from emu3_jax.errors import Emu3Error
from emu3_jax.evaluation.arrangements import ATTRIBUTES, SMALLEST_SIDE, draw_arrangement, rasterise, read, right
from emu3_jax.evaluation.config import EvaluateConfig
from emu3_jax.evaluation.drawn_scenes import CASES, grade
from emu3_jax.evaluation.page import Section
from emu3_jax.generation.pipeline import Emu3


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
    wanted = [draw_arrangement(rng, unseen=True) for _ in range(config.cases or CASES)]
    graded = grade(model, wanted, read, right, ATTRIBUTES, config, side, progress)
    whole, in_rows = graded.whole, np.array([scene.order is not None for scene in wanted])
    figures = {
        "cases": len(wanted),
        **graded.figures,
        "all_right": float(whole.mean()),
        **{
            f"{name}_all_right": float(whole[chosen].mean()) if chosen.any() else None
            for name, chosen in (("counted", ~in_rows), ("rows", in_rows))
        },
        "guidance": config.procedural_guidance,
    }
    rows = graded.rows(config.rows, lambda scene: rasterise(scene, side, np.random.default_rng(0)))
    text = "Arrangements that training does not see. A green frame means that all is right."
    return figures, [Section("Several shapes", text, rows)]

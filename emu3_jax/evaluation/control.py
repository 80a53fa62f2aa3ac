"""The figure "procedural": do generated shapes have the colour, shape and place that the prompt names?

The answers are read from the pixels (see `procedural`).
"""

import functools
from typing import Any

import numpy as np

from emu3_jax.evaluation.config import EvaluateConfig
from emu3_jax.evaluation.items import Data, choose
from emu3_jax.evaluation.motion import animate
from emu3_jax.evaluation.page import Cell, Row, Section
from emu3_jax.evaluation.procedural import FRAMES, read_clip, read_extension, read_still
from emu3_jax.evaluation.reconstruction import Reconstructor
from emu3_jax.evaluation.text_to_image import generate
from emu3_jax.generation.pipeline import Emu3

_GIVEN = FRAMES // 2  # frames that a clip extension is given
# Kind of item and reader function of each task.
_TASKS = {
    "stills": ("picture", read_still),
    "clips": ("clip", read_clip),
    "extensions": ("clip", functools.partial(read_extension, given=_GIVEN)),
}


def measure(
    model: Emu3,
    data: Data,
    config: EvaluateConfig,
    reconstruct: Reconstructor,
    *,
    skipped: dict[str, str],
    progress: bool | None,
) -> tuple[dict[str, Any], list[Section]]:
    """Measures colour, shape and position (or motion) on triples that are held out of training.

    For the task "extensions", the model gets the first half of the true clip, and only the generated second half is
    read. The true pictures and their reconstructions by the vision tokenizer are read too, as upper bounds.

    Args:
        model: model to evaluate.
        data: evaluation data.
        config: config of the evaluation.
        reconstruct: the model's vision tokenizer.
        skipped: gets the reason for each task that cannot be measured.
        progress: as in `progress.Progress`.

    Returns:
        The figures (shares from 0 to 1), and the sections of the page.
    """
    figures, sections = {}, []
    for name, (kind, read) in _TASKS.items():
        place = f"procedural.{name}"
        cases = choose(data.where(f"procedural_{kind}", "triple"), config.cases, config.seed, place)
        if not cases:
            skipped[place] = f"the data has no procedural {kind}s of held-out triples"
            continue
        truth = data.pixels(cases)
        again = reconstruct(truth)
        prompts, scale = [item.caption for item in cases], config.procedural_guidance
        options = {"guidance": scale, "config": config, "progress": progress}
        if kind == "picture":
            made = generate(model, prompts, truth.shape[1:3], **options)
        else:
            given = truth[:, :_GIVEN] if name == "extensions" else None
            made = animate(model, prompts, FRAMES, truth.shape[2:4], given=given, **options)
        if name == "extensions":
            again[:, :_GIVEN] = truth[:, :_GIVEN]  # a generated clip also starts with the true frames
        names = list(cases[0].scene)
        wanted = [item.scene for item in cases]
        seen = [read(pixels) for pixels in made]
        right = _right(seen, wanted, names)
        figures[name] = {
            "cases": len(cases),
            **{f"{n}_right": float(share) for n, share in zip(names, right.mean(axis=0), strict=True)},
            "all_right": float(right.all(axis=1).mean()),
            "truth_all_right": float(_right(map(read, truth), wanted, names).all(axis=1).mean()),
            "reconstruction_all_right": float(_right(map(read, again), wanted, names).all(axis=1).mean()),
            "guidance": scale,
        }
        rows = []
        for item, pixels, true, one, ok in list(zip(cases, made, truth, seen, right, strict=True))[: config.rows]:
            read_back = ", ".join(str(getattr(one, n) or "?") for n in names)
            rows.append(Row(item.caption, (Cell("truth", true), Cell(f"read: {read_back}", pixels, bool(ok.all())))))
        text = "Held-out triples of colour, shape and " + names[-1] + ". A green frame means that all three are right."
        if name == "extensions":
            text += f" The first {_GIVEN} frames are given. The model generates the rest, and only the rest is read."
        sections.append(Section(f"Procedural {name}", text, tuple(rows)))
    return figures, sections


def _right(seen, wanted: list[dict[str, str]], names: list[str]) -> np.ndarray:
    """bool [N, names]: whether each value read from picture i equals the wanted value."""
    return np.array([[getattr(one, n) == scene[n] for n in names] for one, scene in zip(seen, wanted, strict=True)])

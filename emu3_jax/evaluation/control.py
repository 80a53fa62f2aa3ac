"""Whether pictures and clips of procedural prompts show what was asked for, as read back from their pixels."""

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

_GIVEN = FRAMES // 2  # frames of the clips that are extended
# What is generated, of which kind of item, and how it is read.
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
    """Colour, shape and position or motion on the held-out triples.

    Of extensions the model is given the first half of the true clip, and only what it makes of the second is read. The
    truth, and what the tokenizer's reconstruction leaves of it, are read in the same way.

    Returns:
        the figures, and the page's sections.
    """
    figures, sections = {}, []
    for name, (kind, read) in _TASKS.items():
        place = f"procedural.{name}"
        cases = choose(data.where(f"procedural_{kind}", "triple"), config.cases, config.seed, place)
        if not cases:
            skipped[place] = f"the data have no procedural {kind}s of held-out triples"
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
            again[:, :_GIVEN] = truth[:, :_GIVEN]  # as a generated clip has them
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
        text = "Triples of colour, shape and " + names[-1] + " that are held out; green where all three are right."
        if name == "extensions":
            text += f" The first {_GIVEN} frames are given, the rest is generated and read."
        sections.append(Section(f"Procedural {name}", text, tuple(rows)))
    return figures, sections


def _right(seen, wanted: list[dict[str, str]], names: list[str]) -> np.ndarray:
    """Whether each thing seen is what was wanted, bool [N, names]."""
    return np.array([[getattr(one, n) == scene[n] for n in names] for one, scene in zip(seen, wanted, strict=True)])

"""Whether pictures and clips of procedural prompts show what was asked for, as read back from their pixels."""

from typing import Any

import numpy as np

from emu3_jax.evaluation.config import EvaluateConfig
from emu3_jax.evaluation.items import Data, choose
from emu3_jax.evaluation.page import Cell, Row, Section
from emu3_jax.evaluation.procedural import FRAMES, read_clip, read_still
from emu3_jax.evaluation.text_to_image import generate
from emu3_jax.generation.pipeline import Emu3


def measure(
    model: Emu3, data: Data, config: EvaluateConfig, skipped: dict[str, str], progress: bool | None
) -> tuple[dict[str, Any], list[Section]]:
    """Colour, shape and position or motion on the held-out triples.

    Returns:
        the figures, and the page's sections.
    """
    figures, sections = {}, []
    for kind, name, read in (("picture", "stills", read_still), ("clip", "clips", read_clip)):
        place = f"procedural.{name}"
        cases = choose(data.where(f"procedural_{kind}", "triple"), config.cases, config.seed, place)
        if not cases:
            skipped[place] = f"the data have no procedural {kind}s of held-out triples"
            continue
        truth = data.pixels(cases)
        prompts = [item.caption for item in cases]
        if kind == "picture":
            made = generate(model, prompts, truth.shape[1:3], config.procedural_guidance, config, progress)
        else:
            made = _clips(model, prompts, truth.shape[2:4], config, progress)
        names = list(cases[0].scene)
        seen = [read(pixels) for pixels in made]
        right = np.array(
            [[getattr(one, n) == item.scene[n] for n in names] for one, item in zip(seen, cases, strict=True)]
        )
        of_truth = np.array(
            [all(getattr(read(p), n) == item.scene[n] for n in names) for p, item in zip(truth, cases, strict=True)]
        )
        figures[name] = {
            "cases": len(cases),
            **{f"{n}_right": float(share) for n, share in zip(names, right.mean(axis=0), strict=True)},
            "all_right": float(right.all(axis=1).mean()),
            "truth_all_right": float(of_truth.mean()),
            "guidance": config.procedural_guidance,
        }
        rows = []
        for item, pixels, true, one, ok in list(zip(cases, made, truth, seen, right, strict=True))[: config.rows]:
            read_back = ", ".join(str(getattr(one, n) or "?") for n in names)
            rows.append(Row(item.caption, (Cell("truth", true), Cell(f"read: {read_back}", pixels, bool(ok.all())))))
        text = "Triples of colour, shape and " + names[-1] + " that are held out; green where all three are right."
        sections.append(Section(f"Procedural {name}", text, tuple(rows)))
    return figures, sections


def _clips(
    model: Emu3, prompts: list[str], side: tuple[int, int], config: EvaluateConfig, progress: bool | None
) -> np.ndarray:
    """Clips of the prompts, uint8 [N, FRAMES, H, W, 3], of `side` = (H, W)."""
    height, width = side
    clips = model.generate_clips(
        prompts,
        frames=FRAMES,
        ratio=f"{width}:{height}",
        area=height * width,
        guidance=config.procedural_guidance,
        progress=progress,
        **config.sampling,
    )
    return np.stack([clip.frames for clip in clips])

"""Whether generated clips of animated subjects move as much as the true ones, and how clips are generated."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from emu3_jax.evaluation.config import EvaluateConfig
from emu3_jax.evaluation.items import Data, choose
from emu3_jax.evaluation.metrics import motion_energy
from emu3_jax.evaluation.page import Cell, Row, Section
from emu3_jax.evaluation.reconstruction import Reconstructor
from emu3_jax.generation.pipeline import Emu3
from emu3_jax.media.clips import Clip

_FACTOR = 2.0  # up to which two clips' energies count as alike


def animate(
    model: Emu3,
    prompts: list[str],
    frames: int,
    side: tuple[int, int],
    *,
    guidance: float,
    config: EvaluateConfig,
    progress: bool | None,
    given: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """Clips of the prompts, uint8 [N, T, H, W, 3], of `side` = (H, W).

    Args:
        model: which generates.
        prompts: one for each clip.
        frames: T, with those that are given.
        side: the clips' height and width.
        guidance: the scale.
        config: how the clips are sampled.
        progress: as `progress.Progress` takes it.
        given: for each clip the frames that it begins with, uint8 [t, H, W, 3], all of one length.
    """
    height, width = side
    clips = model.generate_clips(
        prompts,
        frames=frames if given is None else frames - len(given[0]),
        extend=None if given is None else [Clip(pixels) for pixels in given],
        ratio=f"{width}:{height}",
        area=height * width,
        guidance=guidance,
        progress=progress,
        **config.sampling,
    )
    return np.stack([clip.frames for clip in clips])


def measure(
    model: Emu3,
    data: Data,
    config: EvaluateConfig,
    reconstruct: Reconstructor,
    *,
    skipped: dict[str, str],
    progress: bool | None,
) -> tuple[dict[str, Any], list[Section]]:
    """Motion energy of clips whose subject is known from training pictures, but not as a clip.

    Energy is that of `metrics.motion_energy`: squared differences of consecutive frames. Ratios are those of the means,
    to the true clips'; what the tokenizer's reconstruction keeps says how much the model could show. Ratios of the
    absolute differences, on which blur tells less, stand beside them.

    Returns:
        the figures, and the page's sections.
    """
    known = {item.concept for item in data.where("picture", "train", config.groups)}
    held_out = [item for item in data.where("clip", "style", config.groups) if item.concept in known]
    cases = choose(held_out, config.cases, config.seed, "motion")
    if not cases:
        skipped["motion"] = "the data have no clips of a held-out style whose concept is in training"
        return {}, []
    truth = data.pixels(cases)
    again = reconstruct(truth)
    prompts = [item.caption for item in cases]
    made = animate(
        model,
        prompts,
        truth.shape[1],
        truth.shape[2:4],
        guidance=config.clip_guidance,
        config=config,
        progress=progress,
    )
    clips = {"true": truth, "reconstruction": again, "generated": made}
    energies = {name: motion_energy(pixels) for name, pixels in clips.items()}
    true, reconstructed, generated = energies.values()
    alike, best = ((values <= _FACTOR * true) & (true <= _FACTOR * values) for values in (generated, reconstructed))
    difference = {name: motion_energy(pixels, power=1).mean() for name, pixels in clips.items()}
    figures = {
        "cases": len(cases),
        **{f"{name}_energy": float(values.mean()) for name, values in energies.items()},
        "ratio": _ratio(generated.mean(), true.mean()),
        "reconstruction_ratio": _ratio(reconstructed.mean(), true.mean()),
        "difference_ratio": _ratio(difference["generated"], difference["true"]),
        "reconstruction_difference_ratio": _ratio(difference["reconstruction"], difference["true"]),
        "within_twice": float(alike.mean()),
        "reconstruction_within_twice": float(best.mean()),
        "guidance": config.clip_guidance,
    }
    rows = []
    for i, item in enumerate(cases[: config.rows]):
        cells = (
            Cell(f"truth, energy {true[i]:.0f}", truth[i]),
            Cell(f"reconstruction, {reconstructed[i]:.0f}", again[i]),
            Cell(f"generated, {generated[i]:.0f}", made[i], bool(alike[i])),
        )
        rows.append(Row(item.caption, cells))
    text = (
        "Subjects whose clip is held out. Energy is the mean squared difference of consecutive frames, of pixels from "
        f"0 to 255; green where the generated clip's is within {_FACTOR:g} times the true one's."
    )
    return figures, [Section("Motion of animated subjects", text, tuple(rows))]


def _ratio(of: float, to: float) -> float | None:
    return float(of / to) if to else None

"""The figure "motion": do generated clips of animated subjects move as much as the true clips?"""

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

_FACTOR = 2.0  # two clips count as moving alike if their energies differ by at most this factor


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
    """Generates one clip per prompt.

    Args:
        model: model that generates.
        prompts: N prompts.
        frames: number of frames T per clip, including given frames.
        side: height and width of the clips in pixels.
        guidance: guidance scale.
        config: config of the evaluation, for its sampling options.
        progress: as in `progress.Progress`.
        given: first frames of each clip, uint8 [t, H, W, 3], all of the same length t, or None.

    Returns:
        uint8 [N, T, H, W, 3].
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
    """Compares the motion energy of generated and true clips. Training had pictures of their subjects, but no clips.

    Motion energy is the mean squared difference of consecutive frames (`metrics.motion_energy`). A ratio divides the
    mean energy of generated clips by that of true clips. The ratio of reconstructed clips is an upper bound, because
    the vision tokenizer blurs. Ratios of absolute differences, which depend less on blur, are given too.

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
    known = {item.concept for item in data.where("picture", "train", config.groups)}
    held_out = [item for item in data.where("clip", "style", config.groups) if item.concept in known]
    cases = choose(held_out, config.cases, config.seed, "motion")
    if not cases:
        skipped["motion"] = "the data has no clips in a held-out style whose concept is in the training pictures"
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
        "Subjects whose clip is held out. Energy is the mean squared difference of consecutive frames, in squared "
        f"8-bit pixel values. A green frame means: within a factor of {_FACTOR:g} of the true clip's energy."
    )
    return figures, [Section("Motion of animated subjects", text, tuple(rows))]


def _ratio(of: float, to: float) -> float | None:
    return float(of / to) if to else None

"""The figure "image_to_text": does the model say what pictures and clips show? Answers must match exactly."""

from typing import Any

import numpy as np
from PIL import Image

from emu3_jax.evaluation.config import EvaluateConfig
from emu3_jax.evaluation.items import Data, Item, choose
from emu3_jax.evaluation.page import Cell, Row, Section
from emu3_jax.generation.pipeline import Emu3
from emu3_jax.media.clips import Clip

DESCRIBE, CATEGORY, DESCRIBE_CLIP = "Describe the image.", "What category is this?", "Describe the clip."
_LONGEST = 48  # most tokens of an answer; correct answers are shorter
_BETWEEN = " emoji of "


def parse(answer: str) -> tuple[str, str]:
    """Splits "{style} emoji of {label}" into (style, label). Any other answer becomes ("", answer)."""
    style, between, label = answer.strip().removesuffix(".").partition(_BETWEEN)
    return (style, label) if between else ("", style)


def measure(
    model: Emu3, data: Data, config: EvaluateConfig, *, skipped: dict[str, str], progress: bool | None
) -> tuple[dict[str, Any], list[Section]]:
    """Measures answers on held-out data: descriptions and categories of pictures, descriptions of shapes and clips.

    Args:
        model: model to evaluate.
        data: evaluation data.
        config: config of the evaluation.
        skipped: gets the reason for each task that cannot be measured.
        progress: as in `progress.Progress`.

    Returns:
        The figures (shares from 0 to 1), and the sections of the page.
    """
    figures: dict[str, Any] = {}
    sections = []

    def ask(name: str, kind: str, split: str, question: str) -> tuple[list[Item], list[str]]:
        moving = kind == "procedural_clip"
        groups = None if kind.startswith("procedural") else config.groups
        cases = choose(data.where(kind, split, groups), config.cases, config.seed, f"image_to_text.{name}")
        if not cases:
            skipped[f"image_to_text.{name}"] = (
                f"the data has no {'clips' if moving else 'pictures'} of the split {split}"
            )
            return [], []
        media = [Clip(pixels) if moving else Image.fromarray(pixels) for pixels in data.pixels(cases)]
        answers = model.chat(media, question, max_new_tokens=_LONGEST, batch_size=config.batch_size, progress=progress)
        return cases, [answer.strip().removesuffix(".") for answer in answers]

    def show(title: str, text: str, cases: list[Item], answers: list[str], right: list[bool]) -> None:
        shown = zip(cases[: config.rows], data.pixels(cases), answers, right, strict=False)
        rows = tuple(Row(item.caption, (Cell(answer, pixels, ok),)) for item, pixels, answer, ok in shown)
        sections.append(Section(title, text, rows))

    cases, answers = ask("description", "picture", "style", DESCRIBE)
    if cases:
        found = [_compare(item, answer) for item, answer in zip(cases, answers, strict=True)]
        styles, right = [style for style, _ in found], [label for _, label in found]
        figures["description"] = {
            "cases": len(cases),
            "style_right": float(np.mean(styles)),
            "label_exact": float(np.mean(right)),
            "both": float(np.mean([a and b for a, b in zip(right, styles, strict=True)])),
        }
        show(DESCRIBE, "Pictures in held-out styles. Green: the label is right.", cases, answers, right)
    cases, answers = ask("category", "picture", "concept", CATEGORY)
    if cases:
        right = [answer == item.group for item, answer in zip(cases, answers, strict=True)]
        _, counts = np.unique([item.group for item in cases], return_counts=True)
        figures["category"] = {
            "cases": len(cases),
            "right": float(np.mean(right)),
            "always_the_commonest": float(counts.max() / len(cases)),
        }
        show(CATEGORY, "Pictures of held-out concepts. Green: the category is right.", cases, answers, right)
    for name, kind, question in (
        ("shapes", "procedural_picture", DESCRIBE),
        ("clips", "procedural_clip", DESCRIBE_CLIP),
    ):
        cases, answers = ask(name, kind, "triple", question)
        if cases:
            right = [answer == item.label for item, answer in zip(cases, answers, strict=True)]
            figures[name] = {"cases": len(cases), "caption_exact": float(np.mean(right))}
            for part in cases[0].scene:
                said = [item.scene[part] in answer for item, answer in zip(cases, answers, strict=True)]
                figures[name][f"{part}_right"] = float(np.mean(said))
            show(question, f"Held-out {name}. Green: the whole answer is right.", cases, answers, right)
    return figures, sections


def _compare(item: Item, answer: str) -> tuple[bool, bool]:
    """Whether a description names the item's style, and exactly its label."""
    if not item.said:
        style, label = parse(answer)
        return style == item.style, label == item.label
    (style, _, label), (wanted_style, _, wanted) = (text.partition(" of ") for text in (answer, item.said))
    return style == wanted_style, label == wanted

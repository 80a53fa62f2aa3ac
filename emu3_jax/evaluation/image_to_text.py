"""Whether the model says what pictures show: style, label and category, by the exact text of its answers."""

from typing import Any

import numpy as np
from PIL import Image

from emu3_jax.evaluation.config import EvaluateConfig
from emu3_jax.evaluation.items import Data, Item, choose
from emu3_jax.evaluation.page import Cell, Row, Section
from emu3_jax.generation.pipeline import Emu3

DESCRIBE, CATEGORY = "Describe the image.", "What category is this?"
_LONGEST = 48  # tokens of an answer; right ones are shorter
_BETWEEN = " emoji of "


def parse(answer: str) -> tuple[str, str]:
    """Style and label of "{style} emoji of {label}"; of another answer, no style and the whole of it."""
    style, between, label = answer.strip().removesuffix(".").partition(_BETWEEN)
    return (style, label) if between else ("", style)


def measure(
    model: Emu3, data: Data, config: EvaluateConfig, skipped: dict[str, str], progress: bool | None
) -> tuple[dict[str, Any], list[Section]]:
    """Descriptions of held-out styles, and categories of held-out concepts.

    Returns:
        the figures, and the page's sections.
    """
    figures: dict[str, Any] = {}
    sections = []

    def ask(name: str, split: str, question: str) -> tuple[list[Item], list[str]]:
        cases = choose(data.where("picture", split, config.groups), config.cases, config.seed, f"image_to_text.{name}")
        if not cases:
            skipped[f"image_to_text.{name}"] = f"the data have no pictures of the split {split}"
            return [], []
        pictures = [Image.fromarray(pixels) for pixels in data.pixels(cases)]
        answers = model.chat(
            pictures, question, max_new_tokens=_LONGEST, batch_size=config.batch_size, progress=progress
        )
        return cases, answers

    def show(title: str, text: str, cases: list[Item], answers: list[str], right: list[bool]) -> None:
        shown = zip(cases[: config.rows], data.pixels(cases), answers, right, strict=False)
        rows = tuple(Row(item.caption, (Cell(answer, pixels, ok),)) for item, pixels, answer, ok in shown)
        sections.append(Section(title, text, rows))

    cases, answers = ask("description", "style", DESCRIBE)
    if cases:
        said = [parse(answer) for answer in answers]
        right = [item.label == label for item, (_, label) in zip(cases, said, strict=True)]
        styles = [item.style == style for item, (style, _) in zip(cases, said, strict=True)]
        figures["description"] = {
            "cases": len(cases),
            "style_right": float(np.mean(styles)),
            "label_exact": float(np.mean(right)),
            "both": float(np.mean([a and b for a, b in zip(right, styles, strict=True)])),
        }
        show(DESCRIBE, "Styles that are held out; green where the label is right.", cases, answers, right)
    cases, answers = ask("category", "concept", CATEGORY)
    if cases:
        right = [answer.strip().removesuffix(".") == item.group for item, answer in zip(cases, answers, strict=True)]
        _, counts = np.unique([item.group for item in cases], return_counts=True)
        figures["category"] = {
            "cases": len(cases),
            "right": float(np.mean(right)),
            "always_the_commonest": float(counts.max() / len(cases)),
        }
        show(CATEGORY, "Concepts that are held out; green where the category is right.", cases, answers, right)
    return figures, sections

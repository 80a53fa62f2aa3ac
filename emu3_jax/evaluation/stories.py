"""The figure "stories": does the model write illustrated stories, and edit pictures, as requested?

The requests are drawn at random, with subjects that training does not see in stories and edits. Sentences and pixels
are read back exactly (see `scenes`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from emu3_jax.evaluation.config import EvaluateConfig
from emu3_jax.evaluation.page import Cell, Row, Section
from emu3_jax.evaluation.procedural import rasterise_still
from emu3_jax.evaluation.scenes import Edit, Grade, Story, draw_edit, draw_story, grade_edit, grade_story
from emu3_jax.generation.pieces import Document
from emu3_jax.generation.pipeline import Emu3

_CASES = 256  # of each task, if the config does not say
_TEXTS = {
    "free": "The request names the first subject and the number of pictures; the model invents the rest.",
    "told": "The request tells the whole story; the model illustrates it sentence by sentence.",
    "edits": "The request is a picture and a change.",
}


@dataclasses.dataclass(frozen=True)
class _Case:
    """A request, the pictures that come with it, and how its answer is graded."""

    prompt: str
    given: list[np.ndarray]
    grade: Callable[[Sequence[str | np.ndarray]], Grade]


def measure(model: Emu3, config: EvaluateConfig, *, progress: bool | None) -> tuple[dict[str, Any], list[Section]]:
    """Measures the shares of right answers.

    Args:
        model: model to evaluate.
        config: config of the evaluation.
        progress: as in `progress.Progress`.

    Returns:
        The figures (shares from 0 to 1), and the sections of the page.
    """
    figures, sections = {}, []
    side = round(model.language.config.image_area**0.5)
    for number, name in enumerate(_TEXTS):
        rng = np.random.default_rng([config.seed, number])
        cases = [_draw(name, rng, side) for _ in range(config.cases or _CASES)]
        documents = model.interleave(
            [case.prompt for case in cases],
            [[Image.fromarray(pixels) for pixels in case.given] for case in cases],
            guidance=config.procedural_guidance,
            text_temperature=config.temperature,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed,
            batch_size=config.batch_size,
            progress=progress,
        )
        answers = [_pieces(document) for document in documents]
        grades = [case.grade(pieces) for case, pieces in zip(cases, answers, strict=True)]

        def share(field: str, grades: list[Grade] = grades) -> float:
            return float(np.mean([getattr(grade, field) for grade in grades]))

        figures[name] = {
            "cases": len(cases),
            **{f"{field.name}_right": share(field.name) for field in dataclasses.fields(Grade)},
            "all_right": share("right"),
            "guidance": config.procedural_guidance,
        }
        rows = [
            _row(case, pieces, grade)
            for case, pieces, grade in list(zip(cases, answers, grades, strict=True))[: config.rows]
        ]
        text = f"Subjects that training does not see in stories and edits. {_TEXTS[name]} A green frame: all right."
        sections.append(Section(f"Stories: {name}", text, tuple(rows)))
    return figures, sections


def _draw(name: str, rng: np.random.Generator, side: int) -> _Case:
    if name == "edits":
        edit: Edit = draw_edit(rng, unseen=True)
        return _Case(edit.change.request, [rasterise_still(edit.before, side)], lambda pieces: grade_edit(edit, pieces))
    story: Story = draw_story(rng, unseen=True, free=name == "free")
    return _Case(story.prompt, [], lambda pieces: grade_story(story, pieces))


def _pieces(document: Document) -> list[str | np.ndarray]:
    """Texts, and whole pictures as pixels. A picture that is cut off becomes a text, so that it counts as wrong."""
    pieces: list[str | np.ndarray] = []
    for piece in document.pieces:
        if piece.kind != "picture":
            pieces.append(piece.text)
        else:
            pieces.append(np.asarray(piece.picture) if piece.picture and piece.whole else "a picture that is cut off")
    return pieces


def _row(case: _Case, pieces: Sequence[str | np.ndarray], grade: Grade) -> Row:
    cells = [Cell("given", pixels) for pixels in case.given]
    text = ""
    for piece in pieces:
        if isinstance(piece, str):
            text = f"{text} {piece}".strip()
        else:
            cells.append(Cell(text, piece, grade.right))
            text = ""
    return Row(f"{case.prompt} {text}".strip(), tuple(cells))

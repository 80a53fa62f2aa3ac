"""What the figures of drawn scenes share: pictures are generated from captions, read, and compared with the scenes."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from emu3_jax.evaluation.config import EvaluateConfig
from emu3_jax.evaluation.page import Cell, Row
from emu3_jax.evaluation.relations import Seen
from emu3_jax.evaluation.text_to_image import generate
from emu3_jax.generation.pipeline import Emu3

CASES = 256  # if the config does not say


class Scene(Protocol):
    """The content of a picture."""

    @property
    def caption(self) -> str:
        """The prompt that asks for the picture."""


@dataclasses.dataclass(frozen=True, eq=False)
class Graded:
    """Generated pictures and what is right about them.

    Attributes:
        scenes: the scenes that were asked for.
        pictures: uint8 [side, side, 3] each.
        seen: what the pictures show.
        attributes: names of what is compared.
        shares: bool [scenes, attributes], which are right.
    """

    scenes: Sequence[Any]
    pictures: Sequence[np.ndarray]
    seen: Sequence[Seen]
    attributes: Sequence[str]
    shares: np.ndarray

    @property
    def whole(self) -> np.ndarray:
        """bool [scenes], where all is right."""
        return self.shares.all(axis=1)

    @property
    def figures(self) -> dict[str, float]:
        """The share of pictures in which each attribute is right."""
        means = self.shares.mean(axis=0)
        return {f"{name}_right": float(share) for name, share in zip(self.attributes, means, strict=True)}

    def rows(self, count: int, rasterise: Callable[[Any], np.ndarray]) -> tuple[Row, ...]:
        """Rows of a page for the first `count` pictures. `rasterise` draws what a scene should look like."""
        rows = []
        for scene, pixels, one, ok in list(zip(self.scenes, self.pictures, self.seen, self.whole, strict=True))[:count]:
            told = "; ".join(f"{colour or '?'} {shape or '?'}" for colour, shape, _ in one.shapes) or "nothing"
            rows.append(Row(scene.caption, (Cell("truth", rasterise(scene)), Cell(f"read: {told}", pixels, bool(ok)))))
        return tuple(rows)


def grade(
    model: Emu3,
    scenes: Sequence[Scene],
    read: Callable[[np.ndarray], Seen],
    right: Callable[[Any, Seen], dict[str, bool]],
    attributes: Sequence[str],
    config: EvaluateConfig,
    side: int,
    progress: bool | None,
) -> Graded:
    """Generates a picture for each scene, and compares what it shows.

    Args:
        model: model to evaluate.
        scenes: what to ask for.
        read: recognises the content of a picture.
        right: which of `attributes` a picture shows.
        attributes: names of what is compared.
        config: config of the evaluation.
        side: side of the pictures in pixels.
        progress: as in `progress.Progress`.
    """
    options = {"guidance": config.procedural_guidance, "config": config, "progress": progress}
    made = generate(model, [scene.caption for scene in scenes], (side, side), **options)
    seen = [read(pixels) for pixels in made]
    grades = [right(scene, one) for scene, one in zip(scenes, seen, strict=True)]
    return Graded(scenes, made, seen, attributes, np.array([[one[name] for name in attributes] for one in grades]))

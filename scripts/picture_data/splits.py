"""What is held out of training, so that nothing that is nearly the same drawing stands on both sides."""

from collections.abc import Sequence

import numpy as np
from emoji_data.concepts import HELD_CONCEPTS, Concept, fixed_number, is_held_out

from picture_data import likeness
from picture_data.drawings import Drawing

HELD_DRAWINGS = 0.08  # of the groups of drawings of things that other drawings in the training show
TRAIN, STYLE, CONCEPT = "train", "style", "concept"


def split(
    drawings: Sequence[Drawing], emoji: Sequence[dict], pixels: np.ndarray, concepts: dict[str, Concept], seed: int
) -> list[str | None]:
    """The split of each drawing; None for one that is nearly the same as emoji of the training and as held-out ones.

    Args:
        drawings: in a fixed order.
        emoji: items of the emoji pictures, whose splits stand.
        pixels: uint8 [M, side, side, 3] of the emoji.
        concepts: all emoji by codepoint.
        seed: of the splits.
    """
    shown = np.concatenate([np.stack([drawing.views[0] for drawing in drawings]), pixels])
    names = [*(drawing.concept for drawing in drawings), *(item["concept"] for item in emoji)]
    alike = likeness.pairs(likeness.features(shown), names, len(drawings))
    count = len(drawings)
    of_drawings = likeness.groups(count, [pair for pair in alike if pair[1] < count])
    members: dict[int, list[int]] = {}
    for index, group in enumerate(of_drawings):
        members.setdefault(group, []).append(index)
    beside: dict[int, set[str]] = {group: set() for group in members}
    for one, other in alike:
        if other >= count:
            beside[of_drawings[one]].add(emoji[other - count]["split"])
    trained = {item["concept"] for item in emoji if item["split"] == TRAIN}
    result: list[str | None] = [None] * count
    open_groups = []
    for group, indices in members.items():
        if any(_is_held_out(drawings[index].concept, concepts, seed) for index in indices):
            decided = CONCEPT if TRAIN not in beside[group] else None
        elif beside[group] - {TRAIN}:
            decided = STYLE if TRAIN not in beside[group] else None
        else:
            open_groups.append(group)
            continue
        for index in indices:
            result[index] = decided
    chosen = {
        group for group in open_groups if TRAIN not in beside[group] and _is_chosen(drawings, members[group], seed)
    }
    trained |= {drawings[index].concept for group in open_groups if group not in chosen for index in members[group]}
    for group in open_groups:
        held = group in chosen and all(drawings[index].concept in trained for index in members[group])
        for index in members[group]:
            result[index] = STYLE if held else TRAIN
    return result


def _is_chosen(drawings: Sequence[Drawing], indices: Sequence[int], seed: int) -> bool:
    name = min(drawings[index].name for index in indices)
    return fixed_number(seed, "drawing", name) < HELD_DRAWINGS


def _is_held_out(concept: str, concepts: dict[str, Concept], seed: int) -> bool:
    if concept in concepts:
        return is_held_out(concepts[concept], seed)
    return fixed_number(seed, "thing", concept.lower()) < HELD_CONCEPTS

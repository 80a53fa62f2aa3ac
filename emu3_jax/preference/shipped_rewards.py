"""Rewards that come with the package. `rewards` computes them in worker processes by their names.

`procedural` reads scenes of coloured shapes exactly. `judge` asks a trained classifier of emoji. `answer_rewards` has
those of answers.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emu3_jax.evaluation import arrangements, relations
from emu3_jax.evaluation.procedural import Motion, Still, all_clips, all_stills, plain, read_clip, read_still
from emu3_jax.preference.answer_rewards import answer_format, answer_length, answer_match

# Prompts that `procedural` can score.
STILL_EXAMPLE = "a small red circle on the left of a gray background"
MOVING_EXAMPLE = "a small red circle moves right on a gray background"

_JUDGED_AT_ONCE = 32
_LEAST_FRAMES = 3
_SEVERAL_SHAPES = ((relations, relations.TwoShapes), (arrangements, arrangements.Arrangement))


def procedural(prompts: Sequence[str], pictures: Sequence[np.ndarray]) -> list[float]:
    """The share of a scene's attributes that a picture or clip shows, from 0 to 1.

    Args:
        prompts: captions of scenes such as "a small red circle on the left of a gray background". Without a place ("on
            a gray background") the position does not count. Or captions of two shapes such as "a red circle above a
            blue square on a gray background"; then the relation counts, too. Or captions of several shapes, see
            `evaluation.arrangements`. For clips, captions such as "a small red circle moves right on a gray
            background".
        pictures: square pictures, uint8 [side, side, 3], or clips of three frames or more, uint8 [T, side, side, 3].

    Raises:
        ValueError: a prompt is no caption of a scene, or a picture is not square, or a clip is too short.
    """
    return [_share(prompt, picture) for prompt, picture in zip(prompts, pictures, strict=True)]


def describes_scene(prompt: str, *, moving: bool) -> bool:
    """Whether `procedural` can score a prompt's clips (`moving`) or its pictures."""
    if moving:
        return plain(prompt) in _motions()
    return plain(prompt) in _scenes() or any(kind.parse(prompt) is not None for _, kind in _SEVERAL_SHAPES)


def _share(prompt: str, picture: np.ndarray) -> float:
    height, width = picture.shape[-3:-1]
    if height != width:
        raise ValueError(f"the picture has {width}x{height} pixels, it must be square")
    if picture.ndim == 4:
        return _share_of_clip(prompt, picture)
    for module, kind in _SEVERAL_SHAPES:
        if (scene := kind.parse(prompt)) is not None:
            return float(np.mean(list(module.right(scene, module.read(picture)).values())))
    wanted = _scenes().get(plain(prompt))
    if wanted is None:
        raise ValueError(f"the prompt {prompt!r} describes no procedural scene, such as {STILL_EXAMPLE!r}")
    seen = read_still(picture)
    return float(np.mean([getattr(seen, name) == value for name, value in wanted.items()]))


def _share_of_clip(prompt: str, clip: np.ndarray) -> float:
    wanted = _motions().get(plain(prompt))
    if wanted is None:
        raise ValueError(f"the prompt {prompt!r} describes no procedural clip, such as {MOVING_EXAMPLE!r}")
    if len(clip) < _LEAST_FRAMES:
        raise ValueError(f"the clip has {len(clip)} frames, its motion is read from {_LEAST_FRAMES} or more")
    seen = read_clip(clip)
    return float(np.mean([getattr(seen, name) == value for name, value in vars(wanted).items()]))


@functools.cache
def _motions() -> dict[str, Motion]:
    """The clip of each caption."""
    return {clip.caption: clip for clip in all_clips()}


@functools.cache
def _scenes() -> dict[str, dict[str, str | None]]:
    """The attributes of each caption."""
    found = {}
    for still in all_stills():
        scene = vars(still)
        found[still.caption] = scene
        placeless = {name: value for name, value in scene.items() if name != "position"}
        found[_without_place(still)] = placeless
    return found


def _without_place(still: Still) -> str:
    return re.sub(r" (on the|at the|in the) \w+ of a (\w+ background)$", r" on a \2", still.caption)


def judge(file: str, width: int, side: Sequence[int], concepts: Sequence[str], captions: Mapping[str, str]) -> Any:
    """Makes the reward `judge`: the probability, from 0 to 1, that the judge gives to the prompt's concept.

    Args:
        file: the trained judge, see `evaluation.judge.get_judge`.
        width: width of its network.
        side: height, width and channels of the pictures that it was trained on.
        concepts: names of its concepts, in the order of its logits.
        captions: the concept of each prompt.
    """
    from emu3_jax.evaluation.judge import Judge

    trained = Judge.load(Path(file), width, concepts, tuple(side))

    def reward(prompts: Sequence[str], pictures: Sequence[np.ndarray]) -> np.ndarray:
        for prompt, picture in zip(prompts, pictures, strict=True):
            if prompt not in captions:
                raise ValueError(f"the prompt {prompt!r} is no caption of the judge's training pictures")
            if list(picture.shape) != list(side):
                found, wanted = (f"{shape[1]}x{shape[0]}" for shape in (picture.shape, side))
                raise ValueError(f"the picture has {found} pixels, the judge knows {wanted}")
        return trained.probabilities(np.stack(pictures), [captions[prompt] for prompt in prompts], _JUDGED_AT_ONCE)

    return reward


# By its name, what makes a reward of its settings.
SHIPPED: dict[str, Callable[..., Callable[..., Any]]] = {
    "procedural": lambda: procedural,
    "judge": judge,
    "answer_length": answer_length,
    "answer_format": answer_format,
    "answer_match": lambda: answer_match,
}

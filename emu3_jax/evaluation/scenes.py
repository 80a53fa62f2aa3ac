"""Illustrated stories and edits of coloured shapes: drawing them at random, their words, and grading them exactly.

A story is a row of scenes (`procedural.Still`). The first one is described by its caption, each next one by the change
that leads to it, for example "It moves to the left.". After every sentence stands a picture of the scene. The sentences
and the pixels can be read back without a trained judge.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from emu3_jax.evaluation import procedural
from emu3_jax.evaluation.procedural import Still

NUMBERS = {2: "two", 3: "three"}  # pictures of a story; three take about 950 of the embedded model's 2,048 positions

# Colour and shape of the subjects that training does not see in stories and edits.
UNSEEN = (
    ("red", "star"), ("green", "circle"), ("blue", "heart"), ("yellow", "cross"), ("purple", "triangle"),
    ("pink", "square"), ("orange", "circle"), ("brown", "star"),
)  # fmt: skip

# A change in a story, and as a request.
_WORDS = {
    "position": ("It moves to the {}.", "Move it to the {}"),
    "colour": ("It turns {}.", "Make it {}"),
    "shape": ("It becomes a {}.", "Make it a {}"),
    "background": ("The background turns {}.", "Make the background {}"),
}
_SIZES = {"large": ("It grows.", "Make it larger"), "small": ("It shrinks.", "Make it smaller")}


@dataclasses.dataclass(frozen=True)
class Change:
    """A change of one field of a scene to another value."""

    field: str
    value: str

    @property
    def sentence(self) -> str:
        """The change in a story, for example "It turns blue."."""
        return self._words[0]

    @property
    def request(self) -> str:
        """The change as a request, without a full stop, for example "Make it blue"."""
        return self._words[1]

    @property
    def _words(self) -> list[str]:
        words = _SIZES[self.value] if self.field == "size" else _WORDS[self.field]
        return [text.format(self.value) for text in words]

    def of(self, scene: Still) -> Still:
        """The scene after the change."""
        return dataclasses.replace(scene, **{self.field: self.value})


@dataclasses.dataclass(frozen=True)
class Story:
    """A story to be written.

    Attributes:
        prompt: the request.
        scenes: what the pictures show. Of a free story, the scenes of one that would be right.
        free: whether the model invents the story: then only the first subject and the number of pictures are given.
    """

    prompt: str
    scenes: tuple[Still, ...]
    free: bool

    @property
    def sentences(self) -> list[str]:
        """The text before each picture."""
        return _sentences(self.scenes)


@dataclasses.dataclass(frozen=True)
class Edit:
    """A change to be made to a picture."""

    before: Still
    change: Change

    @property
    def after(self) -> Still:
        """What the new picture shows."""
        return self.change.of(self.before)


@dataclasses.dataclass(frozen=True)
class Grade:
    """What is right in an answer.

    Attributes:
        count: whether it has the right number of pictures; in a story, each after one text.
        texts: whether its texts are the sentences of a story that fits the request; in an edit, that there is none.
        pictures: whether each picture shows the scene that the texts before it describe.
    """

    count: bool
    texts: bool
    pictures: bool

    @property
    def right(self) -> bool:
        """Whether all is right."""
        return self.count and self.texts and self.pictures


CHANGES = tuple(
    Change(field, value)
    for field, values in (
        ("colour", procedural.COLOURS),
        ("shape", procedural.SHAPES),
        ("size", procedural.SIZES),
        ("background", procedural.BACKGROUNDS),
        ("position", procedural.POSITIONS),
    )
    for value in values
)


def subject_is_unseen(scene: Still) -> bool:
    """Whether training sees no story or edit with a subject of this colour and shape."""
    return (scene.colour, scene.shape) in UNSEEN


def draw_story(rng: np.random.Generator, *, unseen: bool, free: bool) -> Story:
    """Draws a story (see `Story.free`): its first subject is unseen, or no subject of it is."""
    count = int(rng.choice(list(NUMBERS)))
    scenes = [_draw(rng, lambda scene: subject_is_unseen(scene) == unseen)]
    while len(scenes) < count:
        change = CHANGES[rng.integers(len(CHANGES))]
        scene = change.of(scenes[-1])
        if scene not in scenes and (unseen or not subject_is_unseen(scene)):
            scenes.append(scene)
    first = scenes[0]
    if free:
        prompt = f"Tell a story in {NUMBERS[count]} pictures about a {first.size} {first.colour} {first.shape}"
    else:
        prompt = "Illustrate: " + " ".join(_sentences(scenes)).removesuffix(".")
    return Story(prompt, tuple(scenes), free)


def draw_edit(rng: np.random.Generator, *, unseen: bool) -> Edit:
    """Draws an edit: the given picture has an unseen subject, or neither picture has one."""
    before = _draw(rng, lambda scene: subject_is_unseen(scene) == unseen)
    while True:
        change = CHANGES[rng.integers(len(CHANGES))]
        if change.of(before) != before and (unseen or not subject_is_unseen(change.of(before))):
            return Edit(before, change)


def grade_story(story: Story, pieces: Sequence[str | np.ndarray]) -> Grade:
    """Grades an answer to the story's prompt.

    Args:
        story: the story.
        pieces: the answer's texts, and pictures as uint8 [side, side, 3].
    """
    texts = [piece for piece in pieces if isinstance(piece, str)]
    pictures = [piece for piece in pieces if not isinstance(piece, str)]
    count = len(pictures) == len(story.scenes)
    count = count and [isinstance(piece, str) for piece in pieces] == [True, False] * len(pictures)
    told = _scenes(texts)
    if told is None:
        return Grade(count, False, False)
    fits = told == list(story.scenes)
    if story.free:
        first, wanted = told[0], story.scenes[0]
        fits = (first.size, first.colour, first.shape) == (wanted.size, wanted.colour, wanted.shape)
    return Grade(count, fits, _shown(pictures, told))


def grade_edit(edit: Edit, pieces: Sequence[str | np.ndarray]) -> Grade:
    """Grades the answer to an edit; see `grade_story`."""
    pictures = [piece for piece in pieces if not isinstance(piece, str)]
    return Grade(len(pictures) == 1, len(pictures) == len(pieces), _shown(pictures, [edit.after]))


def _shown(pictures: Sequence[np.ndarray], scenes: Sequence[Still]) -> bool:
    return [procedural.read_still(picture) for picture in pictures] == list(scenes)


def _scenes(sentences: Sequence[str]) -> list[Still] | None:
    """The scenes that sentences describe one after the other, or None if they are no story."""
    if not sentences or sentences[0].strip() not in _first_sentences():
        return None
    scenes = [_first_sentences()[sentences[0].strip()]]
    for sentence in sentences[1:]:
        change = _changes().get(sentence.strip())
        if change is None or change.of(scenes[-1]) == scenes[-1]:
            return None
        scenes.append(change.of(scenes[-1]))
    return scenes


def _sentences(scenes: Sequence[Still]) -> list[str]:
    told = [_first_sentence(scenes[0])]
    for before, after in itertools.pairwise(scenes):
        (change,) = (change for change in CHANGES if change.of(before) == after and change.of(before) != before)
        told.append(change.sentence)
    return told


def _first_sentence(scene: Still) -> str:
    return f"{scene.caption[0].upper()}{scene.caption[1:]}."


@functools.cache
def _first_sentences() -> dict[str, Still]:
    return {_first_sentence(scene): scene for scene in procedural.all_stills()}


@functools.cache
def _changes() -> dict[str, Change]:
    return {change.sentence: change for change in CHANGES}


def _draw(rng: np.random.Generator, fits: Callable[[Still], bool]) -> Still:
    """A random scene that fits."""
    scenes = list(_first_sentences().values())
    while True:
        scene = scenes[rng.integers(len(scenes))]
        if fits(scene):
            return scene

"""Stories and edits of coloured shapes: drawing, words, grades, and the scripts and configs that use them."""

import dataclasses
import json
import pathlib
import runpy

import numpy as np
import pytest

from emu3_jax.data.manifest import Manifest
from emu3_jax.errors import Emu3Error
from emu3_jax.evaluation import scenes
from emu3_jax.evaluation.procedural import Still, rasterise_still
from emu3_jax.evaluation.scenes import CHANGES, UNSEEN, Edit, Story, grade_edit, grade_story

ROOT = pathlib.Path(__file__).parent.parent
STAR = Still("red", "star", "small", "white", "left")
MOVED = dataclasses.replace(STAR, position="right")
BLUE = dataclasses.replace(MOVED, colour="blue")
FIRST = "A small red star on the left of a white background."
TOLD = Story("Illustrate", (STAR, MOVED, BLUE), free=False)
FREE = dataclasses.replace(TOLD, free=True)


def answer(*pieces: str | Still) -> list[str | np.ndarray]:
    return [piece if isinstance(piece, str) else rasterise_still(piece, 32) for piece in pieces]


def test_a_story_in_words():
    assert TOLD.sentences == [FIRST, "It moves to the right.", "It turns blue."]
    assert len({change.sentence for change in CHANGES}) == len({change.request for change in CHANGES}) == 24


@pytest.mark.parametrize("unseen", [True, False])
@pytest.mark.parametrize("free", [True, False])
def test_drawn_stories_grade_themselves_right(unseen, free):
    rng = np.random.default_rng(0)
    for _ in range(20):
        story = scenes.draw_story(rng, unseen=unseen, free=free)
        assert scenes.subject_is_unseen(story.scenes[0]) == unseen
        assert unseen or not any(map(scenes.subject_is_unseen, story.scenes))
        assert len(set(story.scenes)) == len(story.scenes) in scenes.NUMBERS
        pieces = [piece for pair in zip(story.sentences, story.scenes, strict=True) for piece in pair]
        assert grade_story(story, answer(*pieces)).right
        edit = scenes.draw_edit(rng, unseen=unseen)
        assert scenes.subject_is_unseen(edit.before) == unseen and (unseen or not scenes.subject_is_unseen(edit.after))
        assert grade_edit(edit, answer(edit.after)).right and not grade_edit(edit, answer(edit.before)).right


TURNED = dataclasses.replace(STAR, colour="blue")
GOOD = (FIRST, STAR, "It moves to the right.", MOVED, "It turns blue.", BLUE)


@pytest.mark.parametrize(
    ("story", "pieces", "grade"),
    [
        (TOLD, GOOD, (True, True, True)),
        (FREE, GOOD, (True, True, True)),
        (FREE, (FIRST, STAR, "It turns blue.", TURNED, "It moves to the right.", BLUE),
         (True, True, True)),
        (TOLD, (FIRST, STAR, "It turns blue.", TURNED, "It moves to the right.", BLUE),
         (True, False, True)),
        (TOLD, GOOD[:4], (False, False, True)),
        (FREE, GOOD[:4], (False, True, True)),
        (TOLD, (*GOOD[:5], MOVED), (True, True, False)),
        (TOLD, (FIRST, MOVED, GOOD[2], STAR, *GOOD[4:]), (True, True, False)),
        (TOLD, (GOOD[1], GOOD[0], *GOOD[2:]), (False, True, True)),
        (TOLD, (*GOOD, "The end."), (False, False, False)),
        (FREE, (FIRST, STAR, "It moves to the left.", STAR, *GOOD[4:]), (True, False, False)),
        (FREE, (FIRST.replace("red", "green"), *GOOD[1:]), (True, False, False)),
        (FREE, (), (False, False, False)),
    ],
)  # fmt: skip
def test_grades_of_stories(story, pieces, grade):
    assert dataclasses.astuple(grade_story(story, answer(*pieces))) == grade


@pytest.mark.parametrize(
    ("pieces", "grade"),
    [((MOVED,), (True, True, True)), ((STAR,), (True, True, False)), (("It moves.", MOVED), (True, False, True)),
     ((MOVED, MOVED), (False, True, False)), ((), (False, True, False))],
)  # fmt: skip
def test_grades_of_edits(pieces, grade):
    (change,) = (change for change in CHANGES if change.request == "Move it to the right")
    assert dataclasses.astuple(grade_edit(Edit(STAR, change), answer(*pieces))) == grade


def test_the_script_writes_documents_without_unseen_subjects(tmp_path):
    write = runpy.run_path(str(ROOT / "scripts" / "stories.py"))["write"]
    target = write(tmp_path / "stories", 30, 30)
    assert {path.name for path in target.glob("*.jsonl")} == {
        f"{kind}_{split}.jsonl" for kind in ("stories", "edits") for split in ("train", "heldout")
    }
    for path in target.glob("*.jsonl"):
        lines = Manifest(path)
        for number in range(len(lines)):
            files = [part.image.name for part in lines[number].document if part.image is not None]
            assert all((target / "pictures" / name).is_file() for name in files)
            subjects = [tuple(name.split("-")[:2]) for name in files]
            assert (subjects[0] in UNSEEN) if "heldout" in path.name else not set(subjects) & set(UNSEEN)
    line = json.loads((target / "edits_train.jsonl").read_text().splitlines()[0])
    assert [part["role"] for part in line["document"]] == ["user", "user", "assistant"]
    with pytest.raises(Emu3Error, match="size is 8: the pictures must have from 16 to 512 pixels a side"):
        write(tmp_path / "small", 1, 1, size=8)

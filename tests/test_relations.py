"""Two shapes and their relation: what is drawn is read back."""

import itertools

import numpy as np
import pytest

from emu3_jax.evaluation import relations
from emu3_jax.evaluation.procedural import Still, Variation, rasterise_still
from emu3_jax.evaluation.relations import ATTRIBUTES, Seen, TwoShapes, draw_two_shapes, rasterise, read, right
from emu3_jax.preference.shipped_rewards import procedural

SCENE = TwoShapes("red", "circle", "left of", "orange", "square", "gray")


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("unseen", [False, True])
def test_what_is_drawn_is_read_back(side, unseen):
    rng = np.random.default_rng(side)
    for _ in range(20):
        scene = draw_two_shapes(rng, unseen=unseen)
        pixels = rasterise(scene, side, [Variation.draw(rng), Variation.draw(rng)]).astype(float)
        noisy = np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255)
        for seen in (pixels, noisy):
            assert all(right(scene, read(seen)).values()), (scene, read(seen))


def test_captions_come_back():
    scenes = list(relations.all_two_shapes())
    assert len(scenes) == len({scene.caption for scene in scenes}) == 27_648
    assert all(TwoShapes.parse(scene.caption) == scene for scene in scenes[::101])
    assert SCENE.caption == "a red circle left of an orange square on a gray background"
    assert TwoShapes.parse("A red circle  left of an orange square on a gray background.") == SCENE
    assert TwoShapes.parse("a small red circle on the left of a gray background") is None


def test_about_one_pair_in_eight_is_held_out():
    pairs = {(s.first_colour, s.first_shape, s.second_colour, s.second_shape): s for s in relations.all_two_shapes()}
    assert 0.1 < np.mean([relations.held_out(scene) for scene in pairs.values()]) < 0.15
    scene = next(scene for scene in pairs.values() if relations.held_out(scene))
    for relation, background in itertools.product(relations.RELATIONS, relations.BACKGROUNDS):
        first, second = (scene.first_colour, scene.first_shape), (scene.second_colour, scene.second_shape)
        assert relations.held_out(TwoShapes(*first, relation, *second, background))
        assert relations.held_out(TwoShapes(*second, relation, *first, background))


@pytest.mark.parametrize(
    ("shown", "wrong"),
    [
        (SCENE, set()),
        (TwoShapes("orange", "square", "right of", "red", "circle", "gray"), set()),  # the same picture
        (TwoShapes("red", "circle", "right of", "orange", "square", "gray"), {"relation"}),
        (TwoShapes("red", "circle", "above", "orange", "square", "gray"), {"relation"}),
        (TwoShapes("red", "star", "left of", "orange", "square", "gray"), {"first_shape"}),
        (TwoShapes("red", "circle", "left of", "blue", "square", "black"), {"second_colour", "background"}),
        # No shape is known, so none of them can stand in a relation.
        (TwoShapes("blue", "star", "left of", "pink", "heart", "gray"), set(ATTRIBUTES) - {"background"}),
    ],
)
def test_what_is_wrong(shown, wrong):
    found = right(SCENE, read(rasterise(shown, 32)))
    assert {name for name, ok in found.items() if not ok} == wrong
    assert procedural([SCENE.caption], [rasterise(shown, 32)]) == [pytest.approx(1 - len(wrong) / 6)]


def test_pictures_of_other_things():
    one = rasterise_still(Still("red", "circle", "large", "gray", "center"), 32)
    assert read(one).shapes[0][:2] == ("red", "circle") and len(read(one).shapes) == 1
    found = right(SCENE, read(one))
    assert [name for name, ok in found.items() if ok] == ["first_colour", "first_shape", "background"]
    empty = np.full((32, 32, 3), 150, np.uint8)
    assert read(empty) == Seen((), "gray")
    assert [name for name, ok in right(SCENE, read(empty)).items() if ok] == ["background"]
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    assert sum(right(SCENE, read(noise)).values()) <= 2

"""Several shapes, counted or in a row: what is drawn is read back, and the script that writes pictures of them."""

import dataclasses
import importlib
import json
import pathlib
import types

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies
from PIL import Image

from emu3_jax.data.manifest import Manifest
from emu3_jax.errors import Emu3Error
from emu3_jax.evaluation import drawn_scenes, several_shapes
from emu3_jax.evaluation.arrangements import Arrangement, Seen, draw_arrangement, held_out, rasterise, read, right
from emu3_jax.evaluation.config import EvaluateConfig
from emu3_jax.evaluation.procedural import Still, rasterise_still

COUNTED = Arrangement(((2, "red", "circle"), (1, "blue", "cross")), None, "gray")
ROW = Arrangement(((1, "red", "circle"), (1, "orange", "square"), (1, "green", "star")), "from left to right", "white")


@hypothesis.settings(max_examples=40)
@hypothesis.given(strategies.integers(0, 2**32 - 1), strategies.booleans(), strategies.sampled_from([0, 8]))
def test_what_is_drawn_is_read_back(seed, unseen, noise):
    rng = np.random.default_rng(seed)
    scene = draw_arrangement(rng, unseen=unseen)
    assert held_out(scene) == unseen and Arrangement.parse(scene.caption) == scene
    pixels = rasterise(scene, 64, rng)
    assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8
    shown = np.clip(pixels + rng.normal(0, noise, pixels.shape), 0, 255)
    assert all(right(scene, read(shown)).values()), (scene.caption, read(shown))


def test_words():
    assert COUNTED.caption == "two red circles and one blue cross on a gray background"
    assert ROW.caption == ("from left to right: a red circle, an orange square and a green star on a white background")
    assert Arrangement.parse("Three pink crosses  on a black background.").things == ((3, "pink", "cross"),)
    assert COUNTED.questions == {
        "How many shapes are there?": "three",
        "How many red circles are there?": "two",
        "How many blue crosses are there?": "one",
    }
    assert ROW.questions["What is in the middle?"] == "an orange square"
    for other in ("one red circles on a gray background", "a red circle on the left of a white background", ""):
        assert Arrangement.parse(other) is None


@pytest.mark.parametrize(
    ("wanted", "shown", "wrong"),
    [
        (COUNTED, COUNTED, set()),
        (COUNTED, Arrangement(((1, "blue", "cross"), (2, "red", "circle")), None, "white"), {"background"}),
        (COUNTED, Arrangement(((3, "red", "circle"),), None, "gray"), {"things", "order"}),
        (COUNTED, Arrangement(((2, "red", "circle"),), None, "gray"), {"count", "things", "order"}),
        (ROW, Arrangement(ROW.things[::-1], ROW.order, "white"), {"order"}),
        (ROW, Arrangement(ROW.things, "from top to bottom", "white"), {"order"}),
    ],
)
def test_what_is_wrong(wanted, shown, wrong):
    found = right(wanted, read(rasterise(shown, 64, np.random.default_rng(0))))
    assert {name for name, ok in found.items() if not ok} == wrong


def test_pictures_of_other_things():
    one = read(rasterise_still(Still("red", "circle", "small", "gray", "center"), 64))
    assert [shape[:2] for shape in one.shapes] == [("red", "circle")] and one.background == "gray"
    assert read(np.full((64, 64, 3), 150, np.uint8)) == Seen((), "gray")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    assert not right(COUNTED, read(noise))["things"]


def test_about_one_arrangement_in_eight_is_held_out():
    rng = np.random.default_rng(0)
    scenes = [draw_arrangement(rng, unseen=False) for _ in range(300)]
    assert not any(map(held_out, scenes))
    numbers = [Arrangement(((n, colour, "star"),), None, "gray") for n in range(2, 6) for colour in "abcdefghijklmnopq"]
    assert 0.05 < np.mean([held_out(scene) for scene in numbers]) < 0.25
    assert held_out(COUNTED) == held_out(Arrangement(COUNTED.things[::-1], None, "black"))


class Model:
    """What the figure asks of a model."""

    def __init__(self, side: int):
        self.language = types.SimpleNamespace(config=types.SimpleNamespace(image_area=side**2))


def test_the_figure(monkeypatch):
    """A model that draws all pictures right, but on white."""

    def generate(model, prompts, size, **_):
        scenes = [dataclasses.replace(Arrangement.parse(prompt), background="white") for prompt in prompts]
        return np.stack([rasterise(scene, size[0], np.random.default_rng(0)) for scene in scenes])

    monkeypatch.setattr(drawn_scenes, "generate", generate)
    config = EvaluateConfig("out", figures=("arrangements",), cases=12, rows=2)
    figures, (section,) = several_shapes.measure(Model(64), config, progress=False)
    assert figures["cases"] == 12 and figures["count_right"] == figures["things_right"] == figures["order_right"] == 1
    assert 0 < figures["all_right"] == figures["background_right"] < 1
    assert len(section.rows) == 2
    with pytest.raises(Emu3Error, match="the model's pictures have 32 pixels a side, at least 64 are needed"):
        several_shapes.measure(Model(32), config, progress=False)


@pytest.fixture
def script(monkeypatch):
    """Imports a script by name, as Python finds it when it runs."""
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[1] / "scripts"))
    return importlib.import_module


def test_the_script(script, tmp_path, capsys, monkeypatch):
    arrangements = script("arrangements")
    monkeypatch.setattr(arrangements, "HELD_OUT", 5)
    assert arrangements.main([str(tmp_path / "a"), "--count", "12"]) == 0
    assert capsys.readouterr().out.startswith("pictures: 12 to train on, 5 held out\n")
    for name, count in (("train", 12), ("heldout", 5)):
        lines = [json.loads(line) for line in (tmp_path / "a" / f"{name}.jsonl").read_text().splitlines()]
        assert len(Manifest(tmp_path / "a" / f"{name}.jsonl")) == len(lines) == count
        asked = Manifest(tmp_path / "a" / f"questions_{name}.jsonl")
        assert [asked[i].conversation[1].text for i in range(count)] == [line["text"] for line in lines]
        for line in lines:
            scene = Arrangement.parse(line["text"])
            assert held_out(scene) == (name == "heldout")
            assert all(right(scene, read(np.asarray(Image.open(tmp_path / "a" / line["image"])))).values())
        captions = (tmp_path / "a" / arrangements.PROMPTS[name]).read_text().splitlines()
        assert captions == list(dict.fromkeys(line["text"] for line in lines))
    arrangements.build(tmp_path / "b", count=4)
    first = (tmp_path / "a" / "train.jsonl").read_text().splitlines()[:4]
    assert (tmp_path / "b" / "train.jsonl").read_text().splitlines() == first
    assert json.loads((tmp_path / "b" / "summary.json").read_text())["arguments"]["size"] == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--count", "0"], "count is 0: it must be from 1 to 1000000"),
        (["--size", "32"], "size is 32: the pictures must have from 64 to 512 pixels a side"),
        (["--seed", "-1"], "seed is -1: it must be from 0 to 4294967295"),
    ],
)
def test_wrong_numbers_are_refused(script, tmp_path, capsys, options, message):
    assert script("arrangements").main([str(tmp_path / "data"), *options]) == 2
    assert capsys.readouterr().err == f"error: {message}\n" and not list(tmp_path.iterdir())

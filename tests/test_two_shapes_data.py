"""Data that teach a small model more: pictures of two shapes, and prompts in styles that training did not show."""

import importlib
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from emu3_jax.data.manifest import Manifest
from emu3_jax.errors import Emu3Error
from emu3_jax.evaluation import relations
from emu3_jax.evaluation.config import EvaluateConfig
from emu3_jax.evaluation.items import Data
from emu3_jax.evaluation.relations import TwoShapes, read, right
from emu3_jax.evaluation.text_to_image import choose_cases
from emu3_jax.training.config import TrainConfig, load_config

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch):
    """Imports a script by name, as Python finds it when it runs."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module


def test_two_shapes(script, tmp_path, capsys):
    main = script("two_shapes").main
    assert main([str(tmp_path / "a"), "--count", "40"]) == 0
    assert capsys.readouterr().out.startswith("pictures: 40, with ")
    lines = [json.loads(line) for line in (tmp_path / "a" / "train.jsonl").read_text().splitlines()]
    assert len(Manifest(tmp_path / "a" / "train.jsonl")) == len(lines) == 40
    shown = set()
    for line in lines:
        scene = TwoShapes.parse(line["text"])
        pixels = np.asarray(Image.open(tmp_path / "a" / line["image"]))
        assert pixels.shape == (32, 32, 3) and all(right(scene, read(pixels)).values()), line
        shown.add(pixels.tobytes())
    assert len(shown) == 40
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["arguments"] == {"count": 40, "size": 32, "seed": 0}
    assert summary["captions"] == len({line["text"] for line in lines}) and sum(summary["relations"].values()) == 40

    assert (
        main([str(tmp_path / "b"), "--count", "12"]) == main([str(tmp_path / "c"), "--count", "12", "--seed", "1"]) == 0
    )
    assert (tmp_path / "b" / "train.jsonl").read_text().splitlines() == [json.dumps(line) for line in lines[:12]]
    assert (tmp_path / "c" / "train.jsonl").read_text() != (tmp_path / "b" / "train.jsonl").read_text()
    for line in lines[:12]:
        assert (tmp_path / "a" / line["image"]).read_bytes() == (tmp_path / "b" / line["image"]).read_bytes()


def test_no_held_out_pair_is_in_the_data(script, tmp_path, monkeypatch):
    """Neither as it is asked for, nor the other way round, which may be the same picture."""
    two_shapes = script("two_shapes")
    monkeypatch.setattr(two_shapes, "rasterise", lambda *_: np.zeros((1, 1, 3), np.uint8))  # the captions suffice
    two_shapes.build(tmp_path / "data", count=2_000)
    prompts, unseen = ((tmp_path / f"data/{name}.txt").read_text().splitlines() for name in ("prompts", "held_out"))
    assert len(set(prompts)) == len(prompts) and len(unseen) == 128
    assert all(map(relations.held_out, map(TwoShapes.parse, unseen)))
    text = (tmp_path / "data" / "train.jsonl").read_text()
    trained = {_pair(TwoShapes.parse(json.loads(line)["text"])) for line in text.splitlines()}
    rng = np.random.default_rng([0, 2])  # as `evaluate` draws its prompts
    asked = {_pair(relations.draw_two_shapes(rng, unseen=True)) for _ in range(256)}
    assert len(asked) > 50 and len(trained) > 800 and not asked & trained


def _pair(scene: TwoShapes) -> frozenset[tuple[str, str]]:
    return frozenset({(scene.first_colour, scene.first_shape), (scene.second_colour, scene.second_shape)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--count", "0"], "count is 0: it must be from 1 to 1000000"),
        (["--size", "8"], "size is 8: the pictures must have from 16 to 512 pixels a side"),
        (["--seed", "-1"], "seed is -1: it must be from 0 to 4294967295"),
    ],
)
def test_wrong_numbers_are_refused(script, tmp_path, capsys, options, message):
    assert script("two_shapes").main([str(tmp_path / "data"), *options]) == 2
    assert capsys.readouterr().err == f"error: {message}\n" and not list(tmp_path.iterdir())


def test_an_existing_directory_is_refused(script, tmp_path, capsys):
    assert script("two_shapes").main([str(tmp_path), "--count", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(tmp_path) in error and error.count("\n") == 1


def test_the_stage_keeps_the_emoji_data():
    stage, before = (load_config(ROOT / "configs" / f"{name}.py") for name in ("two_shapes_sft", "emoji_sft"))
    assert isinstance(stage, TrainConfig)
    (new, *others), total = stage.data.sources, sum(source.weight for source in stage.data.sources)
    assert new.path == "out/two_shapes_tokens/train" and tuple(others) == before.data.sources
    assert 0.2 < new.weight / total < 0.3
    assert not stage.model.random and stage.model.bundle == f"{before.directory}/model" and stage.steps < before.steps


# ------------------------------------------------------------------------------------------------ prompts in styles


@pytest.fixture
def emoji(tmp_path) -> pathlib.Path:
    """Items of twelve things: each was trained in two styles, is held out in one, and lacks two."""
    lines = []
    for number in range(12):
        for style, split in (("3d", "train"), ("flat", "style" if number else "concept"), ("noto", "train")):
            item = {"name": f"{style}/{number}", "file": "none.webp", "kind": "picture", "style": style}
            item |= {"concept": f"c{number}", "label": f"thing {number}", "group": "objects", "split": split}
            lines.append(json.dumps(item))
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_prompts_in_unseen_styles(script, emoji, tmp_path, capsys):
    main = script("style_prompts").main
    command = [str(emoji), "--cases", "4", "-o", str(tmp_path / "prompts.txt")]
    assert main(command) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == ["held-out: 7", "undrawn: 24"]
    prompts = (tmp_path / "prompts.txt").read_text().splitlines()
    held_out, cases = choose_cases(Data(emoji), EvaluateConfig("out", data=str(emoji), cases=4))
    asked = {item.caption for item in cases}
    assert len(held_out) == 11 and len(asked) == 4 and len(set(prompts)) == 31
    assert not asked & set(prompts) and {item.caption for item in held_out} <= {*prompts, *asked}
    assert "vintage emoji of thing 3" in prompts and "3d emoji of thing 3" not in prompts
    assert "flat emoji of thing 0" not in prompts  # held out for another reason

    assert main(command) == 2  # the file exists
    assert capsys.readouterr().err == f"error: {tmp_path / 'prompts.txt'} exists: name a new file\n"
    command[-1] = str(tmp_path / "others.txt")
    assert main([*command, "--kinds", "seen", "undrawn", "--other-things", "--count", "10"]) == 0
    others = (tmp_path / "others.txt").read_text().splitlines()
    things = {item.label for item in cases}
    assert len(others) == 10 and not any(prompt.split(" emoji of ")[1] in things for prompt in others)
    assert {prompt.split()[0] for prompt in others} <= {"3d", "noto", "vintage", "twemoji"}


def test_too_many_prompts_are_refused(script, emoji, tmp_path, capsys):
    command = [str(emoji), "-o", str(tmp_path / "prompts.txt")]
    assert script("style_prompts").main([*command, "--count", "99"]) == 2
    assert capsys.readouterr().err == "error: count is 99: there are 24 prompts, give 1 to 24\n"
    assert script("style_prompts").main([*command, "--kinds", "held-out"]) == 2  # the evaluation asks for all of them
    assert "has no prompts of the kinds held-out: choose other --kinds" in capsys.readouterr().err
    assert not (tmp_path / "prompts.txt").exists()


def test_no_prompts_without_data(script, tmp_path):
    with pytest.raises(Emu3Error, match=r"items\.jsonl: there is no such file"):
        script("style_prompts").Data(tmp_path)

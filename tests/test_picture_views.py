"""Further views of the embedded model's data: scripts/picture_views.py."""

import dataclasses
import importlib
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from emu3_jax.data.manifest import Manifest
from emu3_jax.evaluation import procedural
from emu3_jax.media.clips import load_clip, save_clip

STILL = procedural.Still("red", "star", "small", "white", "left")
MOTION = procedural.Motion("blue", "circle", "large", "gray", "moves right")


@pytest.fixture
def views(monkeypatch):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1] / "scripts")
    return importlib.import_module("picture_views")


@pytest.fixture
def data(tmp_path):
    """A drawing, a shape, a clip and a moving shape; and a drawing that training must not see."""
    said = {"style": "3d", "label": "dog face", "phrase": "a dog face", "group": "animals & nature", "source": "emoji"}
    drawing = {"kind": "picture", **said, "look": "3d emoji", "colour": "brown"}
    items = [
        {"name": "dog", "file": "dog.webp", "split": "train", **drawing},
        {"name": "unseen", "file": "unseen.webp", "split": "style", **drawing},
        {"name": "still", "file": "still.webp", "split": "train", "kind": "procedural_picture", "label": STILL.caption}
        | dataclasses.asdict(STILL),
        {"name": "clip", "file": "clip.webp", "split": "train", "kind": "clip", **said},
        {"name": "motion", "file": "motion.webp", "split": "train", "kind": "procedural_clip", "label": MOTION.caption}
        | dataclasses.asdict(MOTION),
    ]
    still, frames = procedural.rasterise_still(STILL, 64), procedural.rasterise_clip(MOTION, 64)
    for name in ("dog", "unseen", "still"):
        Image.fromarray(still).save(tmp_path / f"{name}.webp", lossless=True)
    for name in ("clip", "motion"):
        save_clip(frames, tmp_path / f"{name}.webp", 4.0)
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return tmp_path


def test_all_kinds(views, data):
    counts = views.build(data, amounts={"picture": 3, "procedural_picture": 2, "clip": 2, "procedural_clip": 2})
    assert counts == {"questions": 4 + 3, "clips": 3 + 3}
    for name, count in counts.items():
        assert len(Manifest(data / f"views_{name}.jsonl")) == count
    lines = [json.loads(line) for line in (data / "views_questions.jsonl").read_text().splitlines()]
    assert "unseen" not in {line["name"].partition("@")[0] for line in lines}
    orders = set()
    for line in lines:
        texts = [turn["text"] for turn in line["conversation"]]
        asked = dict(zip(texts[::2], texts[1::2], strict=True))
        orders.add(tuple(asked))
        if line["name"].startswith("dog"):
            assert asked["What is this?"] == "a dog face" and asked["What style is this?"] == "3d emoji"
        else:
            assert asked["Describe the image."] == STILL.caption and asked["Where is the shape?"] == "left"
            assert procedural.read_still(np.asarray(Image.open(data / line["image"]))) == STILL
    assert len(orders) > 3
    for line in map(json.loads, (data / "views_clips.jsonl").read_text().splitlines()):
        frames = load_clip(data / line["clip"]).frames
        assert frames.shape == (8, 64, 64, 3)
        if line["name"].startswith("motion"):
            assert line["text"] == MOTION.caption and procedural.read_clip(frames) == MOTION


def test_kept_colours(views, data):
    """The place of a view does not depend on whether colours are kept."""
    drawn = {}
    for name, keep in (("changed", False), ("kept", True)):
        views.build(data, name=name, amounts=dict.fromkeys(views.AMOUNTS, 2), seed=2, keep_colours=keep)
        assert len(Manifest(data / f"{name}_questions.jsonl")) == 3 + 3
        [file, _] = sorted((data / name / "picture").iterdir())
        drawn[name] = np.asarray(Image.open(file))
    reds = {tuple(colour) for colour in np.asarray(Image.open(data / "dog.webp")).reshape(-1, 3)} - {(255, 255, 255)}
    held = {name: any((view == red).all(-1).any() for red in reds) for name, view in drawn.items()}
    assert held == {"changed": False, "kept": True}
    inside = {name: (view < 200).any(-1) for name, view in drawn.items()}
    assert (inside["changed"] == inside["kept"]).mean() > 0.97


def test_a_view_stays_on_white(views):
    picture = Image.fromarray(procedural.rasterise_still(STILL, 64))
    turned = np.asarray(views.View(10.0, 0.8, (0.05, 0.0), 0.5, 1.2).apply(picture))
    assert turned.shape == (64, 64, 3) and (turned[:2] == 255).all() and turned.min() < 128
    same = np.asarray(views.View(0.0, 1.0, (0.0, 0.0), 1.0, 1.0).apply(picture))
    assert np.abs(same.astype(int) - np.asarray(picture)).max() <= 1


def test_trouble(views, data, tmp_path, capsys):
    assert views.main([str(tmp_path / "none")]) == 2
    assert "items.jsonl" in capsys.readouterr().err
    assert views.main([str(data), "--workers", "0"]) == 2
    assert "it must be 1 or more" in capsys.readouterr().err
    assert views.main([str(data), "--name", "../views"]) == 2
    assert "name is '../views': use letters, digits, _ and - only" in capsys.readouterr().err
    assert views.main([str(data), "--workers", "2"]) == 0
    assert views.main([str(data)]) == 2
    assert "views" in capsys.readouterr().err.splitlines()[-1]


def test_other_data_are_refused(views, tmp_path, capsys):
    """scripts/build_emoji.py writes items.jsonl, too."""
    item = {"name": "a", "file": "a.webp", "kind": "picture", "split": "train", "group": ""}
    (tmp_path / "items.jsonl").write_text(json.dumps(item))
    assert views.main([str(tmp_path)]) == 2
    assert "line 1 has no look: give a directory that scripts/build_pictures.py wrote" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["items.jsonl"]

"""The script that draws reward curves, and pictures of two models side by side."""

import importlib
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def main(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("reward_figures").main


def run(directory: pathlib.Path, rewards) -> str:
    directory.mkdir()
    lines = [{"step": step, "group": "train", "reward": float(reward)} for step, reward in enumerate(rewards, 1)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(directory)


def test_curves(main, tmp_path):
    runs = [run(tmp_path / "a", np.linspace(0, 1, 10)), run(tmp_path / "b <&>", np.zeros(10))]
    assert main(["curves", *runs, "--window", "5", "-o", str(tmp_path / "c.svg")]) == 0
    svg = (tmp_path / "c.svg").read_text()
    assert svg.startswith("<svg xmlns=") and svg.count("<polyline") == 2 and "b &lt;&amp;&gt;" in svg
    assert ">78%<" in svg and ">5<" in svg and ">10<" in svg  # the mean of 5/9 to 1, and the steps


def test_pictures(main, tmp_path):
    for name, shade in (("before", 10), ("after", 200)):
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.new("RGB", (8, 8), (shade + number,) * 3).save(tmp_path / name / f"{number:03d}.png")
    arguments = ["pictures", str(tmp_path / "before"), str(tmp_path / "after"), "--per-row", "2"]
    assert main([*arguments, "-o", str(tmp_path / "p.png")]) == 0
    shades = np.unique(np.asarray(Image.open(tmp_path / "p.png"))[:, :, 0])
    assert shades.tolist() == [10, 11, 12, 13, 200, 201, 202, 203, 255]


def test_bad_input(main, tmp_path, capsys):
    short, long = run(tmp_path / "short", [1.0]), run(tmp_path / "long", np.zeros(10))
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (["curves", short], "has 1 lines of metrics with rewards"),
        (["curves", short, long, "--window", "1"], "different numbers of steps"),
        (["pictures", str(tmp_path / "empty"), str(tmp_path / "empty")], "has no PNG file"),
    ):
        assert main([*arguments, "-o", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()

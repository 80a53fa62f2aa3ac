"""The embedded model itself, as somebody meets it who has nothing but the package."""

import pathlib
import shutil

import numpy as np
import pytest
from embedded_side import embedded_side
from PIL import Image

import emu3_jax
from emu3_jax.checkpoints import embedded
from emu3_jax.cli.main import main
from emu3_jax.evaluation.procedural import read_still

pytestmark = pytest.mark.slow

SIZE = (embedded_side(), embedded_side())
SCRIPTS = pathlib.Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def model():
    return emu3_jax.load()


def test_it_draws_what_is_asked_for(model):
    prompts = [
        "a large blue square on the right of a gray background",
        "a small red star on the left of a white background",
    ]
    square, star = (read_still(np.asarray(one)) for one in model.generate(prompts, guidance=2.0, seed=0))
    assert (square.colour, square.shape, square.position, square.size) == ("blue", "square", "right", "large")
    assert (star.colour, star.shape, star.position, star.size) == ("red", "star", "left", "small")


def test_its_tokenizer_keeps_an_unseen_picture(model):
    file = SCRIPTS / "assets" / "emoji" / "koala-3d.webp"
    (again,) = model.detokenize(model.tokenize([file]))
    with Image.open(file) as picture:
        error = np.asarray(picture.convert("RGB"), float) - np.asarray(again, float)
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 24  # dB


def test_words_that_it_never_saw_give_a_picture(tmp_path, capsys):
    assert main(["generate", "Ωμέγα 漢字 zxqvj", "-o", str(tmp_path / "out")]) == 0
    with Image.open(tmp_path / "out" / "000.png") as picture:
        assert picture.size == SIZE and np.asarray(picture).std() > 0


def test_a_photograph_gives_an_answer(capsys):
    assert main(["chat", str(SCRIPTS / "assets" / "chelsea.jpg"), "--prompt", "Describe the image.", "--quiet"]) == 0
    assert len(capsys.readouterr().out.strip()) > 3


def test_a_corrupted_file_is_named(tmp_path, monkeypatch, capsys):
    copy = tmp_path / "emoji"
    shutil.copytree(embedded.DIRECTORY, copy)
    file = max(copy.rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    monkeypatch.setattr(embedded, "DIRECTORY", copy)
    assert main(["generate", "3d emoji of dog", "-o", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert str(file) in line and "damaged" in line and not (tmp_path / "out").exists()


def test_its_licences_and_figures_come_with_it():
    assert "Twemoji" in (embedded.DIRECTORY / "NOTICE").read_text()
    assert "| What | Aim | Got |" in (embedded.DIRECTORY / "CARD.md").read_text()
    assert sum(file.stat().st_size for file in embedded.DIRECTORY.rglob("*") if file.is_file()) <= 30_000_000

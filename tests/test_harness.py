"""Folders for the scorers of GenEval, DPG-Bench and T2I-CompBench, read back as these scorers read them."""

import json
import os
import re

import numpy as np
import pytest
from PIL import Image

import emu3_jax
from emu3_jax.cli.evaluate import HARNESSES as CHOICES
from emu3_jax.cli.main import main
from emu3_jax.errors import Emu3Error
from emu3_jax.evaluation.harness import HARNESSES, draw, read_items

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "cow", "count": 2}], "prompt": "a photo of two cows"},
    {"tag": "colors", "include": [{"class": "car", "count": 1}], "prompt": "a photo of a ü car"},
]
# One shape of batches: few programs. Small pictures: what is drawn does not matter.
OPTIONS = {"area": 32 * 32, "guidance": 1.0, "batch_size": 4, "deterministic": True, "progress": False}


@pytest.fixture(scope="module")
def model():
    return emu3_jax.load()


@pytest.fixture
def geneval_file(tmp_path):
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in GENEVAL))
    return file


def test_geneval(model, geneval_file, tmp_path):
    out = tmp_path / "out"
    items = read_items("geneval", geneval_file, 2)
    draw(model, "geneval", items, out, pictures=2, host=0, hosts=2, **OPTIONS)
    (out / "00000/samples/0001.png").unlink()  # as if the run was killed
    drawn = [draw(model, "geneval", items, out, pictures=2, host=host, hosts=2, **OPTIONS) for host in (0, 1)]
    assert [(one.prompts, one.pictures, one.kept) for one in drawn] == [(2, 4, 1), (1, 2, 0)]
    found = []
    for folder in sorted(os.listdir(out)):  # as evaluate_images.py
        if not os.path.isdir(out / folder) or not folder.isdigit():
            continue
        with open(out / folder / "metadata.jsonl") as stream:
            metadata = json.load(stream)
        names = sorted(os.listdir(out / folder / "samples"))
        assert names == ["0000.png", "0001.png"] and all(re.match(r"\d+\.png", name) for name in names)
        for name in names:
            with Image.open(out / folder / "samples" / name) as picture:
                found.append((metadata, picture.info["seed"], np.asarray(picture)))
    assert [metadata for metadata, _, _ in found] == [line for line in GENEVAL for _ in range(2)]
    assert [seed for _, seed, _ in found] == list("012345")
    expected = model.generate(GENEVAL[1]["prompt"], n=2, seed=2, **OPTIONS)
    for (_, _, picture), whole in zip(found[2:4], expected, strict=True):
        np.testing.assert_array_equal(picture, whole)


def test_dpg(model, tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "midjourney11.txt").write_text("a red heart\nwith a ribbon\n")
    table = tmp_path / "dpg_bench.csv"
    table.write_text(
        "item_id,text,keywords,proposition_id\nmidjourney11,a red heart with a ribbon,,1\n"
        "midjourney11,a red heart with a ribbon,,2\n"
    )
    (item,), same = read_items("dpg", folder), read_items("dpg", table)
    assert item.prompt == same[0].prompt == "a red heart with a ribbon" and item.files == same[0].files
    drawn = draw(model, "dpg", [item], tmp_path / "out", **OPTIONS)
    assert os.listdir(tmp_path / "out" / "pictures") == ["midjourney11.png"]  # the scorer takes each file for a picture
    with Image.open(tmp_path / "out" / "pictures" / "midjourney11.png") as file:
        grid = file.copy()
    side = drawn.size[0]
    corners = [(0, 0), (side, 0), (0, side), (side, side)]  # as compute_dpg_bench.py
    for (left, top), picture in zip(corners, model.generate(item.prompt, n=4, **OPTIONS), strict=True):
        np.testing.assert_array_equal(grid.crop((left, top, left + side, top + side)), picture)


def test_t2icompbench_by_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "color_val.txt").write_text("a green bench and a blue bowl\ta note\n\na red apple.\n")
    command = ["evaluate", "--harness", "t2icompbench", "--prompts", "color_val.txt", "-n", "2", "-o", "out"]
    command += ["--area", "1024", "--guidance", "1", "--batch-size", "4"]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "out: 4 pictures of 2 prompts" in captured.out and f"--out_dir={tmp_path}/out" in captured.out
    names = os.listdir("out/samples")
    names.sort(key=lambda name: int(name.split("_")[-1].split(".")[0]))  # as BLIP_vqa.py
    assert [name.split("_")[0] for name in names] == ["a green bench and a blue bowl"] * 2 + ["a red apple."] * 2
    assert [name[-10:] for name in names] == ["000000.png", "000001.png", "000002.png", "000003.png"]
    assert main(command) == 0
    assert "4 pictures of 2 prompts, 2 of them before" in capsys.readouterr().out
    assert main([*command, "--seed", "5"]) == 2
    assert "out holds pictures of another run (other seed): choose another directory" in capsys.readouterr().err


def test_the_command_offers_all():
    assert set(CHOICES) == set(HARNESSES)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("geneval", '{"prompt": "a"}\n', "line 1 has no text 'tag', which GenEval's scorer reads"),
        ("geneval", '{"tag": "x", "prompt": "a"}\n[1]\n', "line 2 has no text 'prompt'"),
        ("geneval", "a photo of a bench\n", "line 1"),
        ("geneval", "\n", "has no prompts"),
        ("dpg", "id,text\n1,a\n", "has no column item_id: give DPG-Bench's"),
        ("dpg", "item_id,text\na/b,x\n", "is not a legal file name"),
        ("dpg", "item_id,text\na.b,x\n", "the scorer reads names up to the first full stop"),
        ("dpg", "item_id,text\na,x\na,y\n", "line 3: 'a' has two texts"),
        ("t2icompbench", "a/b\nfine\na_b\n", "line 1 .* has a character .*; line 3 .* has _, where"),
        ("t2icompbench", "ü" * 125 + "\n", "has more than 255 bytes with its number"),
        ("t2icompbench", "a\\b\n", "has a character that no file name may have"),
        ("t2icompbench", "\x1b[31m\n", "has a character that no file name may have"),
    ],
)
def test_prompts_of_another_form(tmp_path, name, text, message):
    file = tmp_path / "prompts"
    file.write_text(text)
    with pytest.raises(Emu3Error, match=message) as raised:
        read_items(name, file)
    assert "\n" not in str(raised.value) and str(file) in str(raised.value)


def test_numbers_that_the_scorer_cannot_read(geneval_file):
    with pytest.raises(Emu3Error, match="the scorer of DPG-Bench needs 4"):
        read_items("dpg", geneval_file, 3)
    with pytest.raises(Emu3Error, match="the scorer of GenEval needs a whole number >= 1"):
        read_items("geneval", geneval_file, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either CONFIG.py"),
        (["c.py", "--harness", "dpg"], "give either CONFIG.py"),
        (["--harness", "dpg", "--prompts", "x"], "--harness needs --prompts FILE"),
        (["c.py", "--guidance", "5"], "--guidance belongs to --harness"),
        (["c.py", "-n", "5"], "-n belongs to --harness"),
        (["--harness", "geneval", "--prompts", "x", "-o", "y", "--set", "a=1"], "--set and --no-clobber belong to"),
        (["--harness", "geneval", "--prompts", "missing", "-o", "y"], "cannot read missing: there is no such file"),
    ],
)
def test_arguments_that_do_not_go_together(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_other_files_are_in_the_way(model, geneval_file, tmp_path):
    items = read_items("geneval", geneval_file)
    with pytest.raises(Emu3Error, match="holds other files, which a scorer may take for pictures"):
        draw(model, "geneval", items, tmp_path, **OPTIONS)
    with pytest.raises(Emu3Error, match="host is 2 of 2"):
        draw(model, "geneval", items, tmp_path / "out", host=2, hosts=2, **OPTIONS)


def test_a_negative_prompt_that_is_not_legal_is_no_lines_fault(model, geneval_file, tmp_path):
    items = read_items("geneval", geneval_file)
    with pytest.raises(Emu3Error, match=r"^the text contains the special token"):
        draw(model, "geneval", items, tmp_path / "out", **OPTIONS, negative="<|image start|>")


def test_illegal_options_leave_no_claim(model, geneval_file, tmp_path):
    """Else the corrected command would be told that the directory holds pictures of another run."""
    items = read_items("geneval", geneval_file)
    with pytest.raises(Emu3Error, match="area is 7: at ratio 1:1 it must be at least 36 pixels"):
        draw(model, "geneval", items, tmp_path / "out", **(OPTIONS | {"area": 7}))
    assert not (tmp_path / "out").exists()


def test_a_prompt_that_is_not_legal_is_named(model, geneval_file, tmp_path):
    geneval_file.write_text(json.dumps({"tag": "x", "prompt": "<|image start|>"}) + "\n")
    items = read_items("geneval", geneval_file)
    with pytest.raises(Emu3Error, match=f"{geneval_file} line 1: the text contains the special token"):
        draw(model, "geneval", items, tmp_path / "out", **OPTIONS)

"""Rows that write text and pictures in turn: the golden sequences of Emu3.5, alone, together, and by the command."""

import json

import numpy as np
import pytest
from conftest import golden_json, golden_npz
from emu35 import write_checkpoints, write_decoder
from PIL import Image

import emu3_jax
from emu3_jax.checkpoints.convert import convert
from emu3_jax.cli.main import main
from emu3_jax.generation import interleaving
from emu3_jax.generation.grammar import Grammar, Picture, split
from emu3_jax.generation.interleaving import InterleavedRow
from emu3_jax.generation.sampling import RowSettings

pytestmark = pytest.mark.slow

RUNS = golden_json("emu35/generate.json")["runs"]


@pytest.fixture(scope="module")
def model(tmp_path_factory, vocabulary):
    root = tmp_path_factory.mktemp("emu35")
    convert([write_decoder(root / "lm", vocabulary, steer=True)], root / "bundle", progress=False)
    return emu3_jax.load(root / "bundle", dtype="float32").language


@pytest.fixture(scope="module")
def golden():
    return golden_npz("emu35/generate.npz")


def grammar_of(model):
    return Grammar.of(model.config, range(15, 25), 9)


def row_of(run, golden, grammar):
    told, prompt = RUNS[run], golden[f"{run}/prompt_ids"].tolist()
    size = tuple(told["size"]) if "size" in told else None
    given = [piece.size for piece in split(prompt, grammar) if isinstance(piece, Picture)]
    if given and (size is None or not told.get("force_same_image_size", True)):
        size = given[-1]
    empty = golden.get(f"{run}/full_unconditional_ids")
    return InterleavedRow(
        prompt, golden[f"{run}/unconditional_ids"].tolist(), None if empty is None else empty.tolist(), size,
        told["max_new_tokens"],
    )  # fmt: skip


def settings_of(runs):
    def columns(kind):
        told = [RUNS[run] for run in runs]
        return RowSettings.of(
            len(runs), temperature=0.0, guidance=[run["guidance"] for run in told], seed=0,
            top_k=[run["sampling"][f"{kind}_top_k"] for run in told],
            top_p=[run["sampling"][f"{kind}_top_p"] for run in told],
        )  # fmt: skip

    return columns("text"), columns("image"), [RUNS[run].get("image_guidance", 1.0) for run in runs]


def written(model, golden, runs, **options):
    grammar = grammar_of(model)
    rows = [row_of(run, golden, grammar) for run in runs]
    return interleaving.run(model.params, model.config, grammar, rows, *settings_of(runs), **options)


@pytest.mark.parametrize("run", [run for run in RUNS if run != "story_not_forced"])
def test_a_golden_row_alone(model, golden, run):
    (found,) = written(model, golden, [run])
    np.testing.assert_array_equal(found, golden[f"{run}/generated"])


def test_golden_rows_together(model, golden):
    runs = [run for run in RUNS if run not in ("dual", "story")]
    grammar = grammar_of(model)
    rows = [row_of(run, golden, grammar) for run in runs]
    calls = list(interleaving.stream(model.params, model.config, grammar, rows, *settings_of(runs)))
    found, done = calls[-1].ids, calls[-1].done
    calls = [[len(ids) for ids in made.ids] for made in calls]
    assert done.all() and len(calls) > 2
    for run, ids in zip(runs, found, strict=True):
        np.testing.assert_array_equal(ids, golden[f"{run}/generated"], err_msg=run)
    assert calls == sorted(calls) and calls[-1] == [len(ids) for ids in found]


def test_golden_rows_with_parallel_windows(model, golden):
    """A story whose pictures' size the model chooses, and a picture after two given ones."""
    runs = ["story", "edit_two_images"]
    for run, ids in zip(runs, written(model, golden, runs, parallel=5), strict=True):
        np.testing.assert_array_equal(ids, golden[f"{run}/generated"], err_msg=run)


def test_two_scales_of_guidance_with_parallel_windows(model, golden):
    (found,) = written(model, golden, ["dual"], parallel=8)
    np.testing.assert_array_equal(found, golden["dual/generated"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, vocabulary, model):
    """The decoder with the golden vision tokenizer."""
    from emu35 import vision_of_emu35

    return emu3_jax.Emu3("emu35", model, vision_of_emu35())


@pytest.mark.parametrize("run", ["t2i_guidance3", "story"])
def test_documents_of_golden_runs(whole, golden, run):
    told = RUNS[run]
    question = told["prompt"].split("USER: ")[1].removesuffix(" ASSISTANT: <|extra_100|>")
    (document,) = whole.interleave(
        question, task=run.split("_")[0], size=told.get("size"), guidance=told["guidance"], temperature=0.0,
        text_temperature=0.0, max_new_tokens=told["max_new_tokens"],
    )  # fmt: skip
    np.testing.assert_array_equal(document.ids[document.prompt_length :], golden[f"{run}/generated"])
    expected = [[kind.replace("image", "picture"), value] for kind, value in told["pieces"]]
    found = [[p.kind, p.text if p.kind == "text" else list(p.picture.size)] for p in document.pieces]
    assert found[: len(expected)] == expected
    for index, picture in enumerate(document.pictures):
        if f"{run}/picture{index}" in golden:
            difference = np.abs(np.asarray(picture, int) - golden[f"{run}/picture{index}"].astype(int))
            assert difference.max() <= 1


def test_the_command_writes_the_golden_story(golden, vocabulary, tmp_path, capsys):
    """From the two published directories: a page, its pictures, the ids, and one JSON line."""
    bundle, out = tmp_path / "bundle", tmp_path / "out"
    sources = write_checkpoints(tmp_path, vocabulary, steer=True)
    assert main(["convert", *map(str, sources), "-o", str(bundle), "--quiet"]) == 0
    options = ["--task", "story", "--greedy", "--max-new-tokens", "600", "--dtype", "float32"]
    arguments = ["How to cook dumplings", *options]
    capsys.readouterr()
    assert main(["interleave", *arguments, "--model", str(bundle), "-o", str(out), "--save-tokens", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    expected = np.concatenate([golden["story/prompt_ids"], golden["story/generated"]])
    with np.load(out / "tokens.npz") as ids:
        np.testing.assert_array_equal(ids["0"], expected)
    assert [next(iter(piece)) for piece in about["pieces"]] == ["text", "picture", "text", "picture", "text"]
    assert about["ended"] and about["tokens"] == len(golden["story/generated"])
    assert (out / "000.md").read_text() == (
        "Once upon a time\n\n![](000_0.png)\n\nThen it\n\n![](000_1.png)\n\nThen it\n"
    )
    for index in range(2):
        with Image.open(out / f"000_{index}.png") as picture:
            difference = np.abs(np.asarray(picture, int) - golden[f"story/picture{index}"].astype(int))
        assert difference.max() <= 1

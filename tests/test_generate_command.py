"""Pictures per prompt, prompts from files, formats, JSON lines, and outputs that exist already."""

import io
import json
import os
import shutil
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from commands import OPTIONS, run
from PIL import Image

from emu3_jax import Emu3Error, loading
from emu3_jax.cli.outputs import Outputs
from emu3_jax.generation import session
from emu3_jax.media.codes import load_codes, save_codes
from emu3_jax.media.picture_files import PICTURE_FORMATS, check_about, save_picture
from emu3_jax.text import prompt_files

pytestmark = pytest.mark.compiled_quickly

SMALL = {"area": 1024, "temperature": 1.0}


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def fields(path) -> dict[str, str]:
    with Image.open(path) as image:
        return image.text


def comment(path) -> dict[str, str]:
    """What EXIF's UserComment says, which `exiftool -UserComment` shows."""
    with Image.open(path) as image:
        exif = image.getexif()
        assert exif[0x131] == "emu3-jax"
        data = exif.get_ifd(0x8769)[0x9286]
    assert data[:8] == b"ASCII\0\0\0"
    return json.loads(data[8:])


# ------------------------------------------------------------------------------------------------ pictures per prompt


def test_n_pictures_per_prompt_are_those_of_their_seeds(golden_model):
    images = golden_model.generate(["a", "b"], n=2, seed=5, ratio=["1:1", "2:1"], guidance=[1.0, 3.0], **SMALL)
    assert [image.info["prompt"] for image in images] == ["a", "a", "b", "b"]
    assert [image.info["seed"] for image in images] == ["5", "6", "7", "8"]
    assert [image.info["ratio"] for image in images] == ["1:1", "1:1", "2:1", "2:1"]
    assert [image.info["guidance"] for image in images] == ["1", "1", "3", "3"]
    (alone,) = golden_model.generate("b", seed=8, ratio="2:1", **SMALL)
    np.testing.assert_array_equal(images[3], alone)
    assert (np.asarray(images[2]) != np.asarray(images[3])).any()
    assert alone.info == images[3].info


def test_a_seed_for_each_prompt_counts_up_over_its_pictures(golden_model):
    made = golden_model.generate_sequences(["a", "b"], n=2, seed=np.asarray([9, 3], np.uint32), **SMALL)
    assert [one.image.info["seed"] for one in made] == ["9", "10", "3", "4"]
    (alone,) = golden_model.generate_sequences("b", seed=4, **SMALL)
    np.testing.assert_array_equal(made[3].ids, alone.ids)
    last = 2**32 - 1
    with pytest.raises(Emu3Error, match=f"seed is {last + 1}: it must be"):
        golden_model.generate("a", n=2, seed=[last], **SMALL)


def test_numbers_in_a_picture_s_text_are_those_of_its_making(golden_model):
    odd = {"guidance": 3.1234567, "temperature": 1e-9, "top_p": 0.1, "top_k": 2**31 - 1, "seed": 2**32 - 1}
    (image,) = golden_model.generate("a", area=1024, **odd)
    for name, value in odd.items():
        assert np.float32(image.info[name.replace("_", "-")]) == np.float32(value)
    assert (image.info["top-k"], image.info["seed"]) == (str(2**31 - 1), str(2**32 - 1))


@pytest.mark.parametrize("n", [0, -1, True, 1.5, "2", 1_000_001])
def test_an_illegal_number_of_pictures(golden_model, n):
    with pytest.raises(Emu3Error, match=r"n is .*: it must be a whole number >= 1, for 1,000,000 pictures at most"):
        golden_model.generate("a", n=n, **SMALL)


@pytest.mark.parametrize("bad", [None, 5, b"a", {"a": 1}, {"a"}, 5.0])
@pytest.mark.parametrize("name", ["prompts", "negative", "ratio"])
def test_texts_of_a_wrong_type(golden_model, name, bad):
    for value, at in ((bad, ""), (["a", bad], r"\[1\]")):
        with pytest.raises(Emu3Error, match=rf"^{name}{at} is .*: .*must be a text or a list of texts, such as '"):
            golden_model.generate(**{"prompts": ["a", "b"], **SMALL, name: value})


@pytest.mark.parametrize("bad", [5, [], b"q8", {"a": 1}])
@pytest.mark.parametrize("name", ["model", "adapter", "vision"])
def test_paths_of_a_wrong_type(name, bad):
    legal = (
        "the path of a directory (a text or a Path)" + (", a loaded model" if name == "vision" else "") + ", or None"
    )
    with pytest.raises(Emu3Error) as caught:
        loading.load(**{name: bad})
    assert str(caught.value) == f"{name} is {bad!r}: it must be {legal}"


def test_streamed_pictures_come_batch_by_batch(golden_model, monkeypatch):
    batches = []
    whole = session.run

    def watched(*arguments, **options):
        batches.append(len(arguments[2]))
        return whole(*arguments, **options)

    monkeypatch.setattr(session, "run", watched)
    stream = golden_model.stream_sequences("a", n=5, batch_size=2, **SMALL)
    assert isinstance(stream, Iterator) and batches == []
    taken = []
    for row, made in stream:
        taken.append((row, made.image.info["seed"], sum(batches)))
    # Each picture is there before the next batch begins.
    assert taken == [(0, "0", 2), (1, "1", 2), (2, "2", 4), (3, "3", 4), (4, "4", 5)]


def test_the_command_writes_pictures_as_they_come(here, monkeypatch, capsys):
    """Memory holds the pictures of one batch, whatever -n is. No file has its name before all are written."""
    seen = []
    whole = session.run

    def watched(*arguments, **options):
        seen.append((len([*here.glob(".emu3-tmp-*/*.png")]), (here / "out").exists()))
        return whole(*arguments, **options)

    monkeypatch.setattr(session, "run", watched)
    assert run("generate", "a", "b", "-n", 3, "--batch-size", 2, "--seed", 7, "--save-tokens", *OPTIONS) == 0
    assert seen == [(0, False), (2, False), (4, False)]
    names = [f"{row:03d}.png" for row in range(6)]
    assert capsys.readouterr() == ("".join(f"out/{name}\n" for name in names), "")
    assert sorted(os.listdir("out")) == [*names, "tokens.npz"]
    assert [(fields(f"out/{name}")["prompt"], fields(f"out/{name}")["seed"]) for name in names] == [
        ("a", "7"), ("a", "8"), ("a", "9"), ("b", "10"), ("b", "11"), ("b", "12"),
    ]  # fmt: skip
    with np.load("out/tokens.npz") as tokens:
        assert sorted(tokens) == [str(row) for row in range(6)]


# ------------------------------------------------------------------------------------------------ prompts from files


def test_prompts_of_a_file_and_of_standard_input(here, monkeypatch, capsys):
    data = "\ufeffa red apple\r\n\n   \t\n  日本\u2028x \nlast".encode()
    (here / "prompts.txt").write_bytes(data)
    prompts = ["a red apple", "日本\u2028x", "last"]
    assert prompt_files.read_prompts("prompts.txt").prompts == prompts
    for source in ("prompts.txt", "-"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert run("generate", "--prompts-file", source, "--json", *OPTIONS) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["prompt"] for line in lines] == prompts


def test_bad_prompts(refused, tmp_path, monkeypatch):
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes("a\ncaf\u00e9\n".encode("latin-1"))
    (tmp_path / "long.txt").write_text("word\n" * 20)
    (tmp_path / "folder").mkdir()
    (tmp_path / "null.txt").write_text("a\nb\0c\n")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(prompt_files, "MAX_BYTES", 99)
    for name, words in (
        ("blank.txt", "blank.txt has no prompt: write one prompt per line"),
        ("latin.txt", "latin.txt line 2 is not UTF-8: save the file as UTF-8"),
        ("long.txt", "long.txt has more than 99 bytes of prompts: split it"),
        ("folder", "cannot read folder: it is a directory; give a file"),
        (
            "pipe",
            "cannot read pipe: it is a pipe or device; give a file, or pipe the prompts to standard input and give -",
        ),
        ("null.txt", "null.txt line 2 has a null character, so it is no text: correct the line"),
        ("absent.txt", "cannot read absent.txt: there is no such file"),
        ("gs://bucket/prompts.txt", "gs:// addresses are not supported here"),
    ):
        assert words in refused("generate", "--prompts-file", name, *OPTIONS)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert "standard input has no prompt" in refused("generate", "--prompts-file", "-", *OPTIONS)
    assert "--prompts-file: not allowed with argument PROMPT" in refused(
        "generate", "a", "--prompts-file", "long.txt", *OPTIONS
    )
    assert "one of the arguments PROMPT --prompts-file is required" in refused("generate", *OPTIONS)
    assert r"'a\udcff' is not UTF-8: give the text in UTF-8" in refused("generate", "a\udcff", *OPTIONS)
    assert r"'b\udcff' is not UTF-8" in refused("generate", "a", "--negative", "b\udcff", *OPTIONS)
    assert "'0' is not a whole number from 1 to 100000" in refused("generate", "a", "-n", 0, *OPTIONS)


def test_a_control_token_is_named_by_its_line(here, monkeypatch, capsys):
    text = "a\n\n  b\na <|image start|>\n"
    (here / "prompts.txt").write_text(text)
    for n in (1, 3):
        for name, file in (("prompts.txt", "prompts.txt"), ("standard input", "-")):
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
            assert run("generate", "--prompts-file", file, "-n", n, *OPTIONS) == 2
            line = capsys.readouterr().err
            assert line.startswith(f"emu3-jax: error: {name} line 4: the text contains the special token <|image start")
            assert line.count("\n") == 1
    for words in (("a", "b <|image start|>"), ("a", "--negative", "<|image start|>")):
        assert run("generate", *words, *OPTIONS) == 2
        assert capsys.readouterr().err.startswith("emu3-jax: error: the text contains the special token")
    (here / "prompts.txt").write_text("a\n")
    assert run("generate", "--prompts-file", "prompts.txt", "--negative", "<|image start|>", *OPTIONS) == 2
    assert capsys.readouterr().err.startswith("emu3-jax: error: the text contains the special token")
    assert os.listdir(here) == ["prompts.txt"]


def test_a_prompt_that_is_too_long_is_named_by_its_line(here, monkeypatch, capsys):
    long = "long " * 9000
    (here / "prompts.txt").write_text(f"a\n\nb\n{long}\nc\n")
    for source, name in (("prompts.txt", "prompts.txt"), ("-", "standard input")):
        for n in (1, 3):
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((here / "prompts.txt").read_bytes())))
            assert run("generate", "--prompts-file", source, "-n", n, *OPTIONS) == 2
            line = capsys.readouterr().err
            assert line.startswith(f"emu3-jax: error: {name} line 4: a prompt of ") and line.count("\n") == 1
            assert "positions: shorten the prompt" in line
    assert run("generate", "a", long, *OPTIONS) == 2
    assert "error: row 1: a prompt of " in capsys.readouterr().err
    assert os.listdir(here) == ["prompts.txt"]


def test_too_many_pictures_are_refused_before_a_name_is_made(refused, tmp_path, monkeypatch):
    (tmp_path / "k.txt").write_text("a\n" * 1000)
    monkeypatch.setattr(Outputs, "__init__", lambda *_, **__: pytest.fail("names were made"))
    monkeypatch.setattr("emu3_jax.media.picture_files.check_about", lambda *_: pytest.fail("prompts were read"))
    assert refused("generate", "--prompts-file", "k.txt", "-n", 1001, *OPTIONS) == (
        "emu3-jax: error: 1,000 prompts with -n 1001 are 1,001,000 pictures, but one run makes at most 1,000,000: "
        "lower -n, or give fewer prompts\n"
    )


# ------------------------------------------------------------------------------------------------ formats and JSON


def test_formats_hold_the_picture_and_how_it_was_made(here, capsys):
    for kind in PICTURE_FORMATS:
        assert run("generate", 'a "red" 日本 \u00e9', "--format", kind, *OPTIONS) == 0
    assert capsys.readouterr().out == "out/000.png\nout/000.jpg\nout/000.webp\n"
    about = fields("out/000.png")
    assert about["prompt"] == 'a "red" 日本 \u00e9' and about["size"] == "32x32"
    for kind in ("jpg", "webp"):
        assert comment(f"out/000.{kind}") == about
    np.testing.assert_array_equal(pixels("out/000.webp"), pixels("out/000.png"))


def test_jpg_loses_little(tmp_path):
    ramp = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
    image = Image.fromarray(np.stack([ramp, ramp[::-1], np.full_like(ramp, 80)], -1))
    save_picture(image, tmp_path / "x.jpg", {})
    assert np.abs(pixels(tmp_path / "x.jpg").astype(int) - np.asarray(image)).max() <= 4


def test_what_jpg_cannot_hold_is_refused_before_the_work(refused):
    long = "word " * 13_000
    line = refused("generate", "a", long, "--format", "jpg", *OPTIONS)
    assert "a jpg file holds at most 65,000 bytes about how its picture was made" in line and "png or webp" in line
    assert "holds at most" in refused("generate", "a", "--negative", long, "--format", "jpg", *OPTIONS)
    assert "'gif' is not one of png, jpg, webp" in refused("generate", "a", "--format", "gif", *OPTIONS)
    for kind in ("png", "webp"):
        check_about(kind, {"prompt": long})


def test_the_longest_text_that_jpg_holds(tmp_path):
    image = Image.new("RGB", (8, 8))
    about = {"prompt": "x" * (65_000 - len(json.dumps({"prompt": ""})))}
    save_picture(image, tmp_path / "x.jpg", about)
    assert comment(tmp_path / "x.jpg") == about
    about["prompt"] += "x"
    with pytest.raises(Emu3Error, match="65,001"):
        save_picture(image, tmp_path / "y.jpg", about)
    assert os.listdir(tmp_path) == ["x.jpg"]


def test_json_lines_have_the_types_of_json(here, capsys):
    words = ("generate", "a", "b", "--json", "--guidance", 1.5, "--negative", "blurry", *OPTIONS)
    assert run(*words) == 0 and run(*words) == 0
    out, error = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    passes = [line.pop("passes") for line in lines]
    assert passes[:2] == passes[2:] and all(type(count) is int and 1 < count < 20 for count in passes)
    about = {
        "prompt": "b", "negative": "blurry", "size": "32x32", "ratio": "1:1", "seed": 1, "guidance": 1.5,
        "temperature": 1.0, "top_k": 2048, "top_p": 1.0, "model": "golden", "software": "emu3-jax",
    }  # fmt: skip
    assert len(lines) == 4 and lines[1] == {"file": "out/001.png", "replaced": False, **about}
    assert lines[3] == {"file": "out/001.png", "replaced": True, **about}
    assert error == "emu3-jax: replaced out/000.png, out/001.png\n"


# ------------------------------------------------------------------------------------------------ outputs that exist


def test_what_a_run_replaces_is_named(here, capsys):
    (here / "out").mkdir()
    (here / "out" / "001.png").write_text("old")
    (here / "out" / "other.png").write_text("stays")
    assert run("generate", "a", "b", *OPTIONS) == 0
    assert capsys.readouterr() == ("out/000.png\nout/001.png\n", "emu3-jax: replaced out/001.png\n")
    assert (here / "out" / "other.png").read_text() == "stays" and pixels("out/001.png").shape == (32, 32, 3)


def test_what_is_replaced_is_named_before_standard_output_fails(here, monkeypatch, capsys):
    (here / "out").mkdir()
    (here / "out" / "000.png").touch()
    monkeypatch.setattr("emu3_jax.cli.output.json_line", lambda _: pytest.fail("this is printed first"))
    monkeypatch.setattr(Outputs, "report", lambda outputs: sys.exit(f"replaced {outputs.replaced[0]}"))
    assert run("generate", "a", "--json", *OPTIONS) == "replaced out/000.png"


@pytest.mark.parametrize("options", [(), ("--no-clobber",)])
def test_an_output_with_no_place_is_refused_before_a_model_is_loaded(refused, tmp_path, options):
    (tmp_path / "a.txt").touch()
    (tmp_path / "link").symlink_to("absent")
    words = ("generate", "a", *options, "-o")
    assert "cannot write to a.txt/x: a.txt is a file, not a directory; choose another place" in refused(
        *words, "a.txt/x"
    )
    assert "cannot write to link: link is a link that leads nowhere; delete it or" in refused(*words, "link")
    assert "cannot write to /dev/null/x: /dev/null is a file, not a directory" in refused(*words, "/dev/null/x")


def test_no_clobber_refuses_before_a_model_is_loaded(refused, tmp_path):
    """Each command that writes files into a user's folder; of the pictures any one is enough."""
    out = tmp_path / "out"
    out.mkdir()
    save_codes("codes.npz", {"a": np.zeros((4, 4), np.int32), "b": np.zeros((1, 4, 4), np.int32)})
    (tmp_path / "evaluate.py").write_text(
        "from emu3_jax.evaluation.config import EvaluateConfig\n"
        "def config():\n    return EvaluateConfig(model='absent', data='absent', directory='out')\n"
    )
    for name in ("001.png", "000.webp", "000.gif", "b.webp", "tokens.npz", "x.npz", "index.html"):
        (out / name).write_text("kept")
    for words, file in (
        (("generate", "a", "b", "-o", "out"), "out/001.png"),
        (("generate", "a", "-n", 2, "-o", "out"), "out/001.png"),
        (("generate", "a", "--format", "webp", "-o", "out"), "out/000.webp"),
        (("generate", "a", "--format", "jpg", "--save-tokens", "-o", "out"), "out/tokens.npz"),
        (("video", "a", "--format", "gif", "-o", "out"), "out/000.gif"),
        (("detokenize", "codes.npz", "-o", "out"), "out/b.webp"),
        (("tokenize", "picture.png", "-o", "out/x.npz"), "out/x.npz"),
        (("evaluate", "evaluate.py"), "out/index.html"),
    ):
        line = refused(*words, "--no-clobber")
        assert f"error: {file} exists already: choose another output, or leave --no-clobber out" in line
    (out / "000.png").symlink_to("nowhere")
    assert "out/000.png exists already (and 1 more of the output files)" in refused(
        "generate", "a", "b", "-o", "out", "--no-clobber"
    )


def test_no_clobber_lets_new_files_pass(here, golden_model, monkeypatch, capsys):
    monkeypatch.setattr(type(golden_model), "tokenize", lambda *_, **__: [np.zeros((4, 4), np.int32)])
    outputs = {
        "generate": ("a", *OPTIONS),
        "tokenize": ("a.png", "-o", "out/x.npz"),
        "detokenize": ("out/x.npz", *OPTIONS[2:]),
    }
    for command, words in outputs.items():
        assert run(command, *words, "--no-clobber") == 0
    assert sorted(os.listdir("out")) == ["000.png", "a.png", "x.npz"] and capsys.readouterr().err == ""
    assert load_codes("out/x.npz")["a"].shape == (4, 4)
    for command, words in outputs.items():
        assert run(command, *words) == 0
    replaced = ("000.png", "x.npz", "a.png")
    assert capsys.readouterr().err == "".join(f"emu3-jax: replaced out/{name}\n" for name in replaced)


def test_a_file_that_comes_while_a_command_works_is_kept_too(here, monkeypatch, capsys):
    whole = session.run

    def meanwhile(*arguments, **options):
        (here / "out").mkdir()
        (here / "out" / "000.png").write_text("of another program")
        return whole(*arguments, **options)

    monkeypatch.setattr(session, "run", meanwhile)
    assert run("generate", "a", "b", "--no-clobber", *OPTIONS) == 2
    out, error = capsys.readouterr()
    assert out == "" and "out/000.png exists already" in error
    assert os.listdir(here) == ["out"] and os.listdir("out") == ["000.png"]
    assert (here / "out" / "000.png").read_text() == "of another program"


def test_a_file_that_comes_after_the_last_look_is_kept_too(here, golden_model, monkeypatch, capsys):
    """The names are given so that two runs at once cannot replace each other's files. None of the new ones stays."""
    monkeypatch.setattr(type(golden_model), "tokenize", lambda *_, **__: [np.zeros((4, 4), np.int32)])
    save_codes("codes.npz", {"a": np.zeros((4, 4), np.int32), "b": np.zeros((4, 4), np.int32)})
    whole = Outputs.look
    for words, late in (
        (("generate", "a", "b", *OPTIONS), "out/001.png"),
        (("detokenize", "codes.npz", *OPTIONS[2:]), "out/b.png"),
        (("tokenize", "a.png", "-o", "x.npz"), "x.npz"),
    ):

        def look(outputs, late=here / late):
            whole(outputs)
            if look.calls:
                late.parent.mkdir(exist_ok=True)
                late.write_text("of another program")
            look.calls += 1

        look.calls = 0
        monkeypatch.setattr(Outputs, "look", look)
        before = set(os.listdir(here))
        assert run(*words, "--no-clobber") == 2
        out, error = capsys.readouterr()
        assert out == "" and f"error: {late} exists already: another program wrote it just now" in error
        assert (here / late).read_text() == "of another program"
        assert set(os.listdir(here)) - before == {late.split("/")[0]}
        if "/" in late:
            assert os.listdir("out") == [late.split("/")[1]]
            shutil.rmtree("out")


def test_ten_replaced_files_are_named_and_the_others_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [tmp_path.__class__(f"{row}.png") for row in range(12)]
    for file in files:
        file.touch()
    written = Outputs(files, no_clobber=False)
    written.report()
    assert capsys.readouterr().err == ""
    written.look()
    written.report()
    names = ", ".join(f"{row}.png" for row in range(10))
    assert capsys.readouterr().err == f"emu3-jax: replaced {names}, and 2 more\n"

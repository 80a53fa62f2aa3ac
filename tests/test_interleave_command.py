"""`emu3-jax interleave`: its files and lines, and what it refuses."""

import itertools
import json
import pathlib

import numpy as np
import pytest
from emu35 import write_checkpoints
from PIL import Image

import emu3_jax
from emu3_jax.cli.main import main
from emu3_jax.cli.pages import Terminal
from emu3_jax.errors import Emu3Error
from emu3_jax.generation import interleaving
from emu3_jax.generation.documents import Writing
from emu3_jax.media.clips import Clip, save_clip
from emu3_jax.text.prompts import next_turn_prompt, understanding_prompt

pytestmark = [pytest.mark.slow, pytest.mark.compiled_quickly, pytest.mark.usefixtures("shared_models")]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, vocabulary):
    """The golden model of Emu3.5, converted from its two published directories by the command line."""
    root = tmp_path_factory.mktemp("emu35")
    sources = write_checkpoints(root, vocabulary, steer=True)
    assert main(["convert", *map(str, sources), "-o", str(root / "bundle"), "--quiet"]) == 0
    return root / "bundle"


def test_turns_of_a_conversation(bundle, tmp_path, capsys):
    """The golden story, and a second turn: on one page, as Markdown and HTML."""
    out, prompt = tmp_path / "out", "How to cook <b>dumplings</b>"
    options = ["--task", "story", "--greedy", "--max-new-tokens", "120", "--size", "2*3", "--dtype", "float32"]
    arguments = [prompt, "Another one\nplease", *options, "--together", "--html", "--save-tokens", "--json"]
    capsys.readouterr()
    assert main(["interleave", *arguments, "--model", str(bundle), "-o", str(out)]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["file"] == second["file"] == str(out / "000.md") and first["prompt"] == prompt
    page, html = (out / "000.md").read_text(), (out / "000.html").read_text()
    assert page.startswith(f"> {prompt}\n\n") and "\n\n> Another one\n> please\n\n" in page
    assert "How to cook &lt;b&gt;dumplings&lt;/b&gt;" in html and "<b>" not in html and "<script" not in html
    shown = [piece["picture"] for about in (first, second) for piece in about["pieces"] if "picture" in piece]
    assert shown and shown == [str(out / f"000_{number}.png") for number in range(len(shown))]
    for name in shown:
        assert pathlib.Path(name).is_file() and f'src="{pathlib.Path(name).name}"' in html
    with np.load(out / "tokens.npz") as ids:
        shared = len(ids["0"]) - first["tokens"]
        assert ids["1"][:shared].tolist() == ids["0"][:shared].tolist()  # the second goes on from the first
        assert len(ids["1"]) - second["tokens"] > shared


def test_a_picture_that_is_cut_off(bundle, tmp_path, capsys):
    arguments = ["How to cook dumplings", "--task", "story", "--greedy", "--max-new-tokens", "80", "--dtype", "float32"]
    command = ["interleave", *arguments, "--model", str(bundle), "-o"]
    capsys.readouterr()
    assert main([*command, str(tmp_path / "out"), "--size", "20*11"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "Once upon a time"
    page = (tmp_path / "out" / "000.md").read_text()
    assert page.endswith("![](000_0.png)\n\n(cut off: the document was too long)\n")
    with Image.open(tmp_path / "out" / "000_0.png") as picture:
        assert picture.width == 176 and 0 < picture.height < 320  # its finished rows
    # A picture whose size the model chooses is not begun, because the smallest has 117 tokens.
    assert main([*command, str(tmp_path / "free")]) == 0
    assert [path.name for path in (tmp_path / "free").iterdir()] == ["000.md"]


def test_the_largest_size(bundle, tmp_path):
    """The golden story has pictures of 20*11. Limits of size and tokens change them."""
    arguments = ["How to cook dumplings", "--task", "story", "--greedy", "--dtype", "float32", "--model", str(bundle)]
    for name, options in {"limit": ["--max-size", "13*15"], "tokens": []}.items():
        command = ["interleave", *arguments, "--max-new-tokens", "170", *options, "-o", str(tmp_path / name)]
        assert main(command) == 0
        assert "cut off" not in (tmp_path / name / "000.md").read_text().split("000_1")[0]
    sizes = {}
    for name in ("limit", "tokens"):
        with Image.open(tmp_path / name / "000_0.png") as picture:
            sizes[name] = picture.size
    # The first digit of rows must be 1 in both: 20 is more than 13, and 20 rows of 10 take more than 170 tokens.
    assert sizes["limit"] == (176, 176)
    columns, rows = (side // 16 for side in sizes["tokens"])
    assert 10 <= rows < 20 and columns >= 10 and 8 + rows * (columns + 1) - 1 < 170


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a story"], "a model of Emu3.5 needs a task: give one of t2i, x2i, story, howto, explore"),
        (["a story", "--task", "story", "--size", "400*400"], "a picture of 400*400 takes"),
        (["a story", "--task", "story", "--size", "0*4"], "'0*4' is no size: give H*W in visual tokens"),
        (["a story", "--task", "story", "--max-size", "9*20"], "max_size is 9*20: the sides that this model chooses"),
        (["a story", "--task", "story", "--max-size", "auto"], "'auto' is no size: give H*W in visual tokens"),
        (["a story", "--task", "story", "--max-size", "20*20", "--size", "4*4"], "leave one of them out"),
        (["a story", "--task", "story", "--image-guidance", "2"], "guides towards given pictures, and there is none"),
        (["a <|image start|> story", "--task", "story"], "contains the special token <|image start|>"),
        (
            ["a <|image start|>1*<|image start|> story", "--task", "story", "--allow-special"],
            "control tokens form no whole picture: id 5 of the sequence is 151852",
        ),
        (["a <|image end|> story", "--task", "story", "--allow-special"], "but no BOI opened one; correct or remove"),
        (["a <|visual token 000003|>", "--task", "story", "--allow-special"], "control tokens form no whole picture"),
        (["a <|image start|>1*1<|image token|>", "--task", "story", "--allow-special"], "but does not end it"),
        (["a story", "--task", "story", "--image", "nowhere.png"], "cannot read nowhere.png"),
        (["a story", "--task", "story", "--guidance", "nan"], "guidance is nan"),
        (["a story", "--task", "story", "--image", "clip.webp"], "clip.webp: a clip: the vision tokenizer of Emu3.5"),
        (["a story", "--task", "story", "--frames", "0"], "frames is 0"),
    ],
)
def test_what_is_refused(bundle, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    if "clip.webp" in arguments:
        save_clip(
            np.arange(4, dtype=np.uint8).repeat(32 * 32 * 3).reshape(4, 32, 32, 3) * 60, tmp_path / "clip.webp", 8
        )
    capsys.readouterr()
    try:
        code = main(["interleave", *arguments, "--model", str(bundle), "-o", str(tmp_path / "out")])
    except SystemExit as error:  # from argparse
        code = error.code
    captured = capsys.readouterr()
    assert code == 2 and message in captured.err and captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [["generate", "a dog"], ["video", "a dog"], ["chat", "000.png", "--prompt", "What is it?"]]
)
def test_commands_for_emu3_refuse_models_of_emu35(bundle, tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save("000.png")
    output = [] if arguments[0] == "chat" else ["-o", "out"]
    capsys.readouterr()
    assert main([*arguments, "--model", str(bundle), *output]) == 2
    captured = capsys.readouterr().err
    assert captured.count("\n") == 1 and ("interleave" in captured or "pictures alone" in captured)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text_top_k": 0}, "text_top_k is 0"),
        ({"on_piece": 3}, "on_piece is 3: it must be a function, or None"),
        ({"on_rows": "print"}, "on_rows is 'print': it must be a function, or None"),
        ({"text_temperature": -1.0}, "text_temperature is -1.0"),
        ({"top_p": 2.0}, "^top_p is 2.0"),
        ({"images": [7]}, "7 is no picture or clip: give a path"),
        ({"images": {"a": 1}}, "is no picture or clip: give a path"),
        ({"images": [b"photo.png"]}, "is no picture or clip: give a path"),
        ({"max_size": (20,)}, r"max_size is \(20,\): it must be \(rows, columns\)"),
        ({"max_size": (5, 5)}, "max_size is 5.5: the sides that this model chooses have at least 10"),
        ({"max_size": (20, 20), "images": [np.zeros((64, 64, 3), np.uint8)]}, "which is more than max_size 20.20"),
    ],
)
def test_what_python_refuses(bundle, arguments, message):
    model = emu3_jax.load(bundle)
    with pytest.raises(emu3_jax.Emu3Error, match=message):
        model.interleave("a story", task="story", max_new_tokens=4, **({"images": ()} | arguments))


@pytest.mark.parametrize("other", ["tokenizer", "vision"])
def test_parts_of_another_family(bundle, tiny_bundle, tmp_path, capsys, other):
    for part in ("decoder", "tokenizer", "vision"):
        (tmp_path / "mixed" / part).parent.mkdir(exist_ok=True)
        (tmp_path / "mixed" / part).symlink_to((tiny_bundle if part == other else bundle) / part)
    capsys.readouterr()
    out = ["-o", str(tmp_path / "out"), "--model", str(tmp_path / "mixed")]
    assert main(["interleave", "a story", "--task", "story", "--max-new-tokens", "4", *out]) == 2
    captured = capsys.readouterr().err
    assert captured.count("\n") == 1 and "one and the same model" in captured
    assert not (tmp_path / "out").exists()


def test_models_of_emu3_have_no_tasks(tiny_bundle, tmp_path, capsys):
    capsys.readouterr()
    out = ["-o", str(tmp_path / "out"), "--model", str(tiny_bundle)]
    assert main(["interleave", "a story", "--task", "story", *out]) == 2
    assert "this model is of Emu3, which has no tasks: leave it out" in capsys.readouterr().err
    assert main(["interleave", "a story", "another", "--max-new-tokens", "12", *out]) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.md")) == ["000.md", "001.md"]


def test_pictures_grow_row_by_row(bundle, tmp_path, capsys):
    """Each time with more rows. Rows that are shown are those of the picture, and its last file is the picture."""
    arguments = ["How to cook dumplings", "--task", "story", "--greedy", "--size", "6*7", "--max-new-tokens", "128"]
    capsys.readouterr()
    command = ["interleave", *arguments, "--model", str(bundle), "-o", str(tmp_path / "out"), "--dtype", "float32"]
    assert main([*command, "--json", "--live", str(tmp_path / "live")]) == 0
    *grown, about = map(json.loads, capsys.readouterr().out.splitlines())
    files = [line["growing"] for line in grown]
    assert files == sorted(files) and set(files) == {str(tmp_path / "live" / "000" / f"000{i}.png") for i in range(2)}
    first = [line["rows"] for line in grown if line["growing"] == files[0]]
    assert first == sorted(set(first)) and first[0] > 0 and first[-1] < 6 and all(line["of"] == 6 for line in grown)
    pictures = [piece["picture"] for piece in about["pieces"] if "picture" in piece]
    with Image.open(pictures[0]) as whole, Image.open(files[0]) as last:
        np.testing.assert_array_equal(np.asarray(whole), np.asarray(last))
    capsys.readouterr()
    assert main([*command, "--live", str(tmp_path / "live")]) == 2
    assert "live is not empty" in capsys.readouterr().err
    model = emu3_jax.load(bundle, dtype="float32")
    seen = []
    (document,) = model.interleave(
        "How to cook dumplings", task="story", size=(6, 7), max_new_tokens=70, temperature=0.0, text_temperature=0.0,
        on_rows=lambda row, piece: seen.append((row, piece)),
    )  # fmt: skip
    codes = [piece.codes for piece in document.pieces if piece.codes is not None]
    assert seen and all(row == 0 and piece.picture.height == 16 * len(piece.codes) for row, piece in seen)
    for _, piece in seen:
        np.testing.assert_array_equal(piece.codes, codes[piece.number][: len(piece.codes)])


def test_texts_grow(tiny_bundle, monkeypatch):
    """Each time more of the text is there; the last time, at most what came with the end is missing."""
    monkeypatch.setattr(interleaving, "PASSES_PER_CALL", 3)
    model = emu3_jax.load(tiny_bundle, dtype="float32")
    options = {"max_new_tokens": 16, "guidance": 1.0, "text_temperature": 0.0}
    seen, events = [], []
    (document,) = model.interleave(
        "a dog", **options, on_text=lambda row, text: seen.append((row, text)),
        on_piece=lambda row, piece: events.append((len(seen), piece)),
    )  # fmt: skip
    first, (piece, *_) = events[0][0], document.pieces
    assert piece.kind == "text" and first > 1 and events[0][1] == piece
    texts = [text for _, text in seen[:first]]
    assert {row for row, _ in seen} == {0} and len(set(texts)) > 1
    assert all(later.startswith(text) for text, later in itertools.pairwise([*texts, piece.text]))
    turns, again = model.interleave_turns(**options), []
    turns.send("a dog", on_text=again.append)
    assert again == [text for _, text in seen]


def test_a_terminal_shows_each_text_once(capsys):
    terminal = Terminal()
    for text in (" Once", " Once upon ", " Once upon a\x1b"):
        terminal.grow(text)
    terminal.end("Once upon a\\x1b time")
    terminal.end("out/000_0.png")
    terminal.grow("Then")
    terminal.end("it changed")
    assert capsys.readouterr().out == "Once upon a\\x1b time\nout/000_0.png\nThen\nit changed\n"


def test_clips_in_prompts_of_emu3(golden_model):
    """A clip as one of few frames, and its frames as pictures: in documents, and in a later turn of a conversation."""
    clip = Clip(np.arange(6, dtype=np.uint8).repeat(32 * 32 * 3).reshape(6, 32, 32, 3) * 40)
    language = golden_model.language
    options = {"max_new_tokens": 2, "guidance": 1.0, "temperature": 0.0, "text_temperature": 0.0}
    parts = (language.tokenizer, language.config.tokens, language.templates)
    (document,) = golden_model.interleave("What moves", clip, clips_as="clip", frames=4, **options)
    codes = golden_model.tokenize([Clip(clip.frames[[0, 1, 3, 4]])])
    assert document.ids[: document.prompt_length].tolist() == understanding_prompt(*parts, "What moves", codes)
    turns = golden_model.interleave_turns(clips_as="images", frames=2, **options)
    turns.send("What is this")
    second = turns.send("And here", [clip])
    codes = golden_model.tokenize([clip.frames[0], clip.frames[3]])
    expected = next_turn_prompt(*parts, "And here", codes)
    assert second.ids[: second.prompt_length].tolist()[-len(expected) :] == expected
    with pytest.raises(emu3_jax.Emu3Error, match="clips_as is 'video'"):
        golden_model.interleave("What moves", clip, clips_as="video")


def test_a_task_that_is_no_text():
    with pytest.raises(Emu3Error, match=r"task is \['story'\]: it must be one of t2i"):
        Writing(task=["story"])

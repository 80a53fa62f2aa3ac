"""Conversations about pictures and clips: the rows that training makes of them, what is shown of a clip, bad input."""

import io
import json

import numpy as np
import pytest
from conftest import GOLDEN

from emu3_jax import Clip, Emu3Error
from emu3_jax.cli.main import main
from emu3_jax.data.records import Record, Turn
from emu3_jax.data.sequences import ImageToText
from emu3_jax.generation.conversation import Showing
from emu3_jax.media.clips import save_clip
from emu3_jax.text.prompts import understanding_prompt

pytestmark = pytest.mark.compiled_quickly

FILE = GOLDEN / "gray.png"


@pytest.fixture(scope="module")
def clip() -> Clip:
    # 12 frames, each of one grey.
    return Clip(np.repeat(np.arange(12, dtype=np.uint8), 32 * 32 * 3).reshape(12, 32, 32, 3) * 20, 6.0)


@pytest.fixture
def asked(golden_model, monkeypatch) -> list[list[int]]:
    """The rows of ids that the model is asked with; it answers "A dog" and EOS to all."""
    rows = []
    special = golden_model.language.config.tokens

    def answer(language, inputs, *_, **__):
        rows.extend(inputs)
        ids = [*language.tokenizer.encode("A dog"), special.eos, special.pad]
        return [np.asarray(ids, np.int32)] * len(inputs)

    monkeypatch.setattr("emu3_jax.generation.conversation.answer", answer)
    return rows


@pytest.mark.slow
def test_the_first_answer_is_that_of_chat_and_the_second_knows_the_first(golden_model):
    conversation = golden_model.converse(max_new_tokens=6)
    first = conversation.ask("What is this", [FILE])
    assert first == golden_model.chat([FILE], "What is this", max_new_tokens=6)[0]
    second = conversation.ask("And why")
    assert conversation.turns == [("What is this", first), ("And why", second)]
    alone = golden_model.converse(max_new_tokens=6)
    assert alone.ask("And why") != second


def test_a_conversation_is_the_row_that_training_makes_of_it(golden_model, asked):
    language = golden_model.language
    conversation = golden_model.converse()
    for question in ("Who", "Where", "Why"):
        assert conversation.ask(question, [FILE] if question == "Who" else []) == "A dog"
    turns = [Turn(role, text) for q in ("Who", "Where", "Why") for role, text in (("user", q), ("assistant", "A dog"))]
    record = Record("r", "", golden_model.tokenize([FILE])[0], tuple(turns))
    row = ImageToText().sequence(record, language.tokenizer, language.templates).tokens.tolist()
    answer = len(language.tokenizer.encode("A dog")) + 1
    assert asked[-1] == row[:-answer]


def test_later_turns_show_pictures_too(golden_model, asked):
    special = golden_model.language.config.tokens
    conversation = golden_model.converse()
    conversation.ask("What is this", FILE)
    conversation.ask("And these", [FILE, FILE])
    assert asked[0].count(special.boi) == 1 and asked[1].count(special.boi) == 3
    assert asked[1][: len(asked[0])] == asked[0]


@pytest.mark.parametrize(
    ("showing", "greys"),
    [
        (Showing(), [0, 1, 3, 4, 6, 7, 9, 10]),  # eight, spread over all
        (Showing("images"), [0, 1, 3, 4, 6, 7, 9, 10]),
        (Showing("images", frames=3), [0, 4, 8]),
        (Showing("images", fps=2.0), [0, 3, 6, 9]),
        (Showing("images", fps=2.0, frames=2), [0, 3]),
        (Showing("images", frames=12), list(range(12))),
    ],
)
def test_frames_of_a_clip_as_pictures(golden_model, clip, showing, greys):
    codes = showing.codes(golden_model.vision, clip, golden_model.language.config.clip_frames)
    expected = golden_model.tokenize([clip.frames[grey] for grey in greys])
    assert len(codes) == len(expected)
    for one, other in zip(codes, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_clip_as_one_for_models_that_know_clips(golden_model, clip):
    (codes,) = Showing("clip").codes(golden_model.vision, clip, None)
    np.testing.assert_array_equal(codes, golden_model.tokenize([clip])[0])
    (codes,) = Showing().codes(golden_model.vision, clip, trained=4)
    np.testing.assert_array_equal(codes, golden_model.tokenize([Clip(clip.frames[[0, 3, 6, 9]])])[0])


def test_chat_about_a_clip(golden_model, clip, asked):
    language = golden_model.language
    golden_model.chat([clip, [clip, FILE]], "What moves", clips_as="clip", frames=4)
    codes = golden_model.tokenize([Clip(clip.frames[[0, 3, 6, 9]]), FILE])
    for row, shown in zip(asked, (codes[:1], codes), strict=True):
        assert row == understanding_prompt(
            language.tokenizer, language.config.tokens, language.templates, "What moves", shown
        )


def test_bad_showings(golden_model, clip):
    for options, reason in (
        ({"clips_as": "video"}, "clips_as is 'video'"),
        ({"frames": 0}, "frames is 0"),
        ({"fps": -1.0}, "fps is -1"),
    ):
        with pytest.raises(Emu3Error, match=reason):
            golden_model.chat(clip, "What moves", **options)
    with pytest.raises(Emu3Error, match="fewer frames of a clip"):
        golden_model.chat(Clip(clip.frames.repeat(8, axis=0)), "What moves", frames=96)
    conversation = golden_model.converse()
    with pytest.raises(Emu3Error, match="special token"):
        conversation.ask("<|image start|>", FILE)
    assert conversation.turns == []


def test_the_command_holds_a_conversation(golden_bundle, golden_model, capsys, tmp_path, monkeypatch, clip):
    file = tmp_path / "clip.webp"
    save_clip(clip.frames, file, clip.fps)
    conversation = golden_model.converse(max_new_tokens=4, clips_as="clip", frames=4)
    expected = [conversation.ask("What is this", [file, FILE]), conversation.ask("And why")]
    command = ["chat", str(file), str(FILE), "--model", str(golden_bundle), "--dtype", "float32", "--quiet"]
    command += ["--max-new-tokens", "4", "--clips-as", "clip", "--frames", "4"]
    assert main([*command, "--together", "--prompt", "What is this", "And why", "--json"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    files = [str(file), str(FILE)]
    assert printed == [
        {"files": files, "prompt": question, "answer": answer}
        for question, answer in zip(("What is this", "And why"), expected, strict=True)
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("What is this\n\nAnd why\n"))
    assert main(command) == 0
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in expected)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert main(command) == 2
    assert "there is no question" in capsys.readouterr().err

"""Records to sequences: the golden training sample, every task, loss masks, bad records."""

import dataclasses

import numpy as np
import pytest
from conftest import golden_json, golden_npz
from hypothesis import given
from hypothesis import strategies as st

from emu3_jax import Emu3Error, SpecialTokens
from emu3_jax.data.records import Part, Record, Turn
from emu3_jax.data.sequences import (
    ImageToText,
    Interleaved,
    NextFrame,
    TextOnly,
    TextToImage,
    TokenSequence,
    padded_row,
)
from emu3_jax.text.prompts import (
    CHAT,
    STAGE1,
    PromptTemplates,
    clip_ids,
    generation_prompt,
    image_ids,
    next_turn_prompt,
    understanding_prompt,
)
from emu3_jax.text.tokenizer import Tokenizer

SPECIAL = SpecialTokens()


@pytest.fixture(scope="module")
def tokenizer(vocabulary) -> Tokenizer:
    return Tokenizer.from_files(vocabulary, SPECIAL)


def picture(**changes) -> Record:
    codes = np.arange(6, dtype=np.int32).reshape(2, 3)
    return Record(**{"name": "a.png", "text": "a shiba inu", "codes": codes, **changes})


def targets(sequence: TokenSequence) -> list[int]:
    return sequence.tokens[sequence.loss_mask].tolist()


@pytest.mark.parametrize("vision_only", [True, False])
def test_golden_training_sample(tokenizer, vision_only):
    golden, case = golden_npz("train.npz"), golden_json("prompts.json")["train"]
    record = Record("golden", case["text"], golden["codes"].astype(np.int32))
    task = TextToImage(loss="vision" if vision_only else "all")
    sequence = task.sequence(record, tokenizer, CHAT)
    # Outside its vision-only loss, the reference counts padding.
    row = padded_row(sequence, case["max_length"], SPECIAL.pad, loss_on_padding=not vision_only)
    prefix = f"vision_only={vision_only}"
    np.testing.assert_array_equal(row["tokens"], golden[f"{prefix}/input_ids"])
    np.testing.assert_array_equal(np.where(row["loss_mask"], row["tokens"], -100), golden[f"{prefix}/labels"])
    real = golden[f"{prefix}/attention_mask"]
    np.testing.assert_array_equal(row["segment_ids"], real if vision_only else np.where(real == 1, 1, -1))
    if not vision_only:
        np.testing.assert_array_equal(row["positions"], np.arange(case["max_length"]))


def test_padding_is_no_target_unless_the_defect_is_asked_for(tokenizer):
    sequence = TextToImage(loss="all").sequence(picture(), tokenizer, CHAT)
    row = padded_row(sequence, 64, SPECIAL.pad)
    assert row["loss_mask"].sum() == len(sequence)
    assert not row["loss_mask"][len(sequence) :].any() and not row["segment_ids"][len(sequence) :].any()
    assert (row["tokens"][len(sequence) :] == SPECIAL.pad).all()
    np.testing.assert_array_equal(row["positions"][: len(sequence)], np.arange(len(sequence)))
    assert {name: array.dtype for name, array in row.items()} == {
        "tokens": np.int32, "segment_ids": np.int32, "positions": np.int32, "loss_mask": np.bool_,
    }  # fmt: skip


def test_text_to_image_begins_as_generation_does(tokenizer):
    record = picture()
    sequence = TextToImage(eos=True).sequence(record, tokenizer, CHAT)
    prompt = generation_prompt(tokenizer, SPECIAL, record.text, 2, 3)
    assert sequence.tokens[: len(prompt)].tolist() == prompt
    v, eol = SPECIAL.visual_start, SPECIAL.eol
    rest = [v, v + 1, v + 2, eol, v + 3, v + 4, v + 5, eol, SPECIAL.eof, SPECIAL.eoi, SPECIAL.eos]
    assert sequence.tokens[len(prompt) :].tolist() == rest
    assert targets(sequence) == [v + i for i in range(6)]
    assert targets(TextToImage(loss="text").sequence(record, tokenizer, CHAT)) == tokenizer.encode(record.text)


def test_a_dropped_prompt_is_the_empty_one(tokenizer):
    dropped = TextToImage().sequence(picture(), tokenizer, CHAT, drop_prompt=True)
    empty = TextToImage().sequence(picture(text=""), tokenizer, CHAT)
    np.testing.assert_array_equal(dropped.tokens, empty.tokens)
    assert dropped.tokens[0] == SPECIAL.bos and dropped.tokens[1] == SPECIAL.boi


@pytest.mark.parametrize("templates", [CHAT, STAGE1])
def test_image_to_text_begins_as_chat_does(tokenizer, templates):
    record = picture(text="A dog.")
    sequence = ImageToText(question="What is this").sequence(record, tokenizer, templates)
    prompt = understanding_prompt(tokenizer, SPECIAL, templates, "What is this", record.codes)
    answer = [*tokenizer.encode("A dog."), SPECIAL.eos]
    assert sequence.tokens.tolist() == prompt + answer
    assert targets(sequence) == answer
    assert not sequence.loss_mask[: len(prompt)].any()
    visual = targets(ImageToText(loss="vision").sequence(record, tokenizer, templates))
    assert visual == [SPECIAL.visual_start + i for i in range(6)]


def test_every_answer_of_a_conversation_is_a_target(tokenizer):
    turns = (Turn("user", "Who"), Turn("assistant", "A dog"), Turn("user", "Where"), Turn("assistant", "Outside"))
    sequence = ImageToText().sequence(picture(conversation=turns), tokenizer, CHAT)
    answers = [*tokenizer.encode("A dog"), SPECIAL.eos, *tokenizer.encode("Outside"), SPECIAL.eos]
    assert targets(sequence) == answers
    text = tokenizer.decode(sequence.tokens.tolist(), skip_special=True)
    assert text == "You are a helpful assistant. USER: 2*3Who. ASSISTANT:A dogUSER: Where. ASSISTANT:Outside"
    other = PromptTemplates("{image}Q {text}", next_turn="{image}N {text}")
    sequence = ImageToText().sequence(picture(conversation=turns), tokenizer, other)
    text = tokenizer.decode(sequence.tokens.tolist(), skip_special=True)
    assert text == "2*3Q WhoA dogN WhereOutside"


@pytest.mark.parametrize("layout", ["lines", "flat"])
def test_questions_about_a_clip_begin_as_chat_does(tokenizer, layout):
    codes = np.arange(12, dtype=np.int32).reshape(2, 2, 3)
    templates = dataclasses.replace(CHAT, clip_layout=layout)
    turns = (Turn("user", "What moves"), Turn("assistant", "A dog"))
    sequence = ImageToText().sequence(picture(codes=codes, conversation=turns), tokenizer, templates)
    prompt = understanding_prompt(tokenizer, SPECIAL, templates, "What moves", codes)
    assert sequence.tokens.tolist() == [*prompt, *tokenizer.encode("A dog"), SPECIAL.eos]
    assert targets(sequence) == [*tokenizer.encode("A dog"), SPECIAL.eos]
    clip = clip_ids(tokenizer, SPECIAL, codes, layout)
    start = prompt.index(SPECIAL.boi)
    assert prompt[start : start + len(clip)] == clip
    several = understanding_prompt(tokenizer, SPECIAL, templates, "What moves", [codes, codes[0]])
    assert several.count(SPECIAL.boi) == several.count(SPECIAL.eoi) == 2


def test_a_conversation_needs_no_picture(tokenizer):
    turns = (Turn("user", "Who"), Turn("assistant", "I"))
    sequence = ImageToText().sequence(picture(codes=None, conversation=turns), tokenizer, CHAT)
    assert SPECIAL.boi not in sequence.tokens


def test_text_only(tokenizer):
    sequence = TextOnly().sequence(Record("doc", "Es war einmal"), tokenizer, CHAT)
    body = [*tokenizer.encode("Es war einmal"), SPECIAL.eos]
    assert sequence.tokens.tolist() == [SPECIAL.bos, *body]
    assert targets(sequence) == body


@pytest.mark.parametrize("layout", ["lines", "flat"])
def test_next_frame(tokenizer, layout):
    codes = np.arange(12, dtype=np.int32).reshape(2, 2, 3)
    templates = dataclasses.replace(CHAT, clip_layout=layout)
    sequence = NextFrame().sequence(picture(codes=codes), tokenizer, templates)
    v, eol = SPECIAL.visual_start, [SPECIAL.eol] if layout == "lines" else []
    rows = [[v + 3 * row + i for i in range(3)] + eol for row in range(4)]
    frames = [*rows[0], *rows[1], SPECIAL.eof, *rows[2], *rows[3], SPECIAL.eof]
    head = [SPECIAL.bos, *tokenizer.encode("a shiba inu"), SPECIAL.boi, *tokenizer.encode("2*2*3"), SPECIAL.img]
    assert sequence.tokens.tolist() == [*head, *frames, SPECIAL.eoi]
    assert targets(sequence) == [v + i for i in range(12)]


def test_the_paper_s_clip_of_one_frame_is_a_picture_but_for_its_size(tokenizer):
    codes = np.arange(6, dtype=np.int32).reshape(2, 3)
    clip = clip_ids(tokenizer, SPECIAL, codes[None], "lines")
    image = TextToImage().sequence(picture(text=""), tokenizer, CHAT).tokens.tolist()
    assert clip[clip.index(SPECIAL.img) :] == image[image.index(SPECIAL.img) :]


@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(lambda text: "<|" not in text),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    eos=st.booleans(),
)
def test_what_is_text_what_is_vision_and_what_is_all(tokenizer, text, shape, eos):
    record = picture(text=text, codes=np.full(shape, 7, np.int32))
    vision, words, everything = (
        TextToImage(loss=loss, eos=eos).sequence(record, tokenizer, CHAT) for loss in ("vision", "text", "all")
    )
    assert vision.loss_mask.sum() == shape[0] * shape[1]
    assert targets(words) == tokenizer.encode(text)
    assert not (vision.loss_mask & words.loss_mask).any()
    assert everything.loss_mask.all()
    assert len(vision) == len(words) == len(everything) == everything.loss_mask.size


@pytest.mark.parametrize(
    ("task", "record", "reason"),
    [
        (TextToImage(), picture(codes=None), "is plain text, but text to image needs a picture"),
        (TextToImage(), picture(codes=np.zeros((1, 2, 2), np.int32)), "is a clip"),
        (NextFrame(), picture(), "is a picture, but next frame needs a clip"),
        (NextFrame(), picture(codes=np.full((1, 2, 2), 40000, np.int32)), "code 40000 is outside the codebook"),
        (ImageToText(), picture(codes=np.full((1, 2, 2), 40000, np.int32)), "code 40000 is outside the codebook"),
        (TextToImage(), picture(codes=np.full((2, 2), 40000, np.int32)), "code 40000 is outside the codebook"),
        (TextToImage(), picture(text="<|image start|>"), "special token <|image start|>"),
        (TextOnly(), picture(text=""), "has no text"),
    ],
)
def test_records_of_another_kind(tokenizer, task, record, reason):
    with pytest.raises(Emu3Error) as error:
        task.sequence(record, tokenizer, CHAT)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: TextToImage(loss="image"), "loss is 'image'"),
        (lambda: TextToImage(prompt_dropout=1.5), "prompt_dropout is 1.5"),
        (lambda: PromptTemplates("{image}{text}", "{text}"), "once each"),
        (lambda: PromptTemplates("{image}{text}", "{image}{text}", clip_layout="rows"), "clip_layout is 'rows'"),
        (lambda: ImageToText(loss="answers"), "loss is 'answers'"),
    ],
)
def test_bad_settings(make, reason):
    with pytest.raises(Emu3Error, match=reason):
        make()


CODES = [np.full((2, 2), code, np.int32) for code in range(3)]
STORY = (
    Part("user", codes=CODES[0]), Part("user", "a dog"), Part("user", "that barks"),
    Part("assistant", "A dog."), Part("assistant", codes=CODES[1]), Part("assistant", "It barks."),
    Part("user", "again"), Part("assistant", codes=CODES[2]),
)  # fmt: skip


def test_documents_begin_as_interleave_does(tokenizer):
    media = [image_ids(tokenizer, SPECIAL, codes) for codes in CODES]
    text = [tokenizer.encode(text) for text in ("A dog.", "It barks.")]
    prompts = (
        understanding_prompt(tokenizer, SPECIAL, CHAT, "a dog\nthat barks", [CODES[0]]),
        next_turn_prompt(tokenizer, SPECIAL, CHAT, "again"),
    )
    answers = ([*text[0], *media[1], *text[1], SPECIAL.eos], [*media[2], SPECIAL.eos])
    record = Record("story", "", document=STORY)
    sequence = Interleaved().sequence(record, tokenizer, CHAT)
    assert sequence.tokens.tolist() == [*prompts[0], *answers[0], *prompts[1], *answers[1]]
    assert targets(sequence) == [*answers[0], *answers[1]]
    visual = [SPECIAL.visual_start + 1] * 4 + [SPECIAL.visual_start + 2] * 4
    assert targets(Interleaved(loss="vision").sequence(record, tokenizer, CHAT)) == visual
    written = [token for token in targets(sequence) if token < SPECIAL.visual_start]
    assert targets(Interleaved(loss="text").sequence(record, tokenizer, CHAT)) == written
    assert Interleaved(loss="all").sequence(record, tokenizer, CHAT).loss_mask.all()
    for loss in ("answers", "vision", "all"):
        dropped = Interleaved(loss=loss).sequence(record, tokenizer, CHAT, drop_prompt=True)
        empty = understanding_prompt(tokenizer, SPECIAL, CHAT, "", [CODES[0]])
        again = next_turn_prompt(tokenizer, SPECIAL, CHAT, "")
        assert dropped.tokens.tolist() == [*empty, *media[1], SPECIAL.eos, *again, *media[2], SPECIAL.eos]
        assert targets(dropped) == visual


def test_documents_without_roles(tokenizer):
    record = Record("page", "", document=(Part(None, "A dog."), Part(None, codes=CODES[1]), Part(None, "It barks.")))
    media = image_ids(tokenizer, SPECIAL, CODES[1])
    sequence = Interleaved().sequence(record, tokenizer, CHAT)
    written = [*tokenizer.encode("A dog."), *media, *tokenizer.encode("It barks."), SPECIAL.eos]
    assert sequence.tokens.tolist() == [SPECIAL.bos, *written] and targets(sequence) == written
    dropped = Interleaved().sequence(record, tokenizer, CHAT, drop_prompt=True)
    assert dropped.tokens.tolist() == [SPECIAL.bos, *media, SPECIAL.eos]


@pytest.mark.parametrize(
    ("task", "record", "reason"),
    [
        (TextToImage(), Record("a", "", document=STORY), "is a document, but text to image needs a picture"),
        (ImageToText(), Record("a", "", document=STORY), "is a document: train on it with Interleaved"),
        (TextOnly(), Record("a", "", document=STORY), "has no text"),
        (Interleaved(), Record("a", "text"), "is no document"),
    ],
)
def test_documents_need_their_own_task(tokenizer, task, record, reason):
    with pytest.raises(Emu3Error, match=reason):
        task.sequence(record, tokenizer, CHAT)


def test_losses_of_documents():
    with pytest.raises(Emu3Error, match="loss is 'picture': it must be one of answers, vision, text, all"):
        Interleaved(loss="picture")
    with pytest.raises(Emu3Error, match="loss is 'answers': it must be one of vision, text, all"):
        TextToImage(loss="answers")

"""Prompt templates: golden rows of ids, and what pictures and texts may do to their neighbours."""

import numpy as np
import pytest
from conftest import golden_json, golden_npz
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from emu3_jax.config import SpecialTokens
from emu3_jax.errors import Emu3Error
from emu3_jax.media.sizes import generate_size
from emu3_jax.text.prompts import (
    CHAT,
    PRESETS,
    STAGE1,
    PromptTemplates,
    generation_prompt,
    image_ids,
    understanding_prompt,
)
from emu3_jax.text.tokenizer import Tokenizer

GOLDEN = golden_json("text.json")
T = SpecialTokens()
CODES = np.array([[1, 2, 3], [4, 5, 32767]])


@pytest.fixture(scope="module")
def tokenizer(vocabulary):
    return Tokenizer.from_files(vocabulary, T)


def _codes(name):
    return golden_npz("images.npz")[f"{name}/codes"][0]


def assert_left_padded(rows, case):
    """The reference's batch holds these rows: pads on the left, which the mask leaves out, up to the longest row."""
    assert max(map(len, rows)) == len(case["input_ids"][0])
    for row, ids, mask in zip(rows, case["input_ids"], case["attention_mask"], strict=True):
        pads = len(ids) - len(row)
        assert ids == [T.pad] * pads + row
        assert mask == [0] * pads + [1] * len(row)


def pictures_in(ids):
    """The codes of each picture in a row of ids, by the rows that EOL ends."""
    ids, pictures = list(ids), []
    while T.img in ids:
        body, ids = ids[ids.index(T.img) + 1 : ids.index(T.eof)], ids[ids.index(T.eoi) + 1 :]
        rows = np.array(body).reshape(-1, body.index(T.eol) + 1)
        assert (rows[:, -1] == T.eol).all()
        pictures.append(rows[:, :-1] - T.visual_start)
    return pictures


@pytest.mark.parametrize("case", GOLDEN["generation_prompt"])
def test_generation_prompt_equals_reference(tokenizer, case):
    sizes = [generate_size(ratio, case["image_area"]) for ratio in case["ratio"]]
    assert [list(size) for size in sizes] == case["image_size"]
    rows = [generation_prompt(tokenizer, T, text, *size) for text, size in zip(case["text"], sizes, strict=True)]
    assert_left_padded(rows, case)


@pytest.mark.parametrize("case", GOLDEN["understanding_prompt"])
def test_understanding_prompt_equals_reference(tokenizer, case):
    rows = [
        understanding_prompt(tokenizer, T, CHAT, text, _codes(name))
        for text, name in zip(case["text"], case["images"], strict=True)
    ]
    assert_left_padded(rows, case)
    for ids, name in zip(case["input_ids"], case["images"], strict=True):
        np.testing.assert_array_equal(pictures_in(ids), [_codes(name)])


def test_presets():
    assert PRESETS == {"chat": CHAT, "stage1": STAGE1}


def test_stage1_holds_only_image_and_text(tokenizer):
    ids = understanding_prompt(tokenizer, T, STAGE1, "a cat", CODES)
    assert ids == [T.bos, *image_ids(tokenizer, T, CODES), *tokenizer.encode("a cat")]


def test_image_ids_spell_the_grid(tokenizer):
    v = T.visual_start
    size = tokenizer.encode("2*3")
    assert image_ids(tokenizer, T, CODES) == [
        T.boi, *size, T.img, v + 1, v + 2, v + 3, T.eol, v + 4, v + 5, v + 32767, T.eol, T.eof, T.eoi
    ]  # fmt: skip


@pytest.mark.parametrize("none", [None, []])
def test_without_image_the_text_is_one_piece(tokenizer, none):
    ids = understanding_prompt(tokenizer, T, CHAT, "Hello", none)
    assert ids == [T.bos, *tokenizer.encode("You are a helpful assistant. USER: Hello. ASSISTANT:")]


def test_several_images_stand_one_after_the_other(tokenizer):
    ids = understanding_prompt(tokenizer, T, STAGE1, "x", [CODES, CODES[:1]])
    images = image_ids(tokenizer, T, CODES) + image_ids(tokenizer, T, CODES[:1])
    assert ids == [T.bos, *images, *tokenizer.encode("x")]


def test_text_is_never_read_as_template(tokenizer):
    text = "{image} {text} {0} {"
    ids = understanding_prompt(tokenizer, T, CHAT, text, CODES)
    assert tokenizer.decode(ids[-len(tokenizer.encode(text + ". ASSISTANT:")) :]) == text + ". ASSISTANT:"
    assert ids.count(T.boi) == 1


@pytest.mark.parametrize("template", ["", "{text}", "{image}", "{image}{image}{text}", "{image}{text}{text}", None])
def test_bad_template(template):
    with pytest.raises(Emu3Error, match=r"must contain \{image\} and \{text\} once each"):
        PromptTemplates(template, next_turn="{image}{text}")


def test_text_cannot_forge_control_tokens(tokenizer):
    text = "a<|image start|>1*1<|image token|>"
    for build in (
        lambda **kw: generation_prompt(tokenizer, T, text, 2, 3, **kw),
        lambda **kw: understanding_prompt(tokenizer, T, CHAT, text, CODES, **kw),
    ):
        with pytest.raises(Emu3Error, match=r"special token <\|image start\|>"):
            build()
        assert build(allow_special=True).count(T.boi) == 2


@pytest.mark.parametrize("text", ["<|image start", "|>", "\u0338", "<|extra_203|", "<|"])
def test_text_cannot_reach_its_neighbours(tokenizer, text):
    """Halves of tokens and combining characters leave the control tokens beside the text as they are."""
    ids = generation_prompt(tokenizer, T, text, 90, 90)
    assert ids == [T.bos, *tokenizer.encode(text), T.boi, *tokenizer.encode("90*90"), T.img]
    assert max(tokenizer.encode(text)) < T.pad


@pytest.mark.parametrize(
    "codes, message",
    [
        (np.array([[0, 32768]]), "code 32768 is outside the codebook: legal codes are 0 to 32767"),
        (np.array([[-1, 5]]), "code -1 is outside"),
        (np.zeros((2, 0), int), r"must be integers \[h, w\], not int64 \[2, 0\]"),
        (np.zeros((1, 2, 2, 2), int), r"must be integers \[h, w\], not int64 \[1, 2, 2, 2\]"),
        (np.zeros((2, 2)), "not float64"),
    ],
)
def test_bad_codes(tokenizer, codes, message):
    with pytest.raises(Emu3Error, match=message):
        understanding_prompt(tokenizer, T, CHAT, "x", [codes])


images = hnp.arrays(np.int32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=5), elements=st.integers(0, 32767))


@given(pictures=st.lists(images, max_size=3), text=st.sampled_from(["", "x", "a longer text"]))
def test_pictures_of_any_size_stand_in_a_prompt(tokenizer, pictures, text):
    found = pictures_in(understanding_prompt(tokenizer, T, CHAT, text, pictures))
    assert len(found) == len(pictures)
    for ours, theirs in zip(found, pictures, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("case", ["square", "wide"])
def test_a_golden_generation_in_our_ids(tokenizer, case):
    golden = golden_npz("generate.npz")
    ids = golden[f"{case}/sequences"][0].tolist()
    (codes,) = pictures_in(ids)
    assert codes.shape == tuple(golden[f"{case}/image_size"][0])
    assert image_ids(tokenizer, T, codes) == ids[ids.index(T.boi) : ids.index(T.eoi) + 1]

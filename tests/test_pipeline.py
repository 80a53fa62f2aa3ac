"""`Emu3` as its users call it: golden pictures, answers and codes, and bad input."""

import pathlib
import re

import jax
import numpy as np
import pytest
from conftest import GOLDEN, golden_json, golden_npz
from PIL import Image

import emu3_jax
from emu3_jax import Clip, Emu3Error
from emu3_jax.text.prompts import image_ids


@pytest.fixture(scope="module")
def golden():
    return golden_npz("generate.npz")


def small(**changes):
    """Options of a picture of a few tokens."""
    return {"area": 1024, "batch_size": 4, **changes}


@pytest.mark.slow
def test_golden_pictures_in_a_mixed_batch(golden, golden_model):
    case = golden_json("prompts.json")["generate"]["batch"]
    generations = golden_model.generate_sequences(
        case["text"], ratio=case["ratio"], area=case["image_area"], negative=case["negative"],
        guidance=case["guidance"], greedy=True,
    )  # fmt: skip
    for index, generation in enumerate(generations):
        assert list(generation.codes.shape) == golden["batch/image_size"][index].tolist()
        np.testing.assert_array_equal(np.asarray(generation.image), golden[f"batch/image{index}"])
        special = golden_model.language.config.tokens
        picture = image_ids(golden_model.language.tokenizer, special, generation.codes)
        assert generation.ids.tolist()[-len(picture) - 1 : -1] == picture
        assert generation.ids[0] == special.bos and generation.ids[-1] == special.eos
    alone = golden_model.generate_sequences(
        case["text"][1], ratio="4:3", area=case["image_area"], negative=case["negative"], greedy=True
    )[0]
    np.testing.assert_array_equal(alone.ids, generations[1].ids)


@pytest.mark.parametrize("name", ["square", "wide"])
def test_golden_pictures(name, golden, golden_model):
    case = golden_json("prompts.json")["generate"][name]
    (generation,) = golden_model.generate_sequences(
        case["text"], ratio=case["ratio"], area=case["image_area"], negative=case["negative"],
        guidance=case["guidance"], greedy=True,
    )  # fmt: skip
    np.testing.assert_array_equal(generation.ids, golden[f"{name}/sequences"][0])
    np.testing.assert_array_equal(np.asarray(generation.image), golden[f"{name}/image0"])


def test_golden_answers_about_files_alone_and_batched(golden, golden_model):
    tokenizer = golden_model.language.tokenizer
    for name, case in golden_json("prompts.json")["chat"].items():
        files = [GOLDEN / f"{image}.png" for image in case["images"]]
        answers = golden_model.chat(files, case["text"], max_new_tokens=case["new"])
        length = int(golden[f"{name}/prompt_length"])
        expected = [tokenizer.decode(row[length:].tolist(), skip_special=True) for row in golden[f"{name}/sequences"]]
        assert answers == expected


def test_codes_of_files_images_arrays_and_clips(golden_model):
    expected = golden_npz("images.npz")
    file = GOLDEN / "photo.png"
    image = Image.open(file)
    array = np.asarray(image.convert("RGB"))
    for codes in golden_model.tokenize([file, str(file), image, array]):
        assert codes.dtype == np.int32
        np.testing.assert_array_equal(codes, expected["photo/codes"][0])
    clip = Clip(np.stack([array] * 5))
    (codes,) = golden_model.tokenize([clip])
    assert codes.shape == (2, *expected["photo/codes"].shape[1:])  # 5 frames, filled up to 8
    (frames,) = golden_model.detokenize([codes])
    assert frames.frames.shape == (8, 96, 152, 3)
    (still,) = golden_model.detokenize([expected["photo/codes"][0]])
    assert still.size == (152, 96)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "there is no prompt"),
        ({"ratio": "x"}, "x"),
        ({"ratio": "6:1"}, "5:1"),
        ({"area": 10}, "area"),
        ({"ratio": ["1:1", "1:1"]}, "2 values of ratio for 1 prompt"),
        ({"guidance": -1.0}, "guidance is -1.0: it must be a number from 0 to 1e9"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0: it must be a whole number from 1 to 2"),
        ({"top_p": 0.0}, "top_p is 0.0: it must be a number from 1e-9 to 1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": "a"}, "seed is 'a'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"prompts": ["hello <|image start|>"]}, re.escape("<|image start|>")),
        ({"prompts": ["word " * 5000]}, "row 0: a prompt of .* exceed the model's 4096 positions"),
        (
            {"area": 2000 * 2000},
            "row 0: .* exceed the model's 4096 positions: shorten the prompt, or ask for a smaller",
        ),
    ],
)
def test_bad_options_are_refused_in_one_line(options, message, golden_model):
    arguments = {"prompts": "a", **small(), **options}
    with pytest.raises(Emu3Error, match=message) as error:
        golden_model.generate(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ([], {}, "there is no picture"),
        ([GOLDEN / "gray.png"], {"prompts": ["a", "b"]}, "2 values of prompts for 1 item: give one"),
        ([GOLDEN / "gray.png"], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([GOLDEN / "gray.png"], {"prompts": "<|extra_204|>"}, re.escape("<|extra_204|>")),
        ([[GOLDEN / "photo.png"] * 20], {}, "row 0: pictures and question take .* the model has 4096 positions"),
        ([pathlib.Path("absent.png")], {}, "absent.png"),
        ([np.zeros((5, 50, 3), np.uint8)], {}, "8"),
        ([np.zeros((16, 100, 3), np.uint8)], {}, "5"),
        ([np.zeros((16, 16), np.uint8)], {}, "uint8"),
    ],
)
def test_bad_questions_are_refused_in_one_line(images, options, message, golden_model):
    with pytest.raises(Emu3Error, match=message) as error:
        golden_model.chat(images, **{"prompts": "What is this", **options})
    assert "\n" not in str(error.value)


def test_size_errors_name_the_file(golden_model, tmp_path):
    Image.new("RGB", (100, 4)).save(tmp_path / "strip.png")
    with pytest.raises(Emu3Error, match=r"strip\.png"):
        golden_model.tokenize([tmp_path / "strip.png"])


def test_codes_outside_the_codebook_are_refused(golden_model):
    for bad in (-1, 32768):
        with pytest.raises(Emu3Error, match=str(bad)):
            golden_model.detokenize([np.full((2, 2), bad)])


def test_an_absent_bundle_is_named(tmp_path):
    with pytest.raises(Emu3Error, match="absent"):
        emu3_jax.load(tmp_path / "absent")


def test_the_persistent_cache_is_on(golden_model):
    assert golden_model is not None and jax.config.jax_compilation_cache_dir

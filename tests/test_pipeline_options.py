"""`Emu3` as its users call it: options per row, clips and what they go on from, models of which parts are missing."""

import dataclasses
import gc

import jax
import numpy as np
import pytest
from conftest import GOLDEN
from PIL import Image

import emu3_jax
from emu3_jax import Clip, Emu3Error
from emu3_jax.generation import codec, session
from emu3_jax.generation.schedule import clip_schedule
from emu3_jax.media.images import normalise
from emu3_jax.models.vision import make_decoder, make_encoder
from emu3_jax.text.prompts import frame_ids, generation_prompt

pytestmark = pytest.mark.compiled_quickly


def small(**changes):
    """Options of a picture of a few tokens."""
    return {"area": 1024, "batch_size": 4, **changes}


@pytest.mark.slow
def test_a_seed_means_the_same_picture_in_any_company(golden_model):
    together = golden_model.generate_sequences(["a", "b", "a"], seed=5, ratio=["1:1", "2:1", "1:1"], **small())
    alone = golden_model.generate_sequences("a", seed=7, **small())[0]
    np.testing.assert_array_equal(alone.ids, together[2].ids)
    assert (together[0].codes != together[2].codes).any()
    batches = golden_model.generate_sequences(
        ["a", "b", "a"], seed=[5, 6, 7], ratio=["1:1", "2:1", "1:1"], **small(batch_size=2)
    )
    for left, right in zip(together, batches, strict=True):
        np.testing.assert_array_equal(left.ids, right.ids)


def test_clips_are_cut_to_their_frames_and_a_seed_means_the_same_in_any_company(golden_model):
    together = golden_model.generate_clips(["a", "b"], frames=6, fps=4, seed=5, **small())
    assert [clip.frames.shape for clip in together] == [(6, 32, 32, 3)] * 2 and together[0].fps == 4
    (alone,) = golden_model.generate_clips("b", frames=6, seed=6, **small())
    np.testing.assert_array_equal(alone.frames, together[1].frames)
    (first,) = golden_model.generate_clips("b", frames=4, seed=6, guidance=1.0, **small())
    assert first.frames.shape == (4, 32, 32, 3)
    with pytest.raises(Emu3Error, match="frames is 0"):
        golden_model.generate_clips("a", **small(frames=0))


def test_pixels_are_decoded_when_the_cache_is_gone(golden_model, monkeypatch):
    golden_model.generate("a", **small())  # compiles, and caches what later calls keep
    alive, seen = jax.live_arrays(), []
    before = set(map(id, alive))

    def spy(*arguments):
        seen.append([array.shape for array in jax.live_arrays() if id(array) not in before])
        return make_decoder(*arguments)

    monkeypatch.setattr(codec, "make_decoder", spy)
    gc.disable()  # a cycle of references must not keep the cache
    try:
        golden_model.generate(["a", "b"], **small(batch_size=1))
    finally:
        gc.enable()
    assert seen == [[], []]


def test_pictures_say_how_they_were_made(golden_model):
    (image,) = golden_model.generate(
        "ein Füchslein", negative="blurry", guidance=2.5, temperature=0.9, top_k=100, top_p=0.9, seed=11, **small()
    )
    assert image.info == {
        "prompt": "ein Füchslein", "negative": "blurry", "size": "32x32", "ratio": "1:1", "seed": "11",
        "guidance": "2.5", "temperature": "0.9", "top-k": "100", "top-p": "0.9", "passes": "19",
        "model": "golden", "software": "emu3-jax",
    }  # fmt: skip


def test_the_default_area_is_the_models(golden_model, monkeypatch):
    asked = []

    def stop(ratio, area, factor):
        asked.append(area)
        raise Emu3Error("enough")

    monkeypatch.setattr("emu3_jax.generation.pictures.generate_size", stop)
    with pytest.raises(Emu3Error, match="enough"):
        golden_model.generate("a")
    assert asked == [golden_model.language.config.image_area] == [518400]


def test_clips_are_extended(golden_model):
    rng = np.random.default_rng(0)
    first, second = (Clip(rng.integers(0, 256, (count, 32, 32, 3), np.uint8), 6.0) for count in (5, 7))
    clips = golden_model.generate_clips(["a", "b"], frames=6, extend=[first, second], seed=5, **small())
    assert [clip.frames.shape for clip in clips] == [(11, 32, 32, 3), (13, 32, 32, 3)] and clips[0].fps == 6
    for clip, given in zip(clips, (first, second), strict=True):
        np.testing.assert_array_equal(clip.frames[: len(given.frames)], given.frames)
    (alone,) = golden_model.generate_clips("b", frames=6, extend=second, seed=6, **small())
    np.testing.assert_array_equal(alone.frames, clips[1].frames)
    # The context matters: other frames before, other frames after.
    (other,) = golden_model.generate_clips("b", frames=6, extend=Clip(second.frames[::-1]), seed=6, **small())
    assert (other.frames[7:] != alone.frames[7:]).any()


def test_clips_have_eight_frames_a_second_unless_they_go_on_from_a_clip(golden_model):
    picture, clip = Image.new("RGB", (32, 32)), Clip(np.zeros((2, 32, 32, 3), np.uint8), 6.0)
    rates = [made.fps for made in golden_model.generate_clips(["a", "b"], frames=1, extend=[picture, clip], **small())]
    assert rates == [8.0, 6.0]
    (new,) = golden_model.generate_clips("a", frames=1, **small())
    assert new.fps == 8.0


def test_what_is_extended_stands_before_the_new_tokens(golden_model, monkeypatch):
    """Against the ids themselves: the prompt of the decoder is the whole clip's, cut where the new frames begin."""
    seen = []
    run = session.run

    def watched(params, config, rows, *rest, **options):
        seen.append((rows[0].prompt, rows[0].schedule))
        return run(params, config, rows, *rest, **options)

    monkeypatch.setattr(session, "run", watched)
    language = golden_model.language
    clip = Clip(np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8))
    (made,) = golden_model.generate_clips("a", frames=8, extend=clip, guidance=1.0, **small())
    ((prompt, schedule),) = seen
    pixels = normalise(clip.frames, golden_model.vision.image)
    codes = np.asarray(make_encoder(golden_model.vision.config)(golden_model.vision.params, pixels[None]))[0]
    special = language.config.tokens
    head = generation_prompt(language.tokenizer, special, "a", 4, 4, 4)
    assert prompt == [*head, *frame_ids(special, codes, "lines")]
    np.testing.assert_array_equal(schedule, clip_schedule(4, 4, 4)[2 * (4 * 5 + 1) :])
    assert len(made.frames) == 16


def test_clips_longer_than_a_window_slide(golden_model):
    (clip,) = golden_model.generate_clips("a", frames=14, window=8, seed=1, **small())
    assert clip.frames.shape == (14, 32, 32, 3)
    (first,) = golden_model.generate_clips("a", frames=8, window=8, seed=1, **small())
    np.testing.assert_array_equal(clip.frames[:8], first.frames)
    (next_one,) = golden_model.generate_clips(
        "a", frames=4, window=8, extend=first, seed=(1 + 0x9E3779B9) % 2**32, **small()
    )
    np.testing.assert_array_equal(clip.frames[8:12], next_one.frames[8:])


def test_of_a_long_context_its_end_is_seen(golden_model):
    long = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    options = small(frames=8, window=16, seed=1)
    (clip,) = golden_model.generate_clips("a", extend=Clip(long), **options)
    np.testing.assert_array_equal(clip.frames[:40], long)
    (short,) = golden_model.generate_clips("a", extend=Clip(long[-8:]), **options)
    np.testing.assert_array_equal(clip.frames[40:], short.frames[8:])


def test_a_picture_is_extended_at_its_ratio(golden_model):
    (clip,) = golden_model.generate_clips("a", frames=4, extend=Image.new("RGB", (80, 40), "red"), **small(area=2048))
    assert clip.frames.shape == (5, 32, 64, 3) and (clip.frames[0] == (255, 0, 0)).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"frames": 12, "window": 4}, "a window of 4 frames of 4x4 tokens is not .* must have 8 frames or more"),
        ({"window": 4, "extend": Image.new("RGB", (32, 32))}, "it must have 8 frames or more"),
        (
            {"window": 10**6},
            "a window of 1000000 frames .* the model's 4096 positions it must have 7.. frames or less",
        ),
        ({"window": 0}, "window is 0: it must be a whole number >= 1"),
        (
            {"area": 480 * 480, "extend": Image.new("RGB", (32, 32))},
            "the model's 4096 positions hold the prompt and 4 frames of 60x60 tokens, but 8 frames are needed: choose",
        ),
        (
            {"area": 720 * 720, "frames": 4},
            "the prompt and 0 frames of 90x90 tokens, but 4 frames are needed: choose a",
        ),
        ({"negative": "word " * 4090}, "the prompt and 0 frames of 4x4 tokens"),
        ({"extend": []}, "0 values of extend for 1 prompt: give one, or one for each prompt"),
    ],
)
def test_windows_and_clips_that_do_not_do(golden_model, options, message):
    with pytest.raises(Emu3Error, match=message):
        golden_model.generate_clips("a", **small(**options))


def test_clips_to_extend_need_one_shape(golden_model):
    pictures = [Image.new("RGB", (32, 32)), Image.new("RGB", (64, 32))]
    with pytest.raises(Emu3Error, match="differ in size: give one ratio"):
        golden_model.generate_clips(["a", "b"], extend=pictures, **small())


def test_two_models_share_one_vision_tokenizer(golden_bundle, golden_model):
    other = emu3_jax.load(golden_bundle, vision=golden_model, dtype="float32")
    assert other.vision is golden_model.vision
    (image,) = golden_model.generate("a", **small())
    assert isinstance(other.chat(image, "What is this", max_new_tokens=4)[0], str)


def test_several_pictures_or_none_in_one_prompt(golden_model):
    file = GOLDEN / "gray.png"
    answers = golden_model.chat([[file, file], []], "Compare", max_new_tokens=3)
    assert len(answers) == 2 and answers[0] != answers[1]


def test_parts_that_a_bundle_lacks_are_named(golden_bundle, golden_model, tmp_path):
    (tmp_path / "half").mkdir()
    for part in ("decoder", "tokenizer"):
        (tmp_path / "half" / part).symlink_to(golden_bundle / part)
    half = emu3_jax.load(tmp_path / "half", dtype="float32")
    for call in (lambda: half.generate("a"), lambda: half.tokenize([]), lambda: half.chat("x.png", "a")):
        with pytest.raises(Emu3Error, match="model half has no vision tokenizer"):
            call()
    whole = emu3_jax.load(tmp_path / "half", vision=golden_bundle, dtype="float32")
    assert whole.generate("a", **small())[0].size == (32, 32)
    # Questions alone need no vision tokenizer.
    (answer,) = half.chat([[]], "Hello", max_new_tokens=3)
    assert (
        answer == half.converse(max_new_tokens=3).ask("Hello") == golden_model.chat([[]], "Hello", max_new_tokens=3)[0]
    )
    eyes = emu3_jax.Emu3("eyes", vision=golden_model.vision)
    with pytest.raises(Emu3Error, match="model eyes has no decoder"):
        eyes.generate("a")


def test_control_tokens_work_where_the_caller_says_so(golden_model):
    (generation,) = golden_model.generate_sequences("<|extra_0|>", allow_special=True, **small())
    assert generation.ids[1] == 151646


def test_generated_codes_outside_the_codebook_are_refused(golden_model):
    part = golden_model.vision
    fewer = dataclasses.replace(part, config=dataclasses.replace(part.config, codebook_size=1))
    model = emu3_jax.Emu3("two parts", golden_model.language, fewer)
    with pytest.raises(Emu3Error, match="is outside the codebook"):
        model.generate("a", **small())


def test_counts_may_be_of_numpy(golden_model):
    (one,) = golden_model.generate_sequences("a", **small(batch_size=np.int64(2)))
    (other,) = golden_model.generate_sequences("a", **small())
    np.testing.assert_array_equal(one.ids, other.ids)
    assert golden_model.chat([[]], "a", max_new_tokens=np.int32(2)) == golden_model.chat([[]], "a", max_new_tokens=2)

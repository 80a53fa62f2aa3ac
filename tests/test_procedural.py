"""Reading a procedural picture or clip is the inverse of drawing it, for every one, also through blur and noise."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image, ImageFilter

from emu3_jax.evaluation import procedural
from emu3_jax.evaluation.procedural import Motion, Still, all_clips, all_stills, rasterise_clip, rasterise_still
from emu3_jax.media.clips import load_clip, save_clip

pytestmark = pytest.mark.slow

SIDE = 48


def worn(pixels: np.ndarray, seed: int, blur: float = 1.0, noise: float = 8.0) -> np.ndarray:
    """The picture with the kind of damage that a small vision tokenizer does."""
    blurred = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(blur)), float)
    return np.clip(blurred + np.random.default_rng(seed).normal(0, noise, pixels.shape), 0, 255).astype(np.uint8)


def test_every_still_reads_back():
    stills = list(all_stills())
    assert len(set(stills)) == 8 * 6 * 2 * 3 * 5
    assert len({still.caption for still in stills}) == len(stills)
    for number, still in enumerate(stills):
        pixels = rasterise_still(still, SIDE)
        assert procedural.read_still(worn(pixels, number)) == still
        assert procedural.read_still(pixels) == still


def test_variations_read_as_the_exact_drawing():
    rng = np.random.default_rng(0)
    stills, clips = list(all_stills()), list(all_clips())
    for number in range(40):
        variation = procedural.Variation.draw(rng)
        for still in stills[number::40]:
            assert procedural.read_still(rasterise_still(still, 32, variation)) == still, variation
        clip = clips[number * 43]
        assert procedural.read_clip(rasterise_clip(clip, 64, variation)) == clip, variation


def test_every_clip_reads_back():
    clips = list(all_clips())
    assert len(set(clips)) == 8 * 6 * 2 * 3 * 6
    assert len({clip.caption for clip in clips}) == len(clips)
    for clip in clips:
        frames = rasterise_clip(clip, 32)  # small, to be quick; the next test has the full size
        assert procedural.read_clip(frames) == clip


def test_worn_clips_read_back():
    for number, clip in enumerate(itertools.islice(all_clips(), 0, None, 5)):  # 5 shares no factor with the attributes
        frames = [worn(frame, number * 8 + i) for i, frame in enumerate(rasterise_clip(clip, SIDE))]
        assert procedural.read_clip(np.stack(frames)) == clip


def test_second_halves_read_back():
    half = procedural.FRAMES // 2
    for number, clip in enumerate(itertools.islice(all_clips(), 0, None, 5)):
        assert seen_of(procedural.read_extension(rasterise_clip(clip, 32), half)) == seen_of(clip)
        if number % 2 == 0:  # the given frames are true ones, the new ones worn
            frames = rasterise_clip(clip, SIDE)
            frames[half:] = [worn(frame, number * 8 + i) for i, frame in enumerate(frames[half:])]
            assert seen_of(procedural.read_extension(frames, half)) == seen_of(clip)


def seen_of(clip: Motion) -> tuple[str | None, ...]:
    """What an extension is asked for; a shape that grows has another size in its second half."""
    return clip.colour, clip.shape, clip.background, clip.motion


@pytest.mark.parametrize("motion", procedural.MOTIONS)
def test_an_extension_has_to_go_on(motion):
    """The given half's own motion does not count, nor does another one, nor another shape in the new frames."""
    half = procedural.FRAMES // 2
    clip = Motion("green", "star", "small", "gray", motion)
    given = rasterise_clip(clip, SIDE)[:half]
    still = np.concatenate([given, given[-1:].repeat(half, axis=0)])
    assert procedural.read_extension(still, half).motion is None
    other = next(m for m in procedural.MOTIONS if m != motion)
    changed = rasterise_clip(Motion("purple", "circle", "small", "gray", other), SIDE)[half:]
    seen = procedural.read_extension(np.concatenate([given, changed]), half)
    assert (seen.colour, seen.shape) == ("purple", "circle") and seen.motion != motion
    gone = np.concatenate([given, np.full_like(given, 150)])
    assert procedural.read_extension(gone, half) == Motion(None, None, None, "gray", None)


def test_a_part_of_the_way_is_told_by_its_span():
    """What is too little for a whole clip is enough for a part of one, and never without `span`."""
    clip = rasterise_clip(Motion("red", "circle", "large", "white", "moves left"), SIDE)
    assert procedural.read_clip(clip[4:]).motion is None
    assert procedural.read_clip(clip[4:], span=3 / 7).motion == "moves left"
    clip = rasterise_clip(Motion("red", "circle", "large", "white", "grows"), SIDE)
    assert procedural.read_clip(clip[4:]).motion is None
    assert procedural.read_clip(clip[4:], span=3 / 7).motion == "grows"


@pytest.mark.parametrize("side", [32, 64])
def test_other_sides(side):
    for still in itertools.islice(all_stills(), 0, None, 37):
        assert procedural.read_still(rasterise_still(still, side)) == still
    for clip in itertools.islice(all_clips(), 0, None, 97):
        assert procedural.read_clip(rasterise_clip(clip, side)) == clip


def test_captions():
    assert (
        Still("red", "circle", "small", "gray", "left").caption == "a small red circle on the left of a gray background"
    )
    assert Still("red", "star", "large", "white", "center").caption == (
        "a large red star in the center of a white background"
    )
    assert Still("blue", "heart", "large", "black", "top").caption == (
        "a large blue heart at the top of a black background"
    )
    assert Motion("red", "circle", "small", "gray", "moves right").caption == (
        "a small red circle moves right on a gray background"
    )


def test_a_shape_that_is_a_little_off_its_place_is_still_read():
    still = Still("green", "heart", "large", "white", "left")
    moved = np.roll(rasterise_still(still, SIDE), (2, 1), axis=(0, 1))
    assert procedural.read_still(moved) == still


def test_what_is_not_there_is_not_read():
    ground = np.full((SIDE, SIDE, 3), 150, np.uint8)
    assert procedural.read_still(ground) == Still(None, None, None, "gray", None)
    assert procedural.read_clip(np.stack([ground] * 8)) == Motion(None, None, None, "gray", None)
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    assert procedural.read_still(noise).shape is None
    two = rasterise_still(Still("red", "circle", "small", "white", "left"), SIDE)
    two = np.minimum(two, rasterise_still(Still("red", "circle", "small", "white", "right"), SIDE))
    assert procedural.read_still(two).shape is None
    pixels = rasterise_still(Still("red", "star", "small", "white", "top"), SIDE)
    assert procedural.read_clip(np.stack([pixels] * 8)).motion is None


@pytest.mark.parametrize("motion", procedural.MOTIONS)
def test_clips_survive_their_files(tmp_path, motion):
    """Encoders merge equal frames, and `load_clip` counts them again: blinking must not hide their number."""
    frames = rasterise_clip(Motion("red", "star", "small", "white", motion), SIDE)
    save_clip(frames, tmp_path / "clip.webp", fps=4)
    clip = load_clip(tmp_path / "clip.webp")
    assert np.array_equal(clip.frames, frames)
    assert clip.fps == 4


def test_drawing_does_not_change():
    """Data and evaluator may be of different ages: what is drawn and said must stay the same."""
    still = Still("brown", "triangle", "small", "black", "bottom")
    pixels = rasterise_still(still, SIDE)
    assert pixels.dtype == np.uint8
    assert pixels[38, 24].tolist() == list(procedural.COLOURS["brown"])
    assert pixels[0, 0].tolist() == list(procedural.BACKGROUNDS["black"])
    assert json.dumps(still.__dict__) == json.dumps(
        {"colour": "brown", "shape": "triangle", "size": "small", "background": "black", "position": "bottom"}
    )

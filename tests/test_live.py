"""Frames that are shown while later ones are sampled: in Python, and as files of `emu3-jax video --live`."""

import os

import jax
import numpy as np
import pytest
from PIL import Image
from two_processes import Pair

import emu3_jax
from emu3_jax import Clip, Emu3Error
from emu3_jax.cli.main import main
from emu3_jax.generation import engine, session
from emu3_jax.media.clips import load_clip
from emu3_jax.media.images import postprocess
from emu3_jax.media.live import live_frames
from emu3_jax.models import vision
from emu3_jax.models.vision import Stream, make_decoder

pytestmark = pytest.mark.compiled_quickly


class Watch:
    """Keeps what `on_frames` is told, and how far the decode loop was then."""

    def __init__(self, monkeypatch):
        self.told, self.calls = [], 0
        decode = engine.decode

        def watched(params, state, plan, passes, **static):
            self.calls += 1
            return decode(params, state, plan, passes, **static)

        monkeypatch.setattr(engine, "decode", watched)

    def __call__(self, row, first, frames):
        self.told.append((row, first, frames, self.calls))

    def assert_tells(self, row: int, begin: int, clip: Clip):
        """Each frame from `begin` on once, in order, as the clip has it."""
        told = [(first, frames) for number, first, frames, _ in self.told if number == row]
        for first, frames in told:
            assert first == begin and frames.dtype == np.uint8
            np.testing.assert_array_equal(frames, clip.frames[first : first + len(frames)])
            begin += len(frames)
        assert begin == len(clip.frames)


def small(**changes):
    """Options of clips of 4x4 tokens: 21 a latent frame."""
    return {"area": 1024, "seed": 5, **changes}


def test_frames_come_while_later_ones_are_sampled(golden_model, monkeypatch):
    monkeypatch.setattr(session, "PASSES_PER_CALL", 7)
    watch = Watch(monkeypatch)
    (clip,) = golden_model.generate_clips("a", frames=10, on_frames=watch, parallel="off", **small())
    watch.assert_tells(0, 0, clip)
    assert [(first, len(frames)) for _, first, frames, _ in watch.told] == [(0, 4), (4, 4), (8, 2)]
    # The frames end with steps 20, 41 and 61, and so do the calls 3, 6 and 9. When one is shown, the device has been
    # asked for two calls more: one is queued while the host reads, and the frame is fetched at the next reading.
    assert [calls for *_, calls in watch.told] == [3 + 2, 6 + 2, 9 + 1]
    monkeypatch.undo()
    (whole,) = golden_model.generate_clips("a", frames=10, **small())
    np.testing.assert_array_equal(clip.frames, whole.frames)


def test_frames_of_batches_under_guidance(golden_model, monkeypatch):
    watch = Watch(monkeypatch)
    options = small(guidance=[3.0, 1.0, 2.0], negative=["", "x", "blurry"], seed=[9, 5, 9])
    clips = golden_model.generate_clips(["a", "b", "c"], frames=5, batch_size=2, on_frames=watch, **options)
    for row, clip in enumerate(clips):
        watch.assert_tells(row, 0, clip)
    (alone,) = golden_model.generate_clips("c", frames=5, guidance=2.0, negative="blurry", **small(seed=9))
    np.testing.assert_array_equal(alone.frames, clips[2].frames)
    (other,) = golden_model.generate_clips("c", frames=5, guidance=2.0, negative="dark", **small(seed=9))
    assert (other.frames != alone.frames).any()


def test_given_frames_are_not_told_and_passes_tell_new_ones_only(golden_model, monkeypatch):
    watch = Watch(monkeypatch)
    rng = np.random.default_rng(0)
    given = [Clip(rng.integers(0, 256, (count, 32, 32, 3), np.uint8), fps) for count, fps in ((5, 6.0), (9, 12.0))]
    clips = golden_model.generate_clips(
        ["a", "b"], frames=10, window=8, extend=given, guidance=1.0, on_frames=watch, **small()
    )
    assert [clip.fps for clip in clips] == [6, 12]
    for row, (clip, begin) in enumerate(zip(clips, (5, 9), strict=True)):
        assert len(clip.frames) == begin + 10
        watch.assert_tells(row, begin, clip)


@pytest.mark.slow
def test_frames_are_those_of_the_whole_clip_decoded(golden_model, monkeypatch):
    seen = []
    run = session.run

    def watched(*arguments, **options):
        seen.append(run(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(session, "run", watched)
    (clip,) = golden_model.generate_clips("a", frames=12, guidance=1.0, **small())
    tokens, part = golden_model.language.config.tokens, golden_model.vision
    ids = seen[0].ids[0]
    codes = (ids[ids >= tokens.visual_start] - tokens.visual_start).reshape(1, 3, 4, 4)
    pixels = np.asarray(make_decoder(part.config)(part.params, codes.astype(np.int32)))[0]
    assert np.abs(postprocess(pixels, part.image).astype(int) - clip.frames).max() <= 1


def test_parts_share_one_program(golden_model):
    part = golden_model.vision
    vision._make_step.cache_clear()
    for _ in range(2):
        stream = Stream(part.config, part.params, "decode")
        for _ in range(2):
            stream(np.zeros((1, 1, 4, 4), np.int32))
    assert vision._make_step(part.config, "decode", False, "cpu", None)._cache_size() == 1


def test_a_vision_tokenizer_of_one_device_beside_a_decoder_on_a_mesh(golden_bundle, golden_model):
    spread = emu3_jax.load(golden_bundle, vision=golden_model, dtype="float32", mesh="data=2,tensor=2")
    assert len(jax.tree.leaves(spread.vision.params)[0].sharding.device_set) == 1
    told = []
    (clip,) = spread.generate_clips("a", frames=8, on_frames=lambda *frames: told.append(frames), **small())
    np.testing.assert_array_equal(np.concatenate([frames for *_, frames in told]), clip.frames)
    (alone,) = golden_model.generate_clips("a", frames=8, **small())
    np.testing.assert_array_equal(clip.frames, alone.frames)


# ------------------------------------------------------------------------------------------------ files


@pytest.fixture
def frames():
    return np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), np.uint8)


def test_live_frames_are_files_numbered_as_in_their_clips(tmp_path, frames):
    with live_frames(tmp_path / "some" / "live") as write:
        assert (tmp_path / "some" / "live").is_dir()
        write(1, 9, frames[:2])
        write(1, 11, frames[2:])
        write(0, 10000, frames[:1])
        assert sorted(os.listdir(tmp_path / "some" / "live")) == ["000", "001"]
    assert sorted(os.listdir(tmp_path / "some" / "live" / "001")) == ["0009.png", "0010.png", "0011.png"]
    np.testing.assert_array_equal(load_clip(tmp_path / "some" / "live" / "001").frames, frames)
    assert os.listdir(tmp_path / "some" / "live" / "000") == ["10000.png"]


def test_what_was_written_stays_and_what_is_empty_goes(tmp_path, frames):
    for count in (0, 1):
        with pytest.raises(KeyboardInterrupt), live_frames(tmp_path / "live") as write:
            for row in range(count):
                write(row, 0, frames)
            raise KeyboardInterrupt
        assert (tmp_path / "live").exists() == bool(count)
    assert len(os.listdir(tmp_path / "live" / "000")) == 3
    with pytest.raises(Emu3Error, match="live is not empty: choose another directory"), live_frames(tmp_path / "live"):
        raise AssertionError("not reached")
    assert len(os.listdir(tmp_path / "live" / "000")) == 3


def test_places_that_cannot_be_written(tmp_path, frames, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/live"):
        with (
            pytest.raises(Emu3Error, match=f"cannot write .*{place}: .*; choose another"),
            live_frames(tmp_path / place),
        ):
            raise AssertionError("not reached")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(Emu3Error, match=r"0004\.png: No space left"), live_frames(tmp_path / "live") as write:
        write(0, 4, frames)
    assert os.listdir(tmp_path / "live" / "000") == []


@pytest.fixture
def video(tmp_path, monkeypatch, capsys):
    """Runs `emu3-jax video` with the embedded model and `--live`; returns its exit code and its two texts."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        prompt = "a small blue circle moves right on a white background"
        command = ["video", prompt, "--live", "live", "-o", "out", "--guidance", "1", "--quiet"]
        code = main([*command, "--parallel", "off", *arguments])
        return code, *capsys.readouterr()

    return run


def test_the_embedded_model_writes_frames_while_it_samples(video, tmp_path, monkeypatch):
    seen, run = [], session.run

    def watched(*arguments, on_tokens, **options):
        def told(ids):
            on_tokens(ids)
            seen.append((len(ids[0]), sorted(file.name for file in (tmp_path / "live").glob("000/*"))))

        return run(*arguments, on_tokens=told, **options)

    monkeypatch.setattr(session, "run", watched)
    assert video("--frames", "8") == (0, "out/000.webp\n", "")
    # 273 tokens a latent frame. After 400 of 545 the first one's pictures are there, and no clip yet.
    names = [f"{number:04d}.png" for number in range(8)]
    assert seen == [
        (1, []), (129, []), (257, []), (272, []), (400, names[:4]), (528, names[:4]), (544, names), 
    ]  # fmt: skip
    live, whole = load_clip(tmp_path / "live" / "000"), load_clip(tmp_path / "out" / "000.webp")
    assert len(live.frames) == 8 and whole.fps == 8
    # Its player merges equal frames, so that the file may have fewer.
    assert (live.frames[0] == whole.frames[0]).all() and (live.frames[-1] == whole.frames[-1]).all()


def test_an_interrupted_command_leaves_its_frames_and_no_clip(video, tmp_path, monkeypatch):
    run = session.run

    def interrupted(*arguments, on_tokens, **options):
        def told(ids):
            on_tokens(ids)
            if len(ids[0]) == 400:
                raise KeyboardInterrupt

        return run(*arguments, on_tokens=told, **options)

    monkeypatch.setattr(session, "run", interrupted)
    assert video("--frames", "8") == (130, "", "emu3-jax: interrupted\n")
    assert sorted(os.listdir(tmp_path)) == ["live"] and len(os.listdir(tmp_path / "live" / "000")) == 4


def test_bad_input_leaves_no_directory(video, tmp_path):
    for arguments, words in ((("--frames", "0"), "frames is 0"), (("--window", "4"), "it must have 8 frames or more")):
        code, out, error = video(*arguments)
        assert (code, out) == (2, "") and words in error and os.listdir(tmp_path) == []


@pytest.mark.multiprocess
def test_two_processes_decode_alike_and_the_first_one_shows(golden_bundle, golden_model, tmp_path):
    said = Pair(
        "video", "a", "--model", golden_bundle, "--dtype", "float32", "--mesh", "fsdp=2,tensor=2", "--area", 1024,
        "--frames", 8, "--live", tmp_path / "live", "--quiet", "-o", tmp_path / "out",
    ).succeed()  # fmt: skip
    assert said == str(tmp_path / "out" / "000.webp")
    (clip,) = golden_model.generate_clips("a", frames=8, area=1024)
    live = load_clip(tmp_path / "live" / "000")
    assert len(live.frames) == 8 and np.abs(live.frames.astype(int) - clip.frames).max() <= 1

"""Clips: animated files and folders of frames, their rates, and damaged input."""

import os
import pathlib
import sys
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from grey_clips import GREYS, grey_frames, save_frames
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from emu3_jax.errors import Emu3Error
from emu3_jax.media import clips
from emu3_jax.media.clips import Clip, load_clip, resample, save_clip
from emu3_jax.media.frames import is_animated, open_clip

CORPUS = pathlib.Path(__file__).parent / "corpus"


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animated_files(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    path = save_frames(tmp_path / f"x.{suffix}", grey_frames(), duration=40, loop=0, **options)
    clip = load_clip(path)
    assert is_animated(path)
    assert clip.frames.dtype == np.uint8 and clip.fps == 25.0
    np.testing.assert_array_equal(clip.frames, grey_frames())


@pytest.mark.parametrize("suffix", [".webp", ".gif", ".GIF"])
@pytest.mark.parametrize("levels", [GREYS, (10,), (10, 10, 60, 60, 60, 110), (10, 60, 60), (10, 10)])
def test_saved_clips_come_back(tmp_path, suffix, levels):
    """Also where encoders merge equal frames, unless all are equal: a single frame has no rate to compare with."""
    frames = grey_frames(levels)
    save_clip(frames, tmp_path / f"x{suffix}", 25.0)
    clip = load_clip(tmp_path / f"x{suffix}")
    np.testing.assert_array_equal(clip.frames, frames if len(set(levels)) > 1 else frames[:1])
    if len(set(levels)) > 1:
        assert clip.fps == 25.0
    assert os.listdir(tmp_path) == [f"x{suffix}"]


@pytest.mark.parametrize(
    "suffix, fps, expected", [("webp", 24, 1000 / 42), ("gif", 24, 25), ("gif", 50, 50), ("webp", 0.5, 0.5)]
)
def test_rates_are_whole_milliseconds_or_hundredths(tmp_path, suffix, fps, expected):
    save_clip(grey_frames(), tmp_path / f"x.{suffix}", fps)
    assert load_clip(tmp_path / f"x.{suffix}").fps == pytest.approx(expected, rel=1e-12)


def test_webp_is_lossless(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), np.uint8)
    save_clip(frames, tmp_path / "x.webp", 24.0)
    np.testing.assert_array_equal(load_clip(tmp_path / "x.webp").frames, frames)


def test_longer_frames_are_repeated(tmp_path):
    path = save_frames(tmp_path / "x.png", grey_frames(), duration=[40, 80, 40, 200])
    clip = load_clip(path)
    np.testing.assert_array_equal(clip.frames, grey_frames((10, 60, 60, 110, 160, 160, 160, 160, 160)))
    assert clip.fps == 25.0


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_frames_without_duration_last_a_tenth(tmp_path, suffix):
    path = save_frames(tmp_path / f"x.{suffix}", grey_frames(), duration=0)
    assert load_clip(path).fps == open_clip(path).fps == 10.0
    path = save_frames(tmp_path / f"y.{suffix}", grey_frames(), duration=[50, 0, 50, 0])
    assert [len(load_clip(path).frames), load_clip(path).fps] == [6, 20.0]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_transparency_becomes_white(tmp_path, suffix):
    frames = []
    for level in GREYS:
        frame = Image.new("RGBA", (24, 16), (level, level, level, 255))
        frame.paste((0, 200, 0, 0), (8, 8, 24, 16))
        frames.append(frame)
    options = {"webp": {"lossless": True, "exact": True}, "gif": {"disposal": 2}, "png": {"disposal": 1}}[suffix]
    clip = load_clip(save_frames(tmp_path / f"x.{suffix}", frames, duration=40, **options))
    assert clip.frames[:, 0, 0, 0].tolist() == list(GREYS)
    assert (clip.frames[:, 8:, 8:] == 255).all()


def test_png_that_begins_with_a_still_for_other_viewers(tmp_path):
    path = save_frames(tmp_path / "x.png", grey_frames(), default_image=True, duration=40)
    np.testing.assert_array_equal(load_clip(path).frames, grey_frames()[1:])
    path = save_frames(tmp_path / "y.png", grey_frames()[:2], default_image=True, duration=40)
    assert not is_animated(path)


def test_stills_pages_and_previews_are_not_animated(tmp_path):
    for suffix in ("png", "jpg", "gif", "webp", "tif"):
        Image.fromarray(grey_frames()[0]).save(tmp_path / f"x.{suffix}")
        assert not is_animated(tmp_path / f"x.{suffix}")
    for name, form in (("pages.tif", "TIFF"), ("preview.jpg", "MPO")):
        assert not is_animated(save_frames(tmp_path / name, grey_frames(), format=form))
        with Image.open(tmp_path / name) as image:
            assert image.n_frames == 4


def test_a_still_is_a_clip_of_one_frame(tmp_path):
    Image.fromarray(grey_frames()[0]).save(tmp_path / "x.png")
    np.testing.assert_array_equal(load_clip(tmp_path / "x.png").frames, grey_frames()[:1])


def test_folder_in_natural_order(tmp_path):
    names = ["frame1.png", "frame2.png", "frame10.png", "frame11b.png"]
    for name, frame in zip(names, grey_frames(), strict=True):
        Image.fromarray(frame).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a frame")
    (tmp_path / ".hidden.png").write_text("not a frame")
    assert is_animated(tmp_path)
    clip = load_clip(tmp_path)
    np.testing.assert_array_equal(clip.frames, grey_frames())
    assert clip.fps == 24.0


def test_folder_of_different_sizes(tmp_path):
    Image.new("RGB", (24, 16)).save(tmp_path / "a.png")
    Image.new("RGB", (24, 17)).save(tmp_path / "b.png")
    with pytest.raises(Emu3Error, match=r"b\.png is 24x17 pixels, but the clip's first frame is 24x16"):
        load_clip(tmp_path)


def test_bad_folders(tmp_path):
    with pytest.raises(Emu3Error, match="holds no pictures"):
        load_clip(tmp_path)
    (tmp_path / "a.png").write_bytes(b"broken")
    with pytest.raises(Emu3Error, match=r"a\.png is not a picture"):
        load_clip(tmp_path)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated_files(tmp_path, suffix, share):
    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    path = save_frames(tmp_path / f"x.{suffix}", frames, duration=40)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(Emu3Error, match=rf"x\.{suffix}"):
        load_clip(path)


def test_missing_files(tmp_path):
    for read, wanted in ((is_animated, "picture or clip"), (load_clip, "clip"), (open_clip, "clip")):
        with pytest.raises(
            Emu3Error, match=rf"cannot read .*absent\.gif: No such file .*; give a {wanted} that exists"
        ):
            read(tmp_path / "absent.gif")
        with pytest.raises(Emu3Error, match=rf"x\.gif is not a {wanted} in a known format: give a GIF, WebP, PNG, MP4"):
            (tmp_path / "x.gif").write_text("not an animation")
            read(tmp_path / "x.gif")


def test_clips_too_large_for_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(clips, "MAX_CLIP_BYTES", 5 * 16 * 24 * 3)
    assert len(load_clip(save_frames(tmp_path / "a.gif", grey_frames(), duration=40)).frames) == 4
    with pytest.raises(Emu3Error, match=r"b\.gif: the clip has 7 frames of 24x16 pixels"):
        load_clip(save_frames(tmp_path / "b.gif", grey_frames(), duration=[40, 40, 40, 160]))
    with pytest.raises(Emu3Error, match=r"c\.gif: the clip has 8 frames"):
        load_clip(save_frames(tmp_path / "c.gif", grey_frames(range(0, 160, 20)), duration=40))
    (tmp_path / "d").mkdir()
    for number, frame in enumerate(grey_frames(range(6))):
        Image.fromarray(frame).save(tmp_path / "d" / f"{number}.png")
    with pytest.raises(Emu3Error, match=r"the clip .*d has 6 frames"):
        load_clip(tmp_path / "d")


@pytest.mark.parametrize(
    "frames, fps, message",
    [
        (np.zeros((0, 8, 8, 3), np.uint8), 24.0, r"frames are uint8 \[0, 8, 8, 3\]"),
        (np.zeros((2, 8, 8), np.uint8), 24.0, r"frames are uint8 \[2, 8, 8\]"),
        (np.zeros((2, 8, 8, 4), np.uint8), 24.0, r"must be uint8 \[T, H, W, 3\]"),
        (np.zeros((2, 8, 8, 3), np.float32), 24.0, "frames are float32"),
        (np.zeros((2, 8, 8, 3), np.uint8), 0, "fps is 0"),
        (np.zeros((2, 8, 8, 3), np.uint8), float("nan"), "fps is nan"),
        (np.zeros((2, 8, 8, 3), np.uint8), float("inf"), "fps is inf"),
    ],
)
def test_bad_clips(frames, fps, message, tmp_path):
    with pytest.raises(Emu3Error, match=message):
        Clip(frames, fps)
    with pytest.raises(Emu3Error, match=message):
        save_clip(frames, tmp_path / "x.webp", fps)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name, fps, message",
    [
        ("x.mov", 24, r"x\.mov: the name must end in \.webp, \.png, \.gif, \.mp4 or \.webm"),
        ("x", 24, "the name must end in"),
        ("x.gif", 51, r"fps is 51: a \.gif clip must have 0.1 to 50 frames per second"),
        ("x.webp", 1001, "must have 0.1 to 1000"),
        ("x.gif", 0.01, "must have 0.1 to 50"),
        ("missing/x.gif", 24, "cannot write .*: No such file"),
    ],
)
def test_clips_that_cannot_be_saved(tmp_path, name, fps, message):
    with pytest.raises(Emu3Error, match=message):
        save_clip(grey_frames(), tmp_path / name, fps)
    assert os.listdir(tmp_path) == []


@settings(max_examples=25)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.integers(1, 50))
def test_round_trip_of_any_levels_and_rate(tmp_path_factory, levels, fps):
    """Held frames come back as often as they were, where one frame is not held and so tells the rate."""
    frames = grey_frames([60 * level for level in levels] + [255])
    path = tmp_path_factory.getbasetemp() / "clip.webp"
    save_clip(frames, path, fps)
    clip = load_clip(path)
    np.testing.assert_array_equal(clip.frames, frames)
    assert 1000 / clip.fps == pytest.approx(round(1000 / fps))


# ------------------------------------------------------------------------------------------------ videos and rates


def shades(clip: Clip) -> list[int]:
    """Of each frame, away from the coloured corner."""
    return [int(frame[-1, -1, 0]) for frame in clip.frames]


@pytest.mark.parametrize("fps, frames, expected, rate", [
    (None, None, [10, 60, 110, 160], 8.0),
    (4.0, None, [10, 110], 4.0),
    (16.0, None, [10, 10, 60, 60, 110, 110, 160, 160], 16.0),
    (12.0, None, [10, 10, 60, 110, 110, 160], 12.0),
    (16.0, 3, [10, 10, 60], 16.0),
    (1.0, None, [10], 1.0),
    (4.0, 9, [10, 110], 4.0),
    (None, 2, [10, 110], 4.0),
    (None, 8, [10, 10, 60, 60, 110, 110, 160, 160], 16.0),
])  # fmt: skip
@pytest.mark.parametrize("suffix", [".png", ".mp4", ".webm"])
def test_resampling(tmp_path, suffix, fps, frames, expected, rate):
    """The same for files that hold frames as they are, and for videos, which are resampled while they are read."""
    save_clip(grey_frames(height=32, width=48), tmp_path / f"x{suffix}", 8.0)
    clip = load_clip(tmp_path / f"x{suffix}", fps=fps, frames=frames)
    assert clip.fps == pytest.approx(rate)
    np.testing.assert_allclose(shades(clip), expected, atol=0 if suffix == ".png" else 3)


@settings(max_examples=50)
@given(total=st.integers(1, 40), own=st.floats(0.5, 120), fps=st.floats(0.5, 120), frames=st.integers(1, 50))
def test_resampled_clips_last_as_long(total, own, fps, frames):
    clip = Clip(np.arange(total, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3), own)
    other = resample(clip, fps)
    assert (
        abs(len(other.frames) / fps - total / own) <= 1 / fps + 1e-6 and (np.diff(other.frames[:, 0, 0, 0]) >= 0).all()
    )
    assert other.frames[0, 0, 0, 0] == 0
    assert len(resample(clip, fps, frames).frames) == min(frames, len(other.frames))
    spread = resample(clip, None, frames)
    assert len(spread.frames) == frames and spread.fps == pytest.approx(own * frames / total)
    np.testing.assert_array_equal(resample(clip, own).frames, clip.frames)


def test_videos_of_odd_sizes_and_without_sound_come_back(tmp_path):
    frames = grey_frames(height=33, width=47)
    save_clip(frames, tmp_path / "x.mp4", 24000 / 1001)
    clip = load_clip(tmp_path / "x.mp4")
    assert is_animated(tmp_path / "x.mp4") and clip.frames.shape == frames.shape
    assert clip.fps == pytest.approx(24000 / 1001) and os.listdir(tmp_path) == ["x.mp4"]


@pytest.mark.parametrize("name, data", [
    ("empty.mp4", b""),
    ("noise.webm", b"noise" * 100),
    ("playlist.mp4", b"#EXTM3U\n#EXTINF:10,\nfile:///etc/hostname\n"),
])  # fmt: skip
def test_damaged_videos(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(Emu3Error, match=f"cannot read .*{name}: .*damaged or not a video"):
        load_clip(tmp_path / name)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Ten seconds by ending; "first.mp4" has its header first, where most players write it last."""
    noise = np.random.default_rng(0).integers(0, 256, (80, 8, 8, 3), np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    found = {}
    kinds = {"last.mp4": "mp4", "first.mp4": "mp4", "x.webm": "webm", "x.mkv": "matroska", "x.avi": "avi"}
    for name, form in kinds.items():
        file = tmp_path_factory.getbasetemp() / name
        options = {"movflags": "faststart"} if name == "first.mp4" else {}
        with av.open(str(file), "w", format=form, options=options) as container:
            stream = container.add_stream({"webm": "libvpx", "avi": "mpeg4"}.get(form, "libx264"), rate=8)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            for frame in noise:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        found[name] = file.read_bytes()
    return found


@pytest.mark.parametrize("name", ["last.mp4", "first.mp4", "x.webm", "x.mkv", "x.avi"])
def test_videos_that_are_cut_off(tmp_path, videos, name):
    """Where a decoder would just give fewer frames too."""
    (tmp_path / name).write_bytes(videos[name])
    assert len(load_clip(tmp_path / name).frames) == sum(1 for _ in open_clip(tmp_path / name)) == 80
    for share in (0.1, 0.5, 0.9):
        (tmp_path / name).write_bytes(videos[name][: int(share * len(videos[name]))])
        with pytest.raises(Emu3Error, match=rf"{name}.*(damaged|cut off)"):
            load_clip(tmp_path / name)
        with pytest.raises(Emu3Error, match=rf"{name}.*(damaged|cut off)"):
            list(open_clip(tmp_path / name))
    # Who asks for its beginning alone does not learn of the end.
    if name == "x.webm":
        assert len(load_clip(tmp_path / name, fps=8.0, frames=5).frames) == 5


def test_a_video_that_changes_its_size(tmp_path):
    with av.open(str(tmp_path / "x.webm"), "w", format="webm") as container:
        stream = container.add_stream("libvpx", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        smaller = av.CodecContext.create("libvpx", "w")
        smaller.width, smaller.height, smaller.pix_fmt, smaller.time_base = 32, 48, "yuv420p", Fraction(1, 8)
        for first, encoder, shape in ((0, stream, (64, 64, 3)), (4, smaller, (48, 32, 3))):
            for number in range(first, first + 4):
                frame = av.VideoFrame.from_ndarray(np.full(shape, 30 * number, np.uint8), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 8)
                for packet in encoder.encode(frame):
                    packet.stream = stream
                    container.mux(packet)
            for packet in encoder.encode():
                packet.stream = stream
                container.mux(packet)
    with pytest.raises(
        Emu3Error, match=r"x\.webm changes from 64x64 to 32x48 pixels: all frames must have the same size"
    ):
        load_clip(tmp_path / "x.webm")


def test_missing_videos(tmp_path):
    with pytest.raises(Emu3Error, match=r"none\.mp4: there is no such file"):
        load_clip(tmp_path / "none.mp4")


def test_videos_need_pyav(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(Emu3Error, match=r"x\.mp4: video files need PyAV: pip install 'emu3-jax\[video\]'"):
        load_clip(tmp_path / "x.mp4")
    with pytest.raises(Emu3Error, match="need PyAV"):
        save_clip(grey_frames(), tmp_path / "x.webm", 8.0)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("options, message", [
    ({"fps": 0}, "fps is 0"),
    ({"fps": "8"}, "fps is '8': it must be a finite number > 0"),
    ({"frames": 0}, "frames is 0"),
])  # fmt: skip
def test_rates_and_numbers_that_are_none(tmp_path, options, message):
    with pytest.raises(Emu3Error, match=message):
        load_clip(tmp_path, **options)


@pytest.mark.parametrize("options, message", [
    ({"fps": 1e9}, "fps is 1e.09: it must be 0.001 to 1000 frames per second"),
    ({"frames": 10**9}, "frames is 1000000000: it must be at most 1,000,000"),
    ({"fps": 4.94e-5}, "fps is 4.94e-05: it must be 0.001 to 1000"),
    ({"fps": float("inf")}, "fps is inf"),
])  # fmt: skip
def test_rates_and_numbers_beyond_all_bounds(tmp_path, options, message):
    path = save_frames(tmp_path / "x.gif", grey_frames(), duration=40)
    for read in (load_clip, open_clip):
        with pytest.raises(Emu3Error, match=message):
            read(path, **options)


def test_a_frame_that_is_held_long_is_resampled_or_refused(tmp_path):
    """Two frames of 110 bytes are 65,536 at the rate of the shorter one."""
    path = CORPUS / "held_655_seconds.gif"
    for read in (load_clip, open_clip):
        with pytest.raises(Emu3Error, match=r"655_seconds\.gif shows a frame 65,535 times as long as its shortest"):
            read(path)
    assert load_clip(path, frames=4).frames[:, 0, 0, 0].tolist() == [0, 255, 255, 255]
    assert [frame[0, 0, 0] for frame in open_clip(path, fps=0.1)] == [0] + [255] * 65
    with pytest.raises(Emu3Error, match="the clip would have 60,000,030 frames; the limit is 1,000,000"):
        open_clip(save_frames(tmp_path / "x.png", grey_frames(), duration=[10, 60_000_000, 10, 10]), fps=1000)


def test_absurd_numbers_of_frames_are_refused_by_the_header(tmp_path):
    data = bytearray(save_frames(tmp_path / "x.png", grey_frames(), duration=40).read_bytes())
    place = data.index(b"acTL") + 4
    data[place : place + 4] = (2**31 - 1).to_bytes(4, "big")
    data[place + 8 : place + 12] = zlib.crc32(data[place - 4 : place + 8]).to_bytes(4, "big")
    (tmp_path / "x.png").write_bytes(data)
    for read in (load_clip, open_clip):
        with pytest.raises(Emu3Error, match=r"x\.png: it has 2,147,483,647 frames of 24x16 pixels; the limits are"):
            read(tmp_path / "x.png")


def test_sides_that_a_format_cannot_hold(tmp_path):
    with pytest.raises(Emu3Error, match=r"x\.webp: a side has 16,384 pixels; the limit of \.webp is 16,383"):
        save_clip(np.zeros((2, 1, 16384, 3), np.uint8), tmp_path / "x.webp", 8.0)
    assert os.listdir(tmp_path) == []

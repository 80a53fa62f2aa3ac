"""Videos as players show them: time stamps, orientation, shape of pixels, transparency, covers, and missing ends."""

import os
import pathlib
import random
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from emu3_jax.errors import Emu3Error
from emu3_jax.media import videos
from emu3_jax.media.clips import load_clip
from emu3_jax.media.containers import check_whole
from emu3_jax.media.frames import open_clip
from emu3_jax.media.images import load_image
from emu3_jax.media.videos import read_video

CORPUS = pathlib.Path(__file__).parent / "corpus"
FORMATS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm", ".avi": "avi"}


def write(path, frames, codec, *, pix_fmt, times=None, base=None, rate=12, matrix=None, aspect=None, options=None):
    """A video of uint8 frames [H, W, 3 or 4]; `times` in seconds, rounded to units of 1 / `base`."""
    form = FORMATS[path.suffix]
    settings = {"video_track_timescale": str(base)} if base and form in ("mp4", "mov") else {}
    with av.open(str(path), "w", format=form, options=settings) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if base:
            stream.codec_context.time_base = stream.time_base = Fraction(1, base)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if matrix is not None:
            stream.set_display_matrix(matrix)
        for number, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgba" if array.shape[-1] == 4 else "rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[number] * base), Fraction(1, base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def greys(count=48):
    return [np.full((32, 32, 3), 20 + 4 * number, np.uint8) for number in range(count)]


def numbers(frames) -> list[int]:
    """Which of `greys` these are."""
    return [round((int(frame[16, 16, 0]) - 20) / 4) for frame in frames]


def corners(frame) -> str:
    """Top left, top right, bottom left, bottom right, by the first letters of colours."""
    names = {"r": (220, 40, 30), "g": (40, 200, 60), "b": (30, 60, 200), "w": (240, 240, 240)}
    spots = (frame[2, 2], frame[2, -3], frame[-3, 2], frame[-3, -3])
    return "".join(min(names, key=lambda name: abs(np.int32(names[name]) - spot).sum()) for spot in spots)


# ------------------------------------------------------------------------------------------------ time stamps


@pytest.mark.parametrize("name", ["rounded_12fps.mkv", "rounded_24fps.webm", "timebase_1000_24fps.mp4"])
def test_rounded_time_stamps_lose_no_frame(name):
    clip = load_clip(CORPUS / name)
    assert numbers(clip.frames) == list(range(48)) and clip.fps == (12.0 if "12fps" in name else 24.0)
    assert numbers(open_clip(CORPUS / name)) == list(range(48))


RATES = [Fraction(12), Fraction(15), Fraction(24), Fraction(30000, 1001), Fraction(30), Fraction(60)]


@pytest.mark.parametrize("rate", RATES, ids=str)
@pytest.mark.parametrize(
    "suffix, codec, pix_fmt, base, jitter",
    [
        (".mkv", "ffv1", "yuv444p", 1000, 0),
        (".webm", "libvpx-vp9", "yuv420p", 1000, 0),
        (".mp4", "libx264", "yuv420p", 1000, 0),
        (".mov", "png", "rgb24", 600, 0),
        (".mp4", "libx264", "yuv420p", 90000, 1),
        (".mkv", "ffv1", "yuv444p", 1000, 1),
    ],
    ids=["mkv", "webm", "mp4", "quicktime", "phone", "phone-mkv"],
)
def test_every_frame_stands_once(tmp_path, suffix, codec, pix_fmt, base, jitter, rate):
    """At the file's own rate, and where that is asked for; at twice the rate, each stands twice."""
    draw = random.Random(str((suffix, rate)))
    times = [number / rate + (number > 0) * Fraction(draw.randint(-jitter, jitter), 1000) for number in range(48)]
    path = write(tmp_path / f"x{suffix}", greys(), codec, pix_fmt=pix_fmt, times=times, base=base, rate=rate)
    assert numbers(load_clip(path).frames) == list(range(48))
    assert numbers(load_clip(path, fps=float(rate)).frames) == list(range(48))
    assert numbers(load_clip(path, frames=24).frames) == list(range(0, 48, 2))
    if not jitter:
        assert numbers(load_clip(path, fps=2 * float(rate)).frames)[:94] == [number // 2 for number in range(94)]
        assert numbers(load_clip(path, fps=float(rate) / 2).frames) == list(range(0, 48, 2))


def test_a_frame_that_comes_late_is_waited_for(tmp_path):
    """The rate is that of most frames; the frame before the gap is shown until the next one comes."""
    times = [Fraction(number, 24) for number in (0, 1, 2, 3, 8, 9, 10, 11)]
    path = write(tmp_path / "x.mkv", greys(8), "ffv1", pix_fmt="yuv444p", times=times, base=1000, rate=24)
    assert numbers(load_clip(path).frames) == [0, 1, 2, 3, 3, 3, 3, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_frames_that_a_camera_dropped(tmp_path, suffix):
    """At the average rate others would be lost. A few pauses do not change the rate, many do."""
    missing = {20, 21, 22, 30, 40}
    kept = [number for number in range(48) if number not in missing]
    frames, base = greys(), {".mp4": 15360, ".mov": 600, ".mkv": 1000}[suffix]
    times = [number / 30 for number in kept]
    file = tmp_path / f"x{suffix}"
    write(
        file,
        [frames[k] for k in kept],
        "ffv1" if suffix == ".mkv" else "png",
        pix_fmt="rgb24" if suffix != ".mkv" else "bgr0",
        times=times,
        base=base,
        rate=30,
    )
    clip = load_clip(file)
    last = -1
    assert numbers(clip.frames) == [last := number if number in kept else last for number in range(48)]
    assert clip.fps == 30


def test_a_damaged_time_stamp_makes_no_endless_clip(tmp_path):
    times = [Fraction(number, 24) for number in (0, 1, 2, 10**6)]
    path = write(tmp_path / "x.mkv", greys(4), "ffv1", pix_fmt="yuv444p", times=times, base=1000, rate=24)
    with pytest.raises(Emu3Error, match=r"x\.mkv shows one frame 999,997 times as long as others: it is damaged"):
        load_clip(path)
    with pytest.raises(Emu3Error, match=r"x\.mkv has more than 1,000,000 frames at this rate"):
        for _ in read_video(path, 100.0):
            pass


# ------------------------------------------------------------------------------------------------ what a frame shows

QUARTERS = np.zeros((48, 64, 3), np.uint8)
QUARTERS[:24, :32], QUARTERS[:24, 32:], QUARTERS[24:, :32], QUARTERS[24:] = (220, 40, 30), (40, 200, 60), (240,) * 3, 0
QUARTERS[24:, :32], QUARTERS[24:, 32:] = (240, 240, 240), (30, 60, 200)


def matrix(a, b, c, d):
    one = 1 << 16
    return [a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30]


@pytest.mark.parametrize(
    "entries, shape, expected",
    [
        ((1, 0, 0, 1), (48, 64), "rgwb"),
        ((-1, 0, 0, 1), (48, 64), "grbw"),  # mirrored
        ((1, 0, 0, -1), (48, 64), "wbrg"),  # upside down, not turned
        ((-1, 0, 0, -1), (48, 64), "bwgr"),
        ((0, 1, -1, 0), (64, 48), "wrbg"),  # a quarter to the right
        ((0, -1, 1, 0), (64, 48), "gbrw"),  # a quarter to the left
        ((0, 1, 1, 0), (64, 48), "rwgb"),  # a quarter, mirrored
        ((0, -1, -1, 0), (64, 48), "bgwr"),
    ],
)
def test_display_matrices(tmp_path, entries, shape, expected):
    path = write(tmp_path / "x.mp4", [QUARTERS] * 2, "libx264", pix_fmt="yuv420p", matrix=matrix(*entries))
    frames = load_clip(path).frames
    assert frames.shape == (2, *shape, 3) and corners(frames[0]) == expected


def test_a_front_camera(tmp_path):
    assert corners(load_clip(CORPUS / "hflip.mp4").frames[0]) == "grbw"


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("aspect, shape", [(Fraction(4, 3), (48, 85)), (Fraction(1, 2), (96, 64)), (1, (48, 64))])
def test_pixels_become_square(tmp_path, suffix, aspect, shape):
    path = write(tmp_path / f"x{suffix}", [QUARTERS] * 2, "libx264", pix_fmt="yuv420p", aspect=Fraction(aspect))
    frames = load_clip(path).frames
    assert frames.shape == (2, *shape, 3) and corners(frames[0]) == "rgwb"


def test_pixels_become_square_before_a_quarter_turn(tmp_path):
    turned = matrix(0, 1, -1, 0)
    path = write(tmp_path / "x.mp4", [QUARTERS], "libx264", pix_fmt="yuv420p", aspect=Fraction(2, 1), matrix=turned)
    assert load_clip(path).frames.shape == (1, 128, 48, 3)


def test_absurd_pixels_are_refused(tmp_path):
    path = write(tmp_path / "x.mp4", [QUARTERS], "libx264", pix_fmt="yuv420p", aspect=Fraction(30, 1))
    with pytest.raises(Emu3Error, match=r"x\.mp4 has pixels 30 times as wide as high"):
        load_clip(path)


@pytest.mark.parametrize(
    "name, codec, pix_fmt, options",
    [
        ("qtrle.mov", "qtrle", "argb", {}),
        ("png.mov", "png", "rgba", {}),
        ("prores.mov", "prores_ks", "yuva444p10le", {}),
        ("ffv1.mkv", "ffv1", "bgra", {}),
        ("ffv1-planes.mkv", "ffv1", "yuva420p", {}),
        ("vp9.webm", "libvpx-vp9", "yuva420p", {}),
        ("vp8.webm", "libvpx", "yuva420p", {"auto-alt-ref": "0"}),
    ],
)
def test_transparent_videos_are_white(tmp_path, name, codec, pix_fmt, options):
    frame = np.zeros((32, 32, 4), np.uint8)
    frame[:, :16], frame[:, 16:] = (220, 40, 30, 255), (0, 200, 0, 0)
    path = write(tmp_path / name, [frame] * 3, codec, pix_fmt=pix_fmt, options=options)
    frames = load_clip(path).frames
    assert len(frames) == 3
    np.testing.assert_allclose(frames[:, 4:-4, 4:12].astype(int), (220, 40, 30) * np.ones((3, 24, 8, 1), int), atol=12)
    assert (frames[:, 4:-4, 20:-4] >= 253).all()


def test_transparent_videos_and_animations_are_alike():
    video, animation = load_clip(CORPUS / "alpha_qtrle.mov").frames, load_clip(CORPUS / "alpha.webp").frames
    np.testing.assert_array_equal(video[0], animation[0])
    assert (video[:, :, 32:] == 255).all() and video.shape == (8, 48, 64, 3)


def test_half_transparent_pixels_are_mixed_as_those_of_animations_are(tmp_path):
    frame = np.full((32, 32, 4), 100, np.uint8)
    frame[..., 3] = np.arange(32) * 8
    path = write(tmp_path / "x.mov", [frame], "png", pix_fmt="rgba")
    Image.fromarray(frame).save(tmp_path / "x.png")
    expected = load_clip(tmp_path / "x.png").frames
    np.testing.assert_array_equal(load_clip(path).frames, expected)
    assert (np.asarray(load_image(tmp_path / "x.png")) == 100).all()  # a still drops alpha, as the reference does


# ------------------------------------------------------------------------------------------------ covers


def test_a_cover_is_not_the_clip():
    frames = load_clip(CORPUS / "cover_first.mp4").frames
    assert len(frames) == 8 and corners(frames[0]) == "rgwb"


def test_sound_with_a_cover_is_no_clip(tmp_path):
    with av.open(str(tmp_path / "x.mp4"), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=44100, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(greys(1)[0], format="rgb24")))
        container.mux(cover.encode())
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.int16), format="s16", layout="mono")
        frame.sample_rate = 44100
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    with pytest.raises(Emu3Error, match=r"x\.mp4 holds a cover and no moving pictures"):
        load_clip(tmp_path / "x.mp4")


# ------------------------------------------------------------------------------------------------ missing ends


def _with_sound(path, codec, sound_codec, options):
    """Two seconds of noise, half a second of which is sound at a time."""
    rate = 48000
    draw = np.random.default_rng(0)
    with av.open(str(path), "w", format=FORMATS[path.suffix], options=options) as container:
        stream, sound = (
            container.add_stream(codec, rate=12),
            container.add_stream(sound_codec, rate=rate, layout="mono"),
        )
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(24):
            array = draw.integers(0, 256, (32, 32, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
            samples = draw.integers(-3000, 3000, (1, rate // 12)).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.sample_rate, frame.pts = rate, number * rate // 12
            container.mux(sound.encode(frame))
        container.mux(stream.encode())
        container.mux(sound.encode())


@pytest.mark.parametrize(
    "name, codec, sound, options",
    [
        ("first.mp4", "libx264", "aac", {"movflags": "faststart"}),
        ("last.mp4", "libx264", "aac", {}),
        ("pieces.mp4", "libx264", "aac", {"movflags": "frag_keyframe+empty_moov"}),
        ("x.mov", "libx264", "aac", {"movflags": "faststart"}),
        ("x.mkv", "libx264", "aac", {}),
        ("x.webm", "libvpx-vp9", "libopus", {}),
        ("live.mkv", "libx264", "aac", {"live": "1"}),
        ("live.webm", "libvpx-vp9", "libopus", {"live": "1", "cluster_time_limit": "300"}),
        ("x.avi", "mpeg4", "mp3", {}),
    ],
)
def test_videos_with_sound_that_are_cut_off(tmp_path, name, codec, sound, options):
    """Wherever they are cut: within the sound, within the pictures, within an index at the end.

    A recording that ends between two blocks of Matroska or two fragments of MP4 is a whole one (docs/input.md), and
    where those are depends on the encoder's threads: a cut that falls there is moved by one byte.
    """
    _with_sound(tmp_path / name, codec, sound, options)
    whole = (tmp_path / name).read_bytes()
    assert len(load_clip(tmp_path / name).frames) >= 24
    path = tmp_path / f"cut{name[name.index('.') :]}"
    for place in range(60):
        cut = len(whole) * place // 60
        between = whole.startswith((b"\xa3", b"\x1f\x43\xb6\x75"), cut) or whole.startswith((b"moof", b"mfra"), cut + 4)
        path.write_bytes(whole[: cut + between])
        with pytest.raises(Emu3Error, match=r"cut\.\w+.*(damaged|cut off|no video|empty)"):
            open_clip(path)  # before its first frame


def test_what_comes_after_the_end_is_no_cut(tmp_path):
    """As phones and editors write it; and sizes that were not known when they were written."""
    write(tmp_path / "x.mp4", greys(4), "libx264", pix_fmt="yuv420p")
    data = (tmp_path / "x.mp4").read_bytes()
    for rest in (b"\n", b"\0" * 100, b"\xff\xff\xff\xffSEFH" + b"x" * 50):
        (tmp_path / "y.mp4").write_bytes(data + rest)
        assert numbers(load_clip(tmp_path / "y.mp4").frames) == [0, 1, 2, 3]
    write(tmp_path / "x.mkv", greys(4), "ffv1", pix_fmt="yuv444p")
    data = (tmp_path / "x.mkv").read_bytes()
    segment = data.index(bytes.fromhex("18538067")) + 4
    (tmp_path / "y.mkv").write_bytes(data[:segment] + b"\x01" + b"\xff" * 7 + data[segment + 8 :])
    check_whole(tmp_path / "y.mkv")
    assert numbers(load_clip(tmp_path / "y.mkv").frames) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "data", [b"", b"RIFF", b"\x1a\x45\xdf\xa3", b"\0\0\0\x08ftyp" * 3, b"\0" * 50, b"RIFF\0\0\0\0AVI "]
)
def test_files_that_tell_no_length(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    check_whole(tmp_path / "x")


# ------------------------------------------------------------------------------------------------ bounds and names


def test_frames_too_large(tmp_path, monkeypatch):
    path = write(tmp_path / "x.mp4", [QUARTERS], "libx264", pix_fmt="yuv420p")
    monkeypatch.setattr(videos, "MAX_FRAME_PIXELS", 64 * 48 - 1)
    with pytest.raises(Emu3Error, match=r"x\.mp4 has frames of 64x48 pixels; the limit is 8K"):
        load_clip(path)


@pytest.mark.parametrize("name", ["a:b.mp4", "concat:x.mp4", "caf\udce9.mp4", "https:x.mp4"])
def test_names_that_ffmpeg_could_mistake(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.mp4", greys(2), "libx264", pix_fmt="yuv420p")
    os.replace("x.mp4", name)
    assert numbers(load_clip(name).frames) == [0, 1]


def test_pipes_and_devices_are_no_videos(tmp_path):
    os.mkfifo(tmp_path / "x.mp4")
    os.symlink("/dev/zero", tmp_path / "zero.mkv")
    for name in ("x.mp4", "zero.mkv"):
        with pytest.raises(Emu3Error, match=f"cannot read .*{name}: it is a pipe or device"):
            load_clip(tmp_path / name)

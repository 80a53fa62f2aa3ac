"""Clips frame by frame: the frames of the loaded clip, in the memory of a few frames."""

import subprocess
import sys

import numpy as np
import pytest
from grey_clips import grey_frames, save_frames
from PIL import Image

from emu3_jax.errors import Emu3Error
from emu3_jax.media import clips
from emu3_jax.media.clips import Clip, load_clip, resample, save_clip
from emu3_jax.media.frames import is_animated, open_clip

# Prints the peaks of memory, in bytes, of reading a clip frame by frame, in three ways, and of loading it.
PEAKS = """
import sys, tracemalloc
from emu3_jax.media.clips import load_clip
from emu3_jax.media.frames import open_clip

path = sys.argv[1]
options = {}, {"fps": 16.0}, {"frames": 40}
reads = [lambda given=given: all(frame.any() for frame in open_clip(path, **given)) for given in options]
for read in [*reads, lambda: load_clip(path)]:
    read()  # what is imported on first use
    tracemalloc.start()
    read()
    print(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
"""


@pytest.mark.parametrize("options", [{}, {"fps": 3.0}, {"fps": 20.0}, {"fps": 20.0, "frames": 5}, {"frames": 3},
                                     {"frames": 30}])  # fmt: skip
@pytest.mark.parametrize("kind", ["gif", "webp", "png", "mp4", "webm", "folder"])
def test_frames_one_by_one_are_those_of_the_loaded_clip(tmp_path, kind, options):
    frames = grey_frames(range(0, 250, 25), 32, 48)
    path = tmp_path / ("x" if kind == "folder" else f"x.{kind}")
    if kind == "folder":
        path.mkdir()
        for number, frame in enumerate(frames):
            Image.fromarray(frame).save(path / f"{number}.png")
    elif kind in ("mp4", "webm"):
        save_clip(frames, path, 8.0)
    else:
        save_frames(
            path,
            frames,
            duration=[40, 80, 40, 40, 120, 40, 40, 40, 40, 80],
            **{"lossless": True} if kind == "webp" else {},
        )
    reader = open_clip(path, **options)
    assert reader.count is None or reader.count == len(list(reader))
    clip = Clip(np.stack(list(reader)), reader.fps)  # read a second time
    loaded, plain = load_clip(path, **options), load_clip(path)
    np.testing.assert_array_equal(clip.frames, loaded.frames)
    assert clip.fps == loaded.fps
    if kind not in ("mp4", "webm") or "fps" not in options:  # a video's frames have instants of their own
        np.testing.assert_array_equal(clip.frames, resample(plain, **options).frames)


@pytest.mark.parametrize("kind", ["gif", "webp", "mp4", "folder"])
def test_reading_frame_by_frame_holds_a_few(tmp_path, kind):
    frames = np.random.default_rng(0).integers(0, 256, (48, 8, 8, 3), np.uint8).repeat(16, axis=1).repeat(16, axis=2)
    path = tmp_path / ("x" if kind == "folder" else f"x.{kind}")
    if kind == "folder":
        path.mkdir()
        for number, frame in enumerate(frames):
            Image.fromarray(frame).save(path / f"{number}.png")
    else:
        save_clip(frames, path, 8.0)

    # In a process of its own, because memory is counted over all threads, also those that other tests left.
    done = subprocess.run([sys.executable, "-c", PEAKS, path], capture_output=True, text=True, check=True)
    *frame_by_frame, loaded = (int(peak) / frames[0].nbytes for peak in done.stdout.split())
    assert len(frame_by_frame) == 3 and max(frame_by_frame) < 10 and loaded > 48


def test_clips_beyond_the_limit_are_read_frame_by_frame(tmp_path, monkeypatch):
    monkeypatch.setattr(clips, "MAX_CLIP_BYTES", 5 * 16 * 24 * 3)
    path = save_frames(tmp_path / "x.gif", grey_frames(range(0, 160, 20)), duration=40)
    assert sum(1 for _ in open_clip(path)) == 8
    assert load_clip(path, frames=4).frames[:, -1, -1, 0].tolist() == [0, 40, 80, 120]
    with pytest.raises(Emu3Error, match=r"the clip .*x\.gif has 6 frames of 24x16 pixels"):
        load_clip(path, frames=6)


def test_a_file_of_one_frame_is_a_picture_a_folder_or_video_a_clip(tmp_path):
    for suffix in ("gif", "webp", "png"):
        assert not is_animated(save_frames(tmp_path / f"x.{suffix}", grey_frames()[:1], duration=40))
    save_clip(grey_frames(height=32, width=48)[:1], tmp_path / "x.mp4", 8.0)
    (tmp_path / "x").mkdir()
    Image.fromarray(grey_frames()[0]).save(tmp_path / "x" / "0.png")
    for path in (tmp_path / "x.mp4", tmp_path / "x"):
        assert is_animated(path) and len(load_clip(path).frames) == 1 == len(list(open_clip(path)))


def test_a_folder_of_different_sizes_is_found_while_it_is_read(tmp_path):
    for number in range(3):
        Image.new("RGB", (24, 16 + number // 2)).save(tmp_path / f"{number}.png")
    reader = iter(open_clip(tmp_path))
    assert next(reader).shape == next(reader).shape == (16, 24, 3)
    with pytest.raises(Emu3Error, match=r"2\.png is 24x17 pixels, but the clip's first frame is 24x16"):
        next(reader)

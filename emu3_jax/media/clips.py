"""Reads and writes clips as arrays: animated GIF, WebP and PNG files, folders of frames, and videos."""

import dataclasses
import math
from pathlib import Path

import numpy as np
from PIL import Image

from emu3_jax.errors import Emu3Error
from emu3_jax.files import new_file
from emu3_jax.foreign import reading
from emu3_jax.media.frames import (
    DEFAULT_FPS,
    check_fps,
    check_repeats,
    check_resampling,
    flatten,
    frame_repeats,
    open_clip,
    shown_frames,
    timed_frames,
)
from emu3_jax.media.videos import CODECS, is_video, require_av, write_video

MAX_CLIP_BYTES = 4 * 2**30  # frames of a GIF of a few kilobytes can need more memory than the machine has

# Shortest duration of a frame. GIF counts in hundredths of a second, and players slow down frames shorter than two.
_SHORTEST_MS = {".gif": 20, ".webp": 1, ".png": 1}

_LONGEST_SIDE = {".webp": 16_383, ".mp4": 16_384}  # pixels


@dataclasses.dataclass(frozen=True)
class Clip:
    """Frames at a constant rate.

    Attributes:
        frames: uint8 `[T, H, W, 3]`, at least one frame.
        fps: frames per second. The default, 24, is for arrays and folders of frames, which have no rate of their own.
    """

    frames: np.ndarray
    fps: float = DEFAULT_FPS

    def __post_init__(self) -> None:
        shape, dtype = self.frames.shape, self.frames.dtype
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
            raise Emu3Error(f"a clip's frames are {dtype} {list(shape)}: they must be uint8 [T, H, W, 3]")
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise Emu3Error(f"a clip's fps is {self.fps}: it must be a finite number > 0")


def load_clip(path: Path, *, fps: float | None = None, frames: int | None = None) -> Clip:
    """Reads a video, an animated file, or a folder of pictures into memory. `frames.open_clip` reads frame by frame.

    Rates without `fps`:

    - An animated file gets the rate of its shortest frame. A frame that is shown k times as long is repeated k times,
      because encoders merge equal frames. Transparent parts become white.
    - A folder's pictures are sorted in natural order (`frame2` before `frame10`) and get 24 frames per second.
    - A video of varying rate gets its average rate. A video that lacks only a few frames gets the rate of the others.

    Args:
        path: the file or folder.
        fps: frames per second to which the clip is resampled; see `resample`.
        frames: with `fps`, the clip ends after so many frames. Without `fps`, so many frames are spread over the whole
            clip. Only these frames count towards `MAX_CLIP_BYTES`.

    Raises:
        Emu3Error: a file is missing, damaged or too large, a folder holds no pictures, frames differ in size, or PyAV
            is missing for a video.
    """
    check_resampling(fps, frames)
    path = Path(path)
    if fps is None and frames is None and not (path.is_dir() or is_video(path)):
        return _load_animation(path)
    reader, kept = open_clip(path, fps=fps, frames=frames), []
    for frame in reader:
        kept.append(frame)
        _check_memory(f"the clip {path}", reader.count or len(kept), (frame.shape[1], frame.shape[0]))
    return Clip(np.stack(kept), reader.fps)


def resample(clip: Clip, fps: float | None = None, frames: int | None = None) -> Clip:
    """Changes the rate or the number of frames of a clip. Each new frame is the one that the clip shows at that time.

    Args:
        clip: the clip.
        fps: the new rate, in frames per second. The duration stays the same.
        frames: with `fps`, the largest number of frames; the rest of the clip is cut off. Without `fps`, the number of
            frames to spread over the whole clip; the duration stays the same.

    Raises:
        Emu3Error: `fps` or `frames` is not legal.
    """
    check_resampling(fps, frames)
    if fps is None and frames is None:
        return clip
    shown, rate = shown_frames(len(clip.frames), clip.fps, fps, frames)
    return Clip(clip.frames[shown], rate)


def resize_frames(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes uint8 frames [T, H, W, 3] (bicubic)."""
    if frames.shape[1:3] == (height, width):
        return frames
    images = (Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC) for frame in frames)
    return np.stack([np.asarray(image) for image in images])


def save_clip(frames: np.ndarray, path: Path, fps: float) -> None:
    """Writes a clip to a file, all or nothing.

    Animated WebP and PNG are lossless, GIF has 256 colours, MP4 and WebM lose a little and need PyAV. The duration of a
    frame is rounded to milliseconds in WebP and PNG, and to hundredths of a second in GIF.

    Args:
        frames: uint8 `[T, H, W, 3]`.
        path: the file, ending in .webp, .png, .gif, .mp4 or .webm. An existing file is replaced.
        fps: frames per second.

    Raises:
        Emu3Error: the ending or the rate is not legal, a side is too long for the format, PyAV is missing, or the file
            cannot be written.
    """
    clip, path = Clip(frames, fps), Path(path)
    check_writable(path, fps)
    suffix = path.suffix.lower()
    side, most = max(frames.shape[1:3]), _LONGEST_SIDE.get(suffix, 65_535)
    if side > most:
        raise Emu3Error(
            f"cannot write {path}: a side has {side:,} pixels; the limit of {suffix} is {most:,}: choose another format"
        )
    if suffix not in _SHORTEST_MS:
        with new_file(path) as temporary:
            write_video(clip.frames, temporary, suffix, fps)
        return
    step = 10 if suffix == ".gif" else 1
    options = {"duration": step * round(1000 / fps / step), "loop": 0, "save_all": True}
    if suffix == ".webp":
        options |= {"lossless": True}
    first, *rest = (Image.fromarray(frame) for frame in clip.frames)
    with new_file(path) as temporary:
        first.save(temporary, format=suffix[1:].upper(), append_images=rest, **options)


def check_writable(path: Path, fps: float) -> None:
    """Checks the ending, the rate and PyAV as `save_clip` does. Call it before generating the clip.

    Raises:
        Emu3Error: `save_clip` would refuse `path` or `fps`.
    """
    suffix = Path(path).suffix.lower()
    shortest = _SHORTEST_MS.get(suffix)
    if shortest is not None and 0 < fps < math.inf and not 0.1 <= fps <= 1000 / shortest:
        raise Emu3Error(f"fps is {fps}: a {suffix} clip must have 0.1 to {1000 // shortest} frames per second")
    check_fps(fps)
    if suffix in CODECS:
        require_av(path)
    elif shortest is None:
        raise Emu3Error(f"cannot write a clip to {path}: the name must end in .webp, .png, .gif, .mp4 or .webm")


def _load_animation(path: Path) -> Clip:
    """Reads an animated file in one pass, because all frames stay in memory. `open_clip` needs two passes."""
    frames, durations = [], []
    for image, duration in timed_frames(path):
        _check_memory(f"{path}: the clip", getattr(image, "n_frames", 1), image.size)
        with reading(path, "give an undamaged clip"):
            frames.append(flatten(image))
        durations.append(duration)
    repeats, fps = frame_repeats(durations)
    check_repeats(path, repeats)
    _check_memory(f"{path}: the clip", sum(repeats), (frames[0].shape[1], frames[0].shape[0]))
    return Clip(np.repeat(np.stack(frames), repeats, axis=0), fps)


def _check_memory(clip: str, frames: int, size: tuple[int, int]) -> None:
    if frames * size[0] * size[1] * 3 > MAX_CLIP_BYTES:
        raise Emu3Error(
            f"{clip} has {frames} frames of {size[0]}x{size[1]} pixels, more than {MAX_CLIP_BYTES // 2**30} GiB: "
            "cut it or scale it down"
        )

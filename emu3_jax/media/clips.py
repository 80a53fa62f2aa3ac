"""Clips to arrays and back: animated GIF, WebP and PNG files, folders of frames, and videos."""

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

MAX_CLIP_BYTES = 4 * 2**30  # a few kilobytes of GIF can stand for more frames than memory holds

_SHORTEST_MS = {".gif": 20, ".webp": 1, ".png": 1}  # GIF counts hundredths of a second, and players slow down below two

_LONGEST_SIDE = {".webp": 16_383, ".mp4": 16_384}  # pixels


@dataclasses.dataclass(frozen=True)
class Clip:
    """Frames at a constant rate: uint8 `[T, H, W, 3]`, at least one; `fps` frames per second."""

    frames: np.ndarray
    fps: float = DEFAULT_FPS

    def __post_init__(self) -> None:
        shape, dtype = self.frames.shape, self.frames.dtype
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
            raise Emu3Error(f"a clip's frames are {dtype} {list(shape)}: they must be uint8 [T, H, W, 3]")
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise Emu3Error(f"a clip's fps is {self.fps}: it must be a finite number > 0")


def load_clip(path: Path, *, fps: float | None = None, frames: int | None = None) -> Clip:
    """Reads a video, an animated file, or a folder of pictures in natural order (`frame2` before `frame10`).

    An animated file plays at the rate of its shortest frame; a frame that is shown k times as long stands k times in
    the clip, since encoders merge equal frames. Transparent parts become white. A folder's frames are read like
    single pictures, at 24 frames per second. Videos of changing rate get their average one, those that lack a few
    frames the rate of the others. `frames.open_clip` reads the same frames one after the other.

    Args:
        path: of the file or folder.
        fps: the clip is resampled to this rate; see `resample`.
        frames: with `fps` the clip ends after so many; without, that many are taken from all of it. Only frames that
            are taken count against `MAX_CLIP_BYTES`.

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
    """The clip at another rate, or of another number of frames: frame i is what the clip shows at its instant.

    Args:
        clip: what to take frames from.
        fps: the new rate: one frame for each instant before the clip's end.
        frames: with `fps`, the clip ends after so many, if it has them; without, so many are spread over all of it, and
            the duration stays.

    Raises:
        Emu3Error: a rate or number that is not legal.
    """
    check_resampling(fps, frames)
    if fps is None and frames is None:
        return clip
    shown, rate = shown_frames(len(clip.frames), clip.fps, fps, frames)
    return Clip(clip.frames[shown], rate)


def resize_frames(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 frames [T, H, W, 3] at another size (bicubic)."""
    if frames.shape[1:3] == (height, width):
        return frames
    images = (Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC) for frame in frames)
    return np.stack([np.asarray(image) for image in images])


def save_clip(frames: np.ndarray, path: Path, fps: float) -> None:
    """Writes uint8 frames `[T, H, W, 3]` as a clip, whole or not at all.

    Animated WebP and PNG lose nothing, GIF has 256 colours, MP4 and WebM (which need PyAV) lose a little. Every frame
    is shown equally long: a whole number of milliseconds in WebP and PNG, of hundredths of a second in GIF.

    Raises:
        Emu3Error: the ending is none of these, the rate is out of range, PyAV is missing, or the file cannot be
            written.
    """
    clip, path = Clip(frames, fps), Path(path)
    check_writable(path, fps)
    suffix = path.suffix.lower()
    side, most = max(frames.shape[1:3]), _LONGEST_SIDE.get(suffix, 65_535)
    if side > most:
        raise Emu3Error(f"cannot write {path}: a side has {side:,} pixels, and {suffix} holds at most {most:,}")
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
    """What `save_clip` will refuse, before the work that comes first. Raises `Emu3Error` as it does."""
    suffix = Path(path).suffix.lower()
    shortest = _SHORTEST_MS.get(suffix)
    if shortest is not None and 0 < fps < math.inf and not 0.1 <= fps <= 1000 / shortest:
        raise Emu3Error(f"fps is {fps}: a {suffix} clip shows from 0.1 to {1000 // shortest} frames per second")
    check_fps(fps)
    if suffix in CODECS:
        require_av(path)
    elif shortest is None:
        raise Emu3Error(f"cannot write a clip to {path}: the name must end in .webp, .png, .gif, .mp4 or .webm")


def _load_animation(path: Path) -> Clip:
    """In one pass, where `open_clip` needs two: all frames stay in memory anyway."""
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
            f"{clip} is {frames} frames of {size[0]}x{size[1]} pixels, more than {MAX_CLIP_BYTES // 2**30} GiB: "
            "cut it or scale it down"
        )

"""Clips to arrays and back: animated GIF, WebP and PNG files, folders of frames, and videos."""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from emu3_jax.config import ImageConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.files import new_file
from emu3_jax.media.images import load_image, open_picture, preprocess, to_rgb
from emu3_jax.media.videos import CODECS, is_video, read_video, require_av, write_video

DEFAULT_FPS = 24.0  # where nothing tells the rate; Emu3 was trained on clips of 24 frames per second
MAX_CLIP_BYTES = 4 * 2**30  # a few kilobytes of GIF can stand for more frames than memory holds

# Other formats hold several pictures too, but as pages (TIFF) or previews (MPO, which phones write as .jpg).
_ANIMATED_FORMATS = ("GIF", "WEBP", "PNG", "AVIF")
_UNTIMED_MS = 100  # how long browsers show a frame that says 0
_SHORTEST_MS = {".gif": 20, ".webp": 1, ".png": 1}  # GIF counts hundredths of a second, and players slow down below two


@dataclasses.dataclass(frozen=True)
class Clip:
    """Frames at a constant rate: uint8 `[T, H, W, 3]`, at least one; `fps` frames per second."""

    frames: np.ndarray
    fps: float = DEFAULT_FPS

    def __post_init__(self):
        shape, dtype = self.frames.shape, self.frames.dtype
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
            raise Emu3Error(f"a clip's frames are {dtype} {list(shape)}: they must be uint8 [T, H, W, 3]")
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise Emu3Error(f"a clip's fps is {self.fps}: it must be a finite number > 0")


def is_animated(path: Path) -> bool:
    """Whether `path` is a clip: a folder, a video, or a GIF, WebP, PNG or AVIF file of more than one frame.

    Raises:
        Emu3Error: the file is missing or no picture.
    """
    if Path(path).is_dir() or is_video(path):
        return True
    with open_picture(path) as image:
        return image.format in _ANIMATED_FORMATS and len(_frame_numbers(image)) > 1


def load_clip(path: Path, *, fps: float | None = None, frames: int | None = None) -> Clip:
    """Reads a video, an animated file, or a folder of pictures in natural order (`frame2` before `frame10`).

    An animated file plays at the rate of its shortest frame; a frame that is shown k times as long stands k times in
    the clip, since encoders merge equal frames. Transparent parts become white. A folder's frames are read like
    single pictures, at 24 frames per second. Videos of changing rate get their average one.

    Args:
        path: of the file or folder.
        fps: the clip is resampled to this rate; see `resample`.
        frames: with `fps` the clip ends after so many; without, that many are taken from all of it. With both, no more
            of a long video is held in memory.

    Raises:
        Emu3Error: a file is missing, damaged or too large, a folder holds no pictures, frames differ in size, or PyAV
            is missing for a video.
    """
    _check_resampling(fps, frames)
    path = Path(path)
    if path.is_dir():
        return resample(_load_folder(path), fps, frames)
    if is_video(path):
        return _load_video(path, fps, frames)
    return resample(_load_animation(path), fps, frames)


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
    _check_resampling(fps, frames)
    total = len(clip.frames)
    if fps is None and frames is None:
        return clip
    if fps is None:
        count, fps = frames, clip.fps * frames / total
    else:
        count = max(1, math.ceil(total / clip.fps * fps - 1e-3))
        count = count if frames is None else min(count, frames)
    # A little more than the instant itself: what falls on a frame's beginning is that frame, however it is rounded.
    shown = np.minimum((np.arange(count) * (clip.fps / fps) + 1e-6).astype(int), total - 1)
    return Clip(clip.frames[shown], fps)


def resize_frames(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 frames [T, H, W, 3] at another size (bicubic)."""
    if frames.shape[1:3] == (height, width):
        return frames
    images = (Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC) for frame in frames)
    return np.stack([np.asarray(image) for image in images])


def preprocess_clip(clip: Clip, config: ImageConfig, factor: int) -> np.ndarray:
    """Pixels for the vision tokenizer, float32 `[T, H, W, 3]`: each frame as `preprocess` does a picture.

    Raises:
        Emu3Error: the clip is smaller than `factor` or more elongated than 5:1.
    """
    return np.stack([preprocess(Image.fromarray(frame), config, factor) for frame in clip.frames])


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
    check_fps(fps)
    if suffix in CODECS:
        require_av(path)
        return
    if suffix not in _SHORTEST_MS:
        raise Emu3Error(f"cannot write a clip to {path}: the name must end in .webp, .png, .gif, .mp4 or .webm")
    shortest = _SHORTEST_MS[suffix]
    if not 0.1 <= fps <= 1000 / shortest:
        raise Emu3Error(f"fps is {fps}: a {suffix} clip shows from 0.1 to {1000 // shortest} frames per second")


def _load_video(path: Path, fps: float | None, frames: int | None) -> Clip:
    kept, rate = [], DEFAULT_FPS
    for frame, found in read_video(path, fps):
        kept.append(frame)
        rate = found
        _check_memory(f"the clip {path}", len(kept), (frame.shape[1], frame.shape[0]))
        if fps is not None and len(kept) == frames:
            break
    clip = Clip(np.stack(kept), rate)
    return clip if fps is not None else resample(clip, None, frames)


def check_fps(fps: float | None) -> None:
    """Raises `Emu3Error` unless this is a rate, or None."""
    if fps is not None and not (math.isfinite(fps) and fps > 0):
        raise Emu3Error(f"fps is {fps}: it must be a finite number > 0")


def _check_resampling(fps: float | None, frames: int | None) -> None:
    check_fps(fps)
    if frames is not None and not (isinstance(frames, int) and frames >= 1):
        raise Emu3Error(f"frames is {frames!r}: it must be a whole number >= 1")


def _load_animation(path: Path) -> Clip:
    with open_picture(path) as image:
        numbers = _frame_numbers(image)
        _check_memory("the clip", len(numbers), image.size)
        frames, durations = [], []
        for number in numbers:
            image.seek(number)
            image.load()  # WebP tells a frame's duration only after it
            durations.append(image.info.get("duration") or _UNTIMED_MS)
            frames.append(np.asarray(_flatten(image)))
        shortest = min(durations)
        repeats = [round(duration / shortest) for duration in durations]
        _check_memory("the clip", sum(repeats), image.size)
    return Clip(np.repeat(np.stack(frames), repeats, axis=0), 1000 * sum(repeats) / sum(durations))


def _load_folder(folder: Path) -> Clip:
    endings = Image.registered_extensions()
    try:
        names = [p.name for p in folder.iterdir() if p.suffix.lower() in endings and not p.name.startswith(".")]
    except OSError as error:
        raise Emu3Error(f"cannot read the folder {folder}: {error.strerror}; give a folder of pictures") from error
    if not names:
        raise Emu3Error(f"the folder {folder} holds no pictures: give one with a clip's frames (PNG, JPEG, ...)")
    frames = []
    for name in sorted(names, key=_natural_order):
        frame = np.asarray(load_image(folder / name))
        if frames and frame.shape != frames[0].shape:
            (height, width, _), (rows, columns, _) = frame.shape, frames[0].shape
            raise Emu3Error(
                f"{folder / name} is {width}x{height} pixels, but the clip's first frame is {columns}x{rows}: "
                "all frames need one size"
            )
        frames.append(frame)
        _check_memory(f"the clip {folder}", len(names), (frame.shape[1], frame.shape[0]))
    return Clip(np.stack(frames), DEFAULT_FPS)


def _frame_numbers(image: Image.Image) -> range:
    """Numbers of the frames that play; a PNG may begin with a still for viewers that know no animation."""
    return range(1 if getattr(image, "default_image", False) else 0, getattr(image, "n_frames", 1))


def _flatten(image: Image.Image) -> Image.Image:
    """The frame in RGB and upright, on white: what lies under transparent parts of an animation is arbitrary."""
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return to_rgb(image)


def _check_memory(clip: str, frames: int, size: tuple[int, int]) -> None:
    if frames * size[0] * size[1] * 3 > MAX_CLIP_BYTES:
        raise Emu3Error(
            f"{clip} is {frames} frames of {size[0]}x{size[1]} pixels, more than {MAX_CLIP_BYTES // 2**30} GiB: "
            "cut it or scale it down"
        )


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key in which runs of digits count as numbers."""
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]

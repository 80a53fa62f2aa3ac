"""Reads the frames of a clip one by one at a chosen rate, so that a long file or folder needs little memory."""

import dataclasses
import itertools
import math
import numbers
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import reading
from emu3_jax.media.containers import check_whole
from emu3_jax.media.images import load_image, on_white, open_picture, picture_formats, upright
from emu3_jax.media.videos import MAX_FRAMES, is_video, read_video, video_rate
from emu3_jax.printable import shown

DEFAULT_FPS = 24.0  # if the rate is unknown; Emu3 was trained on clips of 24 frames per second

# Other formats also hold several pictures, but as pages (TIFF) or previews (MPO, which phones write as .jpg).
_ANIMATED_FORMATS = ("GIF", "WEBP", "PNG", "AVIF")
_UNTIMED_MS = 100  # browsers show a frame of duration 0 for so long
_MIN_FPS, _MAX_FPS = 0.001, 1000.0
# Pixels of all frames of an animated file: about nine thousand frames of 1280x720. A frame of a few bytes takes as long
# to decode as any other.
_MOST_PIXELS = 1 << 33
# Longest duration of a frame, in units of the shortest one. Without a limit, a GIF of two frames could give 65,535.
_MOST_REPEATS = 1000


@dataclasses.dataclass(frozen=True)
class FrameReader:
    """A clip whose frames are read on demand. Each iteration reads the clip again.

    Attributes:
        fps: frames per second.
        count: number of frames; None if it is not known before reading.
        read: makes an iterator over the frames, uint8 [H, W, 3], all of the same size.
    """

    fps: float
    count: int | None
    read: Callable[[], Iterator[np.ndarray]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.read()


def is_animated(path: Path) -> bool:
    """Whether `path` is a clip: a folder, a video, or a GIF, WebP, PNG or AVIF file of more than one frame.

    Raises:
        Emu3Error: the file is missing, or not a picture.
    """
    if Path(path).is_dir() or is_video(path):
        return True
    with open_picture(path, "picture or clip") as image:
        return image.format in _ANIMATED_FORMATS and len(_frame_numbers(image)) > 1


def open_clip(path: Path, *, fps: float | None = None, frames: int | None = None) -> FrameReader:
    """Opens a clip of any length. The arguments and the frames are the same as in `clips.load_clip`.

    An animated file is decoded twice, because its rate depends on its shortest frame. A video is decoded twice if
    `frames` is given without `fps`.

    Raises:
        Emu3Error: as `load_clip`. Damage in a folder's pictures or in a video is found while its frames are read.
    """
    check_resampling(fps, frames)
    path = Path(path)
    if path.is_dir():
        names = _pictures_in(path)
        return _resampled(FrameReader(DEFAULT_FPS, len(names), lambda: _read_folder(path, names)), fps, frames)
    if not is_video(path):
        return _open_animation(path, fps, frames)
    if fps is not None:  # `read_video` resamples by the frames' time stamps
        # A caller that asks for the first frames gets them even from a truncated file.
        whole = frames is None
        return FrameReader(fps, None, lambda: itertools.islice(read_video(path, fps, whole=whole), frames))
    rate = video_rate(path)
    check_whole(path)
    if frames is None:
        return FrameReader(rate, None, lambda: read_video(path))
    count = sum(1 for _ in read_video(path))
    return _resampled(FrameReader(rate, count, lambda: read_video(path)), None, frames)


def shown_frames(total: int, own: float, fps: float | None, frames: int | None) -> tuple[np.ndarray, float]:
    """Selects the frames of a resampled clip; see `clips.resample`.

    Args:
        total: number of frames of the clip.
        own: its frames per second.
        fps: the new rate, or None.
        frames: the new number of frames, or None.

    Returns:
        The number of the original frame for each new frame, and the new rate.

    Raises:
        Emu3Error: there would be too many frames.
    """
    if fps is None and frames is None:
        return np.arange(total), own
    if fps is None:
        count, fps = frames, own * frames / total
    else:
        count = max(1, math.ceil(total / own * fps - 1e-3))
        count = count if frames is None else min(count, frames)
    if count > MAX_FRAMES:
        raise Emu3Error(
            f"fps is {fps:g}: the clip would have {count:,} frames; the limit is {MAX_FRAMES:,}: give a lower fps"
        )
    # Add a little time, so that an instant at the start of a frame selects that frame in spite of rounding.
    return np.minimum((np.arange(count) * (own / fps) + 1e-6).astype(int), total - 1), fps


def check_fps(fps: float | None) -> None:
    """Raises an `Emu3Error` unless `fps` is None or a legal number of frames per second."""
    if fps is not None and not (isinstance(fps, numbers.Real) and math.isfinite(fps) and fps > 0):
        raise Emu3Error(f"fps is {shown(fps)}: it must be a finite number > 0")
    if fps is not None and not _MIN_FPS <= fps <= _MAX_FPS:
        raise Emu3Error(f"fps is {fps:g}: it must be {_MIN_FPS:g} to {_MAX_FPS:g} frames per second")


def check_resampling(fps: float | None, frames: int | None) -> None:
    """Raises an `Emu3Error` unless `fps` and `frames` are legal arguments of `clips.resample`."""
    check_fps(fps)
    if frames is not None and not (isinstance(frames, int) and frames >= 1):
        raise Emu3Error(f"frames is {shown(frames)}: it must be a whole number >= 1")
    if frames is not None and frames > MAX_FRAMES:
        raise Emu3Error(f"frames is {shown(frames)}: it must be at most {MAX_FRAMES:,}")


def timed_frames(path: Path) -> Iterator[tuple[Image.Image, int]]:
    """Yields the frames of an animated file with their durations in milliseconds.

    All frames are one image object, which changes with each step. Use a frame before you ask for the next one.

    Raises:
        Emu3Error: the file is missing, damaged, or has too many frames or pixels.
    """
    with open_picture(path, "clip") as image:
        numbers = _frame_numbers(image)
        if len(numbers) > MAX_FRAMES or len(numbers) * image.width * image.height > _MOST_PIXELS:
            raise Emu3Error(
                f"it has {len(numbers):,} frames of {image.width}x{image.height} pixels; the limits are {MAX_FRAMES:,} "
                f"frames and {_MOST_PIXELS:,} pixels in all: cut it or scale it down"
            )
        for number in numbers:
            image.seek(number)
            image.load()  # WebP sets a frame's duration here
            duration = image.info.get("duration") or 0
            yield image, duration if duration > 0 else _UNTIMED_MS


def frame_repeats(durations: list[int]) -> tuple[list[int], float]:
    """Converts durations to repeats at a constant rate, because encoders merge equal frames.

    Each frame is repeated once per duration of the shortest frame, rounded. Rounding may change the sum, so the rate is
    the number of frames divided by the true duration. `check_repeats` limits the repeats.

    Args:
        durations: of the frames, in milliseconds.

    Returns:
        The number of times that each frame is shown, and the rate in frames per second.
    """
    shortest = min(durations)
    repeats = [round(duration / shortest) for duration in durations]
    return repeats, 1000 * sum(repeats) / sum(durations)


def check_repeats(path: Path, repeats: list[int]) -> None:
    """Raises an `Emu3Error` if long durations would turn a small file into a very long clip."""
    if max(repeats) > _MOST_REPEATS or sum(repeats) > MAX_FRAMES:
        raise Emu3Error(
            f"{path} shows a frame {max(repeats):,} times as long as its shortest one; the limit is {_MOST_REPEATS:,}: "
            "give a number of frames per second (fps) or of frames"
        )


def flatten(image: Image.Image) -> np.ndarray:
    """Converts a frame to uint8 RGB [H, W, 3] on a white background, rotated as its EXIF orientation says."""
    return np.asarray(on_white(upright(image)))


def _open_animation(path: Path, fps: float | None, frames: int | None) -> FrameReader:
    repeats, rate = frame_repeats([duration for _, duration in timed_frames(path)])
    total = sum(repeats)
    if fps is None and frames is None:
        check_repeats(path, repeats)
    else:
        numbers, rate = shown_frames(total, rate, fps, frames)
        # The selected numbers count repeated frames. Count how many of them belong to each original frame.
        ends = np.searchsorted(numbers, list(itertools.accumulate(repeats)))
        repeats, total = np.diff(ends, prepend=0).tolist(), len(numbers)

    def play() -> Iterator[np.ndarray]:
        left = total
        for (image, _), times in zip(timed_frames(path), repeats, strict=True):
            if times:
                with reading(path, "give an undamaged clip"):
                    frame = flatten(image)
                yield from itertools.repeat(frame, times)
            left -= times
            if not left:
                return  # stop reading after the last selected frame

    return FrameReader(rate, total, play)


def _resampled(reader: FrameReader, fps: float | None, frames: int | None) -> FrameReader:
    if fps is None and frames is None:
        return reader
    numbers, rate = shown_frames(reader.count, reader.fps, fps, frames)

    def pick() -> Iterator[np.ndarray]:
        at = 0
        for number, frame in enumerate(reader):
            while at < len(numbers) and numbers[at] == number:
                yield frame
                at += 1
            if at == len(numbers):
                return  # stop reading after the last selected frame

    return FrameReader(rate, len(numbers), pick)


def _pictures_in(folder: Path) -> list[str]:
    """Names of a folder's pictures, in natural order."""
    formats = picture_formats()
    endings = {ending for ending, name in Image.registered_extensions().items() if name in formats}
    try:
        names = [p.name for p in folder.iterdir() if p.suffix.lower() in endings and not p.name.startswith(".")]
    except OSError as error:
        raise Emu3Error(f"cannot read the folder {folder}: {error.strerror}; give a folder of pictures") from error
    if not names:
        raise Emu3Error(f"the folder {folder} holds no pictures: give a folder of a clip's frames (PNG, JPEG, ...)")
    return sorted(names, key=_natural_order)


def _read_folder(folder: Path, names: list[str]) -> Iterator[np.ndarray]:
    shape = None
    for name in names:
        frame = np.asarray(load_image(folder / name))
        shape = shape or frame.shape
        if frame.shape != shape:
            raise Emu3Error(
                f"{folder / name} is {frame.shape[1]}x{frame.shape[0]} pixels, but the clip's first frame is "
                f"{shape[1]}x{shape[0]}: all frames must have the same size"
            )
        yield frame


def _frame_numbers(image: Image.Image) -> range:
    """Numbers of the frames to play. A PNG may begin with a still picture for viewers without animation; skip it."""
    return range(1 if getattr(image, "default_image", False) else 0, getattr(image, "n_frames", 1))


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key that compares runs of digits as numbers."""
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]

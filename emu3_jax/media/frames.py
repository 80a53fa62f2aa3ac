"""A clip's frames one after the other, at a chosen rate: of a long file or folder, memory holds no more than one."""

import dataclasses
import itertools
import math
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

DEFAULT_FPS = 24.0  # where nothing tells the rate; Emu3 was trained on clips of 24 frames per second

# Other formats hold several pictures too, but as pages (TIFF) or previews (MPO, which phones write as .jpg).
_ANIMATED_FORMATS = ("GIF", "WEBP", "PNG", "AVIF")
_UNTIMED_MS = 100  # how long browsers show a frame that says 0
_MIN_FPS, _MAX_FPS = 0.001, 1000.0
# Of an animated file, all frames together: nine thousand of 1280x720. Each is computed whole, however few bytes it has.
_MOST_PIXELS = 1 << 33
# A frame may be shown so many times as long as the shortest one: a GIF of two frames can mean 65,535 of them.
_MOST_REPEATS = 1000


@dataclasses.dataclass(frozen=True)
class FrameReader:
    """A clip whose frames are read when they are asked for. Whoever iterates a second time reads the clip again.

    Attributes:
        fps: frames per second.
        count: how many frames there are; None where only reading tells.
        read: makes an iterator over the frames, uint8 [H, W, 3], all of one size.
    """

    fps: float
    count: int | None
    read: Callable[[], Iterator[np.ndarray]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.read()


def is_animated(path: Path) -> bool:
    """Whether `path` is a clip: a folder, a video, or a GIF, WebP, PNG or AVIF file of more than one frame.

    Raises:
        Emu3Error: the file is missing or no picture.
    """
    if Path(path).is_dir() or is_video(path):
        return True
    with open_picture(path, "picture or clip") as image:
        return image.format in _ANIMATED_FORMATS and len(_frame_numbers(image)) > 1


def open_clip(path: Path, *, fps: float | None = None, frames: int | None = None) -> FrameReader:
    """Opens what `load_clip` loads: the same frames, by the same arguments, of a clip of any length.

    An animated file is decoded twice, since its shortest frame tells the rate; so is a video of which a number of
    frames is spread over the whole.

    Raises:
        Emu3Error: as `load_clip`, but where a folder's pictures or a video are at fault, not before they are read.
    """
    check_resampling(fps, frames)
    path = Path(path)
    if path.is_dir():
        names = _pictures_in(path)
        return _resampled(FrameReader(DEFAULT_FPS, len(names), lambda: _read_folder(path, names)), fps, frames)
    if not is_video(path):
        return _open_animation(path, fps, frames)
    if fps is not None:  # frames of a video have instants of their own
        # Who asks for its beginning alone gets that, also where the end is missing.
        whole = frames is None
        return FrameReader(fps, None, lambda: itertools.islice(read_video(path, fps, whole=whole), frames))
    rate = video_rate(path)
    check_whole(path)
    if frames is None:
        return FrameReader(rate, None, lambda: read_video(path))
    count = sum(1 for _ in read_video(path))
    return _resampled(FrameReader(rate, count, lambda: read_video(path)), None, frames)


def shown_frames(total: int, own: float, fps: float | None, frames: int | None) -> tuple[np.ndarray, float]:
    """Which of a clip's `total` frames, `own` a second, a resampled one shows, and its rate; see `clips.resample`."""
    if fps is None and frames is None:
        return np.arange(total), own
    if fps is None:
        count, fps = frames, own * frames / total
    else:
        count = max(1, math.ceil(total / own * fps - 1e-3))
        count = count if frames is None else min(count, frames)
    if count > MAX_FRAMES:
        raise Emu3Error(
            f"fps is {fps:g}: that makes {count:,} frames of the clip, and at most {MAX_FRAMES:,} are legal"
        )
    # A little more than the instant itself: what falls on a frame's beginning is that frame, however it is rounded.
    return np.minimum((np.arange(count) * (own / fps) + 1e-6).astype(int), total - 1), fps


def check_fps(fps: float | None) -> None:
    """Raises `Emu3Error` unless this is a rate, or None."""
    if fps is not None and not (math.isfinite(fps) and fps > 0):
        raise Emu3Error(f"fps is {fps}: it must be a finite number > 0")
    if fps is not None and not _MIN_FPS <= fps <= _MAX_FPS:
        raise Emu3Error(f"fps is {fps:g}: from {_MIN_FPS:g} to {_MAX_FPS:g} frames per second are legal")


def check_resampling(fps: float | None, frames: int | None) -> None:
    """Raises `Emu3Error` unless these are a rate and a number of frames, or None."""
    check_fps(fps)
    if frames is not None and not (isinstance(frames, int) and frames >= 1):
        raise Emu3Error(f"frames is {shown(frames)}: it must be a whole number >= 1")
    if frames is not None and frames > MAX_FRAMES:
        raise Emu3Error(f"frames is {shown(frames)}: at most {MAX_FRAMES:,} are legal")


def timed_frames(path: Path) -> Iterator[tuple[Image.Image, int]]:
    """The frames of an animated file, and for how many milliseconds each is shown. An image is that of its turn only.

    Raises:
        Emu3Error: the file is missing or damaged.
    """
    with open_picture(path, "clip") as image:
        numbers = _frame_numbers(image)
        if len(numbers) > MAX_FRAMES or len(numbers) * image.width * image.height > _MOST_PIXELS:
            raise Emu3Error(
                f"it has {len(numbers):,} frames of {image.width}x{image.height} pixels, and at most {MAX_FRAMES:,} "
                f"frames and {_MOST_PIXELS:,} pixels in all are read: cut it or scale it down"
            )
        for number in numbers:
            image.seek(number)
            image.load()  # WebP tells a frame's duration only after it
            duration = image.info.get("duration") or 0
            yield image, duration if duration > 0 else _UNTIMED_MS


def frame_repeats(durations: list[int]) -> tuple[list[int], float]:
    """How often each frame stands in a clip at the rate of the shortest one, and that rate.

    Encoders merge equal frames. Rounding may change how long the clip lasts, so the rate is its frames over the true
    duration. `check_repeats` tells whether that many are read.
    """
    shortest = min(durations)
    repeats = [round(duration / shortest) for duration in durations]
    return repeats, 1000 * sum(repeats) / sum(durations)


def check_repeats(path: Path, repeats: list[int]) -> None:
    """Raises `Emu3Error` where a frame is shown so long that a few bytes would stand for a long clip."""
    if max(repeats) > _MOST_REPEATS or sum(repeats) > MAX_FRAMES:
        raise Emu3Error(
            f"{path} shows a frame {max(repeats):,} times as long as its shortest one, and at most {_MOST_REPEATS:,} "
            "times are read: give a number of frames per second (fps) or of frames"
        )


def flatten(image: Image.Image) -> np.ndarray:
    """The frame in RGB and upright, on white."""
    return np.asarray(on_white(upright(image)))


def _open_animation(path: Path, fps: float | None, frames: int | None) -> FrameReader:
    repeats, rate = frame_repeats([duration for _, duration in timed_frames(path)])
    total = sum(repeats)
    if fps is None and frames is None:
        check_repeats(path, repeats)
    else:
        numbers, rate = shown_frames(total, rate, fps, frames)
        # Frame i stands for the numbers up to ends[i]; how many of those are shown is how often it is.
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
                return  # what comes after is not read

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
                return  # what comes after is not read

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
        raise Emu3Error(f"the folder {folder} holds no pictures: give one with a clip's frames (PNG, JPEG, ...)")
    return sorted(names, key=_natural_order)


def _read_folder(folder: Path, names: list[str]) -> Iterator[np.ndarray]:
    shape = None
    for name in names:
        frame = np.asarray(load_image(folder / name))
        shape = shape or frame.shape
        if frame.shape != shape:
            raise Emu3Error(
                f"{folder / name} is {frame.shape[1]}x{frame.shape[0]} pixels, but the clip's first frame is "
                f"{shape[1]}x{shape[0]}: all frames need one size"
            )
        yield frame


def _frame_numbers(image: Image.Image) -> range:
    """Numbers of the frames that play; a PNG may begin with a still for viewers that know no animation."""
    return range(1 if getattr(image, "default_image", False) else 0, getattr(image, "n_frames", 1))


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key in which runs of digits count as numbers."""
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]

"""Reads and writes MP4, WebM and other video files with PyAV, an optional package."""

import contextlib
import dataclasses
import fractions
import itertools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import plain_file, reading
from emu3_jax.media.containers import check_whole
from emu3_jax.media.video_frames import picture_maker

SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")
# Formats and protocols that FFmpeg may use. Without these limits, a renamed playlist could make it open other files or
# network addresses.
_OPTIONS = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi", "protocol_whitelist": "file"}
CODECS = {
    ".mp4": ("libx264", {"crf": "16"}),
    ".webm": ("libvpx-vp9", {"crf": "20", "b": "0"}),
}  # encoder and options for each format that can be written
MAX_FRAMES = 1_000_000  # frames of a clip: more than eleven hours at 24 frames per second
MAX_FRAME_PIXELS = 8192 * 4352  # pixels of a video's frame: 8K
_MAX_RATE = 1000.0  # frames per second; files that state more have no constant rate
_SAME = 0.01  # rates that differ by less than this fraction count as equal
_FILLED = 1.25  # FFmpeg's guessed rate may exceed the average by this factor: up to a fifth of the frames is missing
_EARLY = 1.1  # a frame that comes earlier than this, in frame durations, is dropped
_WAVER = 0.0021  # seconds: two time stamps, each off by one millisecond
# A frame may be repeated so often, and once more for each earlier frame. More repeats mean a damaged time stamp.
_HELD = 1000
# Decoders that read transparency, which the default decoders ignore.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


@dataclasses.dataclass(frozen=True)
class _Video:
    """An open video.

    Attributes:
        path: the file.
        container: PyAV's container.
        stream: PyAV's stream of moving pictures.
        decode: converts a packet to frames.
        rate: frames per second at which the video is read; see `_rates`.
        nominal: frames per second of the recording, before its time stamps were rounded; see `_rates`.
        end: end of the video in seconds, as the file states it; None if it does not.
    """

    path: Path
    container: Any
    stream: Any
    decode: Callable[[Any], list[Any]]
    rate: float
    nominal: float
    end: float | None


def is_video(path: Path) -> bool:
    """Whether the file name has the ending of a video file."""
    return Path(path).suffix.lower() in SUFFIXES


def video_rate(path: Path) -> float:
    """Frames per second at which `read_video` reads the video by default. Raises as `read_video`."""
    with _opened(path) as video:
        return video.rate


def read_video(path: Path, fps: float | None = None, *, whole: bool = True) -> Iterator[np.ndarray]:
    """Yields the frames of a video at a constant rate.

    At the file's own rate every frame is yielded once, even if its time stamps are rounded. A frame is repeated if the
    next one is late by more than half a frame. At another rate, each frame is the one that the video shows at that
    time. Frames look as in players: rotated and mirrored as the file states, with square pixels and a white background.

    Args:
        path: the file.
        fps: frames per second. By default, the average rate of the file, or the camera's rate if only a few frames are
            missing.
        whole: when to refuse a truncated file: before the first frame, or (False) after the last one.

    Yields:
        uint8 [H, W, 3].

    Raises:
        Emu3Error: PyAV or the file is missing, the file is damaged, truncated, too long or too large, it holds no
            video, or the size of its frames changes.
    """
    with _opened(path) as video:
        if whole:
            check_whole(path)
        picture = picture_maker(path, video.stream, MAX_FRAME_PIXELS)
        if fps is None or abs(fps / video.nominal - 1) < _SAME:
            counted = _frame_by_frame(video, fps or video.rate)
        else:
            counted = _at_instants(video, fps)
        number, shape = 0, None
        for frame, times in counted:
            shown = picture(frame)
            if shape is not None and shown.shape != shape:
                raise Emu3Error(
                    f"{path} changes from {shape[1]}x{shape[0]} to {shown.shape[1]}x{shown.shape[0]} pixels: "
                    "all frames must have the same size"
                )
            shape = shown.shape
            number += times
            if number > MAX_FRAMES:
                raise Emu3Error(
                    f"{path} has more than {MAX_FRAMES:,} frames at this rate: cut it, or give a lower rate"
                )
            yield from itertools.repeat(shown, times)
        if not whole:
            check_whole(path)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Video]:
    """Opens a video. Turns any exception of the block into an `Emu3Error` that names the file."""
    av = require_av(path)
    with reading(path, "it is damaged or not a video"):
        plain_file(path)
        try:
            # Without "file:", FFmpeg reads a name with a colon as an address.
            with av.open(f"file:{path}", options=_OPTIONS, metadata_errors="replace") as container:
                yield _video(av, path, container)
        except av.error.FFmpegError as error:
            reason = getattr(error, "strerror", None) or error
            raise Emu3Error(f"cannot read {path}: {reason}; it is damaged or not a video") from error


def _video(av: Any, path: Path, container: Any) -> _Video:
    try:
        stream = _clip_stream(path, container, av.stream.Disposition.attached_pic)
        return _Video(
            path, container, stream, _decoder(av, path, stream), *_rates(path, stream), _end(container, stream)
        )
    except Emu3Error:
        check_whole(path)  # if the file is truncated, report that as the reason
        raise


def _clip_stream(path: Path, container: Any, cover: Any) -> Any:
    """The first stream of moving pictures. Cover pictures are stored as video streams too; skip them."""
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        what = "a cover and no moving pictures" if container.streams.video else "no video"
        raise Emu3Error(f"{path} holds {what}: give a file with a video")
    return streams[0]


def _rates(path: Path, stream: Any) -> tuple[float, float]:
    """Determines `_Video.rate` and `_Video.nominal`.

    Cameras and screen recorders sometimes drop frames but otherwise keep a constant rate. Use that rate and repeat the
    frame before each gap, as FFmpeg does. The average rate is a little lower, so it would lose other frames.
    """
    average, guessed = float(stream.average_rate or 0), float(stream.guessed_rate or 0)
    rate = average if average > 0 else guessed
    if not 0 < rate <= _MAX_RATE:
        raise Emu3Error(
            f"cannot read {path}: its rate is {rate:g} frames per second, so it is cut off or has no constant rate; "
            "give the whole file, or convert it to MP4 or WebM"
        )
    same = abs(guessed / rate - 1) < _SAME
    nominal = guessed if same or rate < guessed <= min(_FILLED * rate, _MAX_RATE) else rate
    # If the file states its number of frames, the average is exact. Else FFmpeg estimates it from rounded time stamps.
    return (rate if same and stream.frames else nominal), nominal


def _decoder(av: Any, path: Path, stream: Any) -> Callable[[Any], list[Any]]:
    """Makes the function that decodes a packet to frames. It checks a frame's size before it allocates memory."""
    usual = stream.codec_context
    if usual is None:
        raise Emu3Error(f"cannot read {path}: there is no decoder for its video; convert it to MP4 or WebM")
    context = usual
    if stream.metadata.get("alpha_mode") == "1" and usual.name in _ALPHA_DECODERS:
        context = av.CodecContext.create(_ALPHA_DECODERS[usual.name], "r")
        context.extradata = usual.extradata
    if usual.width * usual.height > MAX_FRAME_PIXELS:
        raise Emu3Error(f"{path} has frames of {usual.width}x{usual.height} pixels; the limit is 8K: scale it down")
    context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}  # later frames may be larger
    context.thread_type = "AUTO"
    return context.decode


def _end(container: Any, stream: Any) -> float | None:
    """Reads the end of the video in seconds, as the file states it. A truncated file ends earlier."""
    if stream.duration is not None:
        known = "mov" in container.format.name.split(",")
        return float((stream.start_time or 0) + stream.duration) * float(stream.time_base) if known else None
    tag = re.fullmatch(r"(\d{1,9}):(\d\d):(\d\d(?:\.\d{1,9})?)", stream.metadata.get("DURATION", ""))
    if tag:
        hours, minutes, seconds = map(float, tag.groups())
        return 3600 * hours + 60 * minutes + seconds
    alone = container.duration is not None and len(container.streams) == 1
    return container.duration / 1e6 if alone else None  # from microseconds to seconds


def _timed(video: _Video) -> Iterator[tuple[float, Any]]:
    """Yields (seconds since the first frame, frame) for each frame. Last, yields (seconds to the end, None)."""
    path, length = video.path, 1 / video.rate
    start, time = None, 0.0
    for packet in video.container.demux(video.stream):
        if packet.is_corrupt:  # for example, the file ends inside it; decoders with several threads may ignore that
            raise Emu3Error(f"{path} is damaged or cut off: a part of its video is incomplete; give the whole file")
        for frame in video.decode(packet):
            time = frame.time if frame.time is not None else time + length * (start is not None)
            length = max(1 / video.rate, float((frame.duration or 0) * frame.time_base) if frame.time_base else 0)
            start = time if start is None else start
            yield time - start, frame
    if start is None:
        raise Emu3Error(f"{path} holds no frames: it is empty or cut off")
    if video.end is not None and time + length < video.end - max(0.5, 0.02 * video.end):
        raise Emu3Error(
            f"{path} is cut off: it should last {video.end:.1f} seconds, but ends after {time + length:.1f}; "
            "give the whole file"
        )
    yield time + length - start, None


def _frame_by_frame(video: _Video, rate: float) -> Iterator[tuple[Any, int]]:
    """Yields frames and the number of times to show each, at the video's own rate or nearly so.

    Like FFmpeg at a constant rate, shows every frame once, with two exceptions. A frame is repeated if the next one is
    more than half a frame late. A frame that is more than a frame early is dropped. Time stamps are rounded or
    imprecise, so following them exactly would lose frames.
    """
    count, held = 0, None
    for seconds, frame in _timed(video):
        late = seconds * rate - count - 1
        if held is not None:
            if frame is not None and late < -_EARLY:
                continue
            repeats = max(0, round(late))
            if repeats > _HELD + count:
                raise Emu3Error(
                    f"{video.path} shows one frame {repeats:,} times as long as others: "
                    "it is damaged, or give a number of frames per second (fps)"
                )
            yield held, 1 + repeats
            count += 1 + repeats
        held = frame


def _at_instants(video: _Video, fps: float) -> Iterator[tuple[Any, int]]:
    """Yields frames and the number of times to show each, at `fps` frames per second. Skips frames that never show."""
    # The error of two rounded time stamps, at least one unit of the file's clock.
    waver = min(_WAVER + float(video.stream.time_base), 0.25 / video.nominal)
    count, held = 0, None
    for seconds, frame in _timed(video):
        if held is not None:
            nearest = round(seconds * video.nominal) / video.nominal
            begins = min(nearest, seconds) if abs(seconds - nearest) <= waver else seconds - waver
            # The tolerance of 1/1000 makes an instant at the start of a frame select that frame in spite of rounding.
            before = max(0 if frame is not None or count else 1, math.ceil(begins * fps - 1e-3))
            if before > count:
                yield held, before - count
                count = before
        held = frame


def write_video(frames: np.ndarray, path: Path, suffix: str, fps: float) -> None:
    """Encodes frames as H.264 (.mp4) or VP9 (.webm) with little loss.

    Args:
        frames: uint8 [T, H, W, 3].
        path: the file.
        suffix: ".mp4" or ".webm".
        fps: frames per second.

    Raises:
        Emu3Error: PyAV is missing, or the encoder refuses the size of the frames.
        OSError: the file cannot be written.
    """
    av = require_av(path)
    _, height, width, _ = frames.shape
    try:
        _encode(av, frames, path, suffix, fps)
    except av.error.FFmpegError as error:
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror) from error
        raise Emu3Error(
            f"cannot write {width}x{height} pixels as {suffix}: {error.strerror}; choose another format"
        ) from error


def _encode(av: Any, frames: np.ndarray, path: Path, suffix: str, fps: float) -> None:
    codec, options = CODECS[suffix]
    _, height, width, _ = frames.shape
    with av.open(f"file:{path}", "w", format=suffix[1:]) as container:
        stream = container.add_stream(codec, rate=fractions.Fraction(fps).limit_denominator(1001), options=options)
        stream.width, stream.height = width, height
        # Prefer yuv420p, which players support best. It halves the resolution of chroma, so it needs even sides.
        stream.pix_fmt = "yuv444p" if width % 2 or height % 2 else "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def require_av(path: Path) -> Any:
    """Imports and returns PyAV. Raises an `Emu3Error` if it is not installed."""
    try:
        import av
    except ImportError as error:
        raise Emu3Error(f"{path}: video files need PyAV: pip install 'emu3-jax[video]'") from error
    return av

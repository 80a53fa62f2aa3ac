"""MP4, WebM and other video files, by PyAV, which is optional."""

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
# Of what a file may be and open: a playlist under another name would make FFmpeg read other files, or addresses.
_OPTIONS = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi", "protocol_whitelist": "file"}
CODECS = {
    ".mp4": ("libx264", {"crf": "16"}),
    ".webm": ("libvpx-vp9", {"crf": "20", "b": "0"}),
}  # of what can be written
MAX_FRAMES = 1_000_000  # of a clip; more than eleven hours at 24 frames a second
MAX_FRAME_PIXELS = 8192 * 4352  # of a video: 8K
_MAX_RATE = 1000.0  # frames per second; what says more has no constant rate
_SAME = 0.01  # two rates that differ by less than this share may be meant to be one
_FILLED = 1.25  # a rate that FFmpeg guessed, to the average one: up to a fifth of the frames may be missing
_EARLY = 1.1  # of a frame; what comes earlier than that is left out
_WAVER = 0.0021  # seconds; two time stamps that are each off by a millisecond
# A frame may be repeated so often, and once more for each before it. More is a damaged time stamp.
_HELD = 1000
# Decoders that read transparency, where the usual one leaves it out.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


@dataclasses.dataclass(frozen=True)
class _Video:
    """An open video.

    Attributes:
        path: of the file.
        container: PyAV's.
        stream: the one of moving pictures.
        decode: makes frames of its packets.
        rate: frames per second: on average, or of a camera that dropped a few.
        nominal: the rate that time stamps were rounded from; `rate` where they change too much to tell.
        end: when the video ends by what the file says, in seconds; None where it says nothing.
    """

    path: Path
    container: Any
    stream: Any
    decode: Callable[[Any], list[Any]]
    rate: float
    nominal: float
    end: float | None


def is_video(path: Path) -> bool:
    """Whether the name is that of a video file."""
    return Path(path).suffix.lower() in SUFFIXES


def video_rate(path: Path) -> float:
    """The rate at which `read_video` yields a video's frames, per second. Raises as it does."""
    with _opened(path) as video:
        return video.rate


def read_video(path: Path, fps: float | None = None, *, whole: bool = True) -> Iterator[np.ndarray]:
    """Yields uint8 frames [H, W, 3] at a constant rate: `fps`, or the file's own: on average, or where few
    are missing between the others, theirs.

    At its own rate every frame stands once, however its time stamps are rounded. Where they leave room for half a frame
    or more, a frame is repeated. With `fps`, a frame is what the video shows at its instant. Frames are as players show
    them: turned and mirrored as the file says, with square pixels, and white where they are transparent.

    Args:
        path: of the file.
        fps: frames per second.
        whole: a file that was cut off is refused before the first frame, else at its end.

    Raises:
        Emu3Error: PyAV or the file is missing, or the file is damaged or cut off, holds no video, or its frames change
            size.
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
                    "all frames need one size"
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
    """Whatever fails within the block is an `Emu3Error` that names the file."""
    av = require_av(path)
    with reading(path, "it is damaged or no video"):
        plain_file(path)
        try:
            # Without the name of the protocol, FFmpeg takes a name with a colon for an address.
            with av.open(f"file:{path}", options=_OPTIONS, metadata_errors="replace") as container:
                yield _video(av, path, container)
        except av.error.FFmpegError as error:
            reason = getattr(error, "strerror", None) or error
            raise Emu3Error(f"cannot read {path}: {reason}; it is damaged or no video") from error


def _video(av: Any, path: Path, container: Any) -> _Video:
    try:
        stream = _clip_stream(path, container, av.stream.Disposition.attached_pic)
        return _Video(
            path, container, stream, _decoder(av, path, stream), *_rates(path, stream), _end(container, stream)
        )
    except Emu3Error:
        check_whole(path)  # if its end is missing, that is the reason
        raise


def _clip_stream(path: Path, container: Any, cover: Any) -> Any:
    """The first stream of moving pictures. Covers are video streams of one picture too."""
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        what = "a cover and no moving pictures" if container.streams.video else "no video"
        raise Emu3Error(f"{path} holds {what}: give a file with a video")
    return streams[0]


def _rates(path: Path, stream: Any) -> tuple[float, float]:
    """`_Video.rate` and `_Video.nominal`.

    A camera or a screen recorder that drops some frames keeps to its rate else. At the average rate, which is a little
    lower, other frames would be lost; at the camera's, the ones before the gaps are repeated, as FFmpeg does.
    """
    average, guessed = float(stream.average_rate or 0), float(stream.guessed_rate or 0)
    rate = average if average > 0 else guessed
    if not 0 < rate <= _MAX_RATE:
        raise Emu3Error(f"cannot read {path}: its rate is {rate:g} frames per second; convert it to MP4 or WebM")
    same = abs(guessed / rate - 1) < _SAME
    nominal = guessed if same or rate < guessed <= min(_FILLED * rate, _MAX_RATE) else rate
    # Where the file counts its frames, the average is exact; else FFmpeg took it from rounded time stamps of a few.
    return (rate if same and stream.frames else nominal), nominal


def _decoder(av: Any, path: Path, stream: Any) -> Callable[[Any], list[Any]]:
    """What makes frames of a packet. The size of a frame is checked before there is memory for it."""
    usual = stream.codec_context
    if usual is None:
        raise Emu3Error(f"cannot read {path}: there is no decoder for its video; convert it to MP4 or WebM")
    context = usual
    if stream.metadata.get("alpha_mode") == "1" and usual.name in _ALPHA_DECODERS:
        context = av.CodecContext.create(_ALPHA_DECODERS[usual.name], "r")
        context.extradata = usual.extradata
    if usual.width * usual.height > MAX_FRAME_PIXELS:
        raise Emu3Error(f"{path} has frames of {usual.width}x{usual.height} pixels: at most 8K is read; scale it down")
    context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}  # frames may become larger later
    context.thread_type = "AUTO"
    return context.decode


def _end(container: Any, stream: Any) -> float | None:
    """The second at which a file says that its video ends; cut off, it may just end earlier."""
    if stream.duration is not None:
        known = "mov" in container.format.name.split(",")
        return float((stream.start_time or 0) + stream.duration) * float(stream.time_base) if known else None
    tag = re.fullmatch(r"(\d{1,9}):(\d\d):(\d\d(?:\.\d{1,9})?)", stream.metadata.get("DURATION", ""))
    if tag:
        hours, minutes, seconds = map(float, tag.groups())
        return 3600 * hours + 60 * minutes + seconds
    alone = container.duration is not None and len(container.streams) == 1
    return container.duration / 1e6 if alone else None  # which is in microseconds


def _timed(video: _Video) -> Iterator[tuple[float, Any]]:
    """Frames, and the seconds from the first to each; at last the seconds to the video's end, and None."""
    path, length = video.path, 1 / video.rate
    start, time = None, 0.0
    for packet in video.container.demux(video.stream):
        if packet.is_corrupt:  # as where the file ends within it; decoders with several threads may pass that over
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
            f"{path} is cut off: it says that it lasts {video.end:.1f} seconds, and ends after {time + length:.1f}; "
            "give the whole file"
        )
    yield time + length - start, None


def _frame_by_frame(video: _Video, rate: float) -> Iterator[tuple[Any, int]]:
    """Frames, and how often each is shown, at the video's own rate or nearly so.

    As FFmpeg does for a constant rate, every frame stands once, unless it comes more than half a frame late or a whole
    one early. Time stamps are rounded to milliseconds, or waver: what they say to the letter would lose frames.
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
    """Frames, and at how many instants, `fps` a second, each is shown. What is not shown at any is left out."""
    # So much may two time stamps be apart from what they were rounded from, to the file's own unit of time at least.
    waver = min(_WAVER + float(video.stream.time_base), 0.25 / video.nominal)
    count, held = 0, None
    for seconds, frame in _timed(video):
        if held is not None:
            nearest = round(seconds * video.nominal) / video.nominal
            begins = min(nearest, seconds) if abs(seconds - nearest) <= waver else seconds - waver
            # A thousandth of a frame more: what falls on a frame's beginning is that frame, however it is rounded.
            before = max(0 if frame is not None or count else 1, math.ceil(begins * fps - 1e-3))
            if before > count:
                yield held, before - count
                count = before
        held = frame


def write_video(frames: np.ndarray, path: Path, suffix: str, fps: float) -> None:
    """Writes uint8 frames [T, H, W, 3] as H.264 (.mp4) or VP9 (.webm), nearly without loss.

    Raises:
        Emu3Error: PyAV is missing, or the encoder refuses such frames.
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
        # Chroma at half the resolution wants even sides; players know that form best.
        stream.pix_fmt = "yuv444p" if width % 2 or height % 2 else "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def require_av(path: Path) -> Any:
    """PyAV. Raises `Emu3Error` where it is missing."""
    try:
        import av
    except ImportError as error:
        raise Emu3Error(f"{path}: video files need PyAV: pip install 'emu3-jax[video]'") from error
    return av

"""MP4, WebM and other video files, by PyAV, which is optional."""

import contextlib
import fractions
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from emu3_jax.errors import Emu3Error

SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")
# Of what a file may be and open: a playlist under another name would make FFmpeg read other files, or addresses.
_OPTIONS = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi", "protocol_whitelist": "file"}
CODECS = {
    ".mp4": ("libx264", {"crf": "16"}),
    ".webm": ("libvpx-vp9", {"crf": "20", "b": "0"}),
}  # of what can be written


def is_video(path: Path) -> bool:
    """Whether the name is that of a video file."""
    return Path(path).suffix.lower() in SUFFIXES


def video_rate(path: Path) -> float:
    """The frames per second that a video has on average. Raises as `read_video`."""
    with _opened(path) as (_, _, rate):
        return rate


def read_video(path: Path, fps: float | None = None) -> Iterator[np.ndarray]:
    """Yields uint8 frames [H, W, 3] at a constant rate: `fps`, or the file's own on average.

    A frame is what the video shows at its instant; frames in between are dropped, and missing ones shown again.

    Raises:
        Emu3Error: PyAV or the file is missing, or the file is damaged, holds no video, or its frames change size.
    """
    with _opened(path) as (container, stream, own):
        frames = _decoded(path, container, stream)
        yield from _at_a_rate(path, frames, fps or own, 1 / own, _promised_end(container, stream))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any, float]]:
    """The container, its video stream and that one's average rate; what fails within the block is an `Emu3Error`."""
    av = require_av(path)
    if not Path(path).is_file():
        raise Emu3Error(f"cannot read {path}: there is no such file")
    try:
        with av.open(str(path), options=_OPTIONS, metadata_errors="replace") as container:
            if not container.streams.video:
                raise Emu3Error(f"{path} holds no video: give a file that does")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            if not rate > 0:
                raise Emu3Error(f"cannot read {path}: it does not tell its rate; convert it to MP4 or WebM")
            yield container, stream, rate
    except av.error.FFmpegError as error:
        reason = getattr(error, "strerror", None) or error
        raise Emu3Error(f"cannot read {path}: {reason}; it is damaged or no video") from error


def _decoded(path: Path, container: Any, stream: Any) -> Iterator[Any]:
    for packet in container.demux(stream):
        if packet.is_corrupt:  # as where the file ends within it; decoders with several threads may pass that over
            raise Emu3Error(f"{path} is damaged or cut off: a part of its video is incomplete; give the whole file")
        yield from packet.decode()


def _promised_end(container: Any, stream: Any) -> float | None:
    """The second at which a Matroska or WebM file says that its video ends; cut off, these just end earlier."""
    if stream.duration is not None:
        return None
    tag = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if tag:
        hours, minutes, seconds = map(float, tag.groups())
        return 3600 * hours + 60 * minutes + seconds
    alone = container.duration is not None and len(container.streams) == 1
    return container.duration / 1e6 if alone else None  # which is in microseconds


def _at_a_rate(
    path: Path, frames: Iterator[Any], rate: float, last: float, promised: float | None
) -> Iterator[np.ndarray]:
    """`last`: seconds for which the last frame is shown; `promised`: when the video should end, if that is known."""
    shown, start, time, count, shape = None, None, 0.0, 0, None

    def due(until: float) -> bool:
        # A thousandth of a frame more: what falls on a frame's beginning is that frame, however it is rounded.
        return (count + 1e-3) / rate < until - start

    for frame in frames:
        time = frame.time if frame.time is not None else time + last * (shown is not None)
        start = time if start is None else start
        while shown is not None and due(time):
            yield shown
            count += 1
        picture = frame.to_ndarray(format="rgb24")
        turns = round(getattr(frame, "rotation", 0) / 90) % 4  # degrees, counterclockwise, as phones note them
        shown = np.rot90(picture, turns) if turns else picture
        if shape is not None and shown.shape != shape:
            raise Emu3Error(
                f"{path} changes from {shape[1]}x{shape[0]} to {shown.shape[1]}x{shown.shape[0]} pixels: "
                "all frames need one size"
            )
        shape = shown.shape
    if shown is None:
        raise Emu3Error(f"{path} holds no frames: it is empty or cut off")
    if promised is not None and time + last < promised - max(0.5, 0.02 * promised):
        raise Emu3Error(
            f"{path} is cut off: it says that it lasts {promised:.1f} seconds, and ends after {time + last:.1f}; "
            "give the whole file"
        )
    while count == 0 or due(time + last):
        yield shown
        count += 1


def write_video(frames: np.ndarray, path: Path, suffix: str, fps: float) -> None:
    """Writes uint8 frames [T, H, W, 3] as H.264 (.mp4) or VP9 (.webm), nearly without loss."""
    av = require_av(path)
    codec, options = CODECS[suffix]
    _, height, width, _ = frames.shape
    with av.open(str(path), "w", format=suffix[1:]) as container:
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

"""Rasterising drawings that nobody has vetted, in a process of its own, with limits of time and memory."""

import io
import multiprocessing
import multiprocessing.connection
import pathlib
import re

from PIL import Image

LARGEST = 400_000  # bytes of a drawing; 99% of Open Clipart have less than 280,000
WIDTH = 256  # pixels; drawings are scaled down from it
SECONDS = 20.0  # for one drawing; the slowest of Open Clipart takes less than 3
_MEMORY = 2 << 30  # bytes that the process may use beyond what it starts with
_DPI = 96.0  # without it, drawings whose size is in millimetres or points have no size
# A picture within a drawing could name a file of this machine, and scripts have no place in a drawing.
_REFUSED = re.compile(rb"<(?:\w+:)?(image|script)\b", re.IGNORECASE)


class Rasteriser:
    """Draws SVG. As a context manager it ends its process on leaving.

    A drawing that takes too long or too much memory costs the process, and the next drawing gets a new one.
    """

    def __init__(self, seconds: float = SECONDS):
        self._seconds = seconds
        self._process: multiprocessing.Process | None = None
        self._pipe: multiprocessing.connection.Connection | None = None

    def __enter__(self) -> "Rasteriser":
        return self

    def __exit__(self, *_) -> None:
        self._end()

    def draw(self, svg: bytes) -> Image.Image | str:
        """The drawing as RGBA, `WIDTH` pixels wide, or as text, why there is none."""
        if len(svg) > LARGEST:
            return "larger than the limit"
        found = _REFUSED.search(svg)
        if found:
            return f"contains the element {found[1].decode().lower()}"
        try:
            text = svg.decode("utf-8-sig")
        except UnicodeDecodeError:
            return "not UTF-8"
        if self._process is None:
            self._start()
        try:
            self._pipe.send(text)
            if not self._pipe.poll(self._seconds):
                self._end()
                return f"takes more than {self._seconds:g} s"
            done, answer = self._pipe.recv()
        except (EOFError, OSError):
            self._end()
            return "the renderer ended"
        if not done:
            return f"broken drawing: {answer}"
        with Image.open(io.BytesIO(answer)) as picture:
            return picture.convert("RGBA")

    def _start(self) -> None:
        # A forked process would have the locks and threads of this one.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = self._pipe = None


def _work(pipe: multiprocessing.connection.Connection) -> None:
    """Answers drawings with whether they could be rasterised, and the PNG or the reason, until the pipe is closed."""
    import resvg_py

    _limit_memory()
    while True:
        try:
            text = pipe.recv()
        except EOFError:
            return
        try:
            # Fonts of the machine would make the pictures depend on it.
            png = resvg_py.svg_to_bytes(svg_string=text, width=WIDTH, dpi=_DPI, skip_system_fonts=True)
            pipe.send((True, bytes(png)))
        except (ValueError, MemoryError) as error:
            pipe.send((False, str(error).splitlines()[0] if str(error) else "no memory"))


def _limit_memory() -> None:
    """Limits this process where the system can; elsewhere only the time is limited."""
    import resource

    try:
        used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
    except (OSError, ValueError):
        pass

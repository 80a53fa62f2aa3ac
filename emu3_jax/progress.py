"""Progress of long tasks on standard error: a bar on a terminal, lines in a log, or nothing."""

import contextlib
import io
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

from tqdm import tqdm

EVERY = 30.0  # seconds between two lines in a log

# tqdm's format with our estimate of the time left. tqdm's own estimate counts compilation time as if it recurred.
_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_T = TypeVar("_T")

_default: bool | None = None  # stands for `show=None`; `by_default` sets it
_now = time.monotonic


class Progress:
    """Shows the progress of one task. Use it as a context manager.

    On a terminal it shows a bar. Elsewhere it writes one line with the date every 30 seconds, without buffering. A
    task that takes less time writes no line. In runs of several processes only the first one shows anything.

    Attributes:
        done: units finished so far, including `initial`.
    """

    def __init__(
        self,
        show: bool | None,
        total: int | None,
        unit: str,
        *,
        name: str,
        initial: int = 0,
        every: float | None = EVERY,
        delay: float = 0.0,
    ):
        """
        Args:
            show: False shows nothing. True shows a bar on a terminal and lines elsewhere. None shows a bar on a
                terminal and nothing elsewhere, unless `by_default` sets something else.
            total: number of units in the whole task, or None if unknown.
            unit: name of the unit, such as "steps". "bytes" are shown as kB, MB, GB or TB.
            name: name of the task, for example "convert".
            initial: units finished before this run.
            every: seconds between two lines. With None, only `line` and `say` write lines.
            delay: seconds before the bar appears.
        """
        self.done = initial
        self._total, self._unit, self._name, self._every = total, unit, name, every
        self._began = self._said = _now()
        self._first: tuple[float, int] | None = None  # time and count after the first update
        self._lines_written = False
        self._updating = threading.Lock()  # writers of arrays call `update` from several threads
        self._show = shows(show)
        self._bar: tqdm | None = None
        if self._show and on_terminal():
            scaled = unit == "bytes"
            self._bar = tqdm(
                total=total,
                initial=initial,
                desc=name,
                unit="B" if scaled else f" {unit}",
                unit_scale=scaled,
                bar_format=_FORMAT,
                leave=False,
                delay=delay,
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.close()
        if self._lines_written and kind is None and self._every is not None:
            self.line(f"{self._name}: done in {duration(_now() - self._began)}")

    def close(self) -> None:
        """Removes the bar. `line` and `say` still work."""
        if self._bar is not None:
            self._bar.close()

    @property
    def shown(self) -> bool:
        """Whether anything is shown. If not, the caller can skip computing a note."""
        return self._show

    def update(self, units: int = 1, note: str = "") -> None:
        """Adds finished units. The bar shows `note` after the time left."""
        with self._updating:
            self.done += units
            now = _now()
            if self._first is None:
                self._first = now, self.done
            if self._bar is not None:
                self._bar.set_postfix_str(_listed(self.time_left(), note), refresh=False)
                self._bar.update(units)
            elif self._every is not None and now - self._said >= self._every and self.done != self._total:
                self._said, self._lines_written = now, True
                self.line(f"{self._name}: {_listed(self._amount(), self._pace(), self.time_left())}")

    def time_left(self) -> str:
        """Estimates the time left, for example "time left 1 h 20 min". Empty if unknown, or if nothing is left.

        The estimate excludes the first update, because its time includes compilation.
        """
        speed, left = self._speed(), 0 if self._total is None else self._total - self.done
        return f"time left {duration(left / speed)}" if speed and left > 0 else ""

    def line(self, text: str) -> None:
        """Writes a line to a log. Writes nothing on a terminal, which shows the bar."""
        if self._show and self._bar is None:
            _write(text)

    def say(self, text: str) -> None:
        """Writes a line to a log, or above the bar on a terminal."""
        if self._bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bar.write(text, file=sys.stderr)
        else:
            self.line(text)

    # -------------------------------------------------------------------------------------------- figures

    def _speed(self) -> float:
        """Units per second since the first update; 0 before the second update."""
        if self._first is None:
            return 0.0
        seconds, units = _now() - self._first[0], self.done - self._first[1]
        return units / seconds if units > 0 and seconds > 0 else 0.0

    def _amount(self) -> str:
        if self._total is None:
            return f"{self.done:,} {self._unit}"
        left = self._total - self.done
        if self._unit == "bytes":
            return f"{size(self.done)} of {size(self._total)}, {size(left)} left"
        return f"{self.done:,} of {self._total:,} {self._unit}, {left:,} left"

    def _pace(self) -> str:
        speed = self._speed()
        if not speed:
            return ""
        if self._unit == "bytes":
            return f"{size(speed)}/s"
        return f"{speed:,.0f} {self._unit}/s" if speed >= 10 else f"{speed:.3g} {self._unit}/s"


def each(items: Iterable[_T], show: bool | None, unit: str, *, name: str) -> Iterator[_T]:
    """Yields the items and shows a `Progress` over them."""
    with Progress(show, len(items) if isinstance(items, Sized) else None, unit, name=name) as progress:
        for item in items:
            yield item
            progress.update()


@contextlib.contextmanager
def by_default(show: bool | None) -> Iterator[None]:
    """Sets what `show=None` means inside the block. The command line uses it, so that its logs show progress."""
    global _default
    before, _default = _default, show
    try:
        yield
    finally:
        _default = before


def shows(show: bool | None) -> bool:
    """Whether this process shows progress. Resolves `show=None`; only the first process of a run shows anything."""
    if show is None:
        show = _default
    if show is None:
        show = on_terminal()
    return show and _first()


def on_terminal() -> bool:
    """Whether standard error is a terminal."""
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # standard error is closed
        return False


def tell(text: str, show: bool | None = None) -> None:
    """Writes a line to a log outside any `Progress`. Writes nothing on a terminal."""
    if shows(show) and not on_terminal():
        _write(text)


def download_bars(show: bool | None, name: str) -> type[tqdm] | None:
    """Returns a replacement for the bar class of `huggingface_hub`.

    In a log, it reports all bars of one download together, as one line every 30 seconds.

    Args:
        show: as for `Progress`.
        name: the name of the download in these lines.

    Returns:
        A subclass of `tqdm`; None on a terminal, where the bars of `huggingface_hub` are used.
    """
    visible = shows(show)
    if visible and on_terminal():
        return None
    bars: list[tqdm] = []
    said = _now()
    lock = threading.Lock()

    def report() -> None:
        nonlocal said
        with lock:
            if not visible or _now() - said < EVERY:
                return
            said = _now()
            loaded = max((bar.n for bar in bars if bar.unit == "B"), default=0)
            files = [f"{bar.n:,} of {bar.total:,} files" for bar in bars if bar.unit != "B" and bar.total]
            _write(f"download {name}: {_listed(size(loaded) if loaded else '', *files[:1])}")

    class Bar(tqdm):
        """A `tqdm` bar that counts but displays nothing."""

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})
            bars.append(self)

        def update(self, n: float | None = 1) -> bool | None:
            updated = super().update(n)
            report()
            return updated

        def display(self, *_: Any, **__: Any) -> bool:
            return True

    return Bar


def size(count: float) -> str:
    """Formats a number of bytes, for example as "17.0 GB"."""
    for scale, unit in _UNITS:
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 100 * scale else f"{count / scale:,.0f} {unit}"
    return f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    """Formats a duration, for example as "45 s", "3 min 20 s", "1 h 20 min" or "2 d 3 h"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    large, small = ("min", "s"), seconds
    whole = 60
    if seconds >= 86400:
        large, whole, small = ("d", "h"), 24, round(seconds / 3600)
    elif seconds >= 3600:
        large, small = ("h", "min"), round(seconds / 60)
    first, second = divmod(small, whole)
    return f"{first} {large[0]} {second} {large[1]}" if second else f"{first} {large[0]}"


def _first() -> bool:
    """Whether this is the first process of the run, or the only one.

    Do not import JAX here: the command line imports this module before it configures JAX. Do not call
    `jax.process_index` in a single process: the call starts JAX's backend.
    """
    jax = sys.modules.get("jax")
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0


def _listed(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def _write(text: str) -> None:
    """Writes a line with the date in one call, so that lines of several processes do not mix. Ignores write errors."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        sys.stderr.flush()

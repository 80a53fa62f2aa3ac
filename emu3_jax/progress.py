"""What long work shows on standard error: a bar on a terminal, lines in a log, or nothing."""

import contextlib
import io
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

from tqdm import tqdm

EVERY = 30.0  # seconds between two lines of a log

# tqdm's own format with our time left instead of its own, which counts the compilation as if it came again.
_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_T = TypeVar("_T")

_default: bool | None = None  # what None means, see `by_default`
_now = time.monotonic


class Progress:
    """The progress of one piece of work, which is a context manager.

    On a terminal it is a bar. Elsewhere it is lines, one every 30 seconds: a line has the date, is written at once and
    as a whole, and work that ends before its first line writes none. Of several processes only the first one shows
    anything.

    Attributes:
        done: units that are done.
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
            show: False for nothing; True for a bar on a terminal and lines elsewhere; None for a bar on a terminal and
                nothing elsewhere, unless `by_default` says otherwise.
            total: units of all of the work, or None where that is not known.
            unit: what they are, "bytes" or any other word.
            name: of the work, for example "convert".
            initial: units that were done before.
            every: seconds between two lines; None for no lines but those of `line` and `say`.
            delay: seconds until there is a bar.
        """
        self.done = initial
        self._total, self._unit, self._name, self._every = total, unit, name, every
        self._began = self._said = _now()
        self._first: tuple[float, int] | None = None  # when the first units were done, and how many
        self._lines_written = False
        self._updating = threading.Lock()  # those who write arrays tell of them from threads
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
        """Takes the bar away; lines may follow."""
        if self._bar is not None:
            self._bar.close()

    @property
    def shown(self) -> bool:
        """Whether anything is shown: what is only told here need not be computed otherwise."""
        return self._show

    def update(self, units: int = 1, note: str = "") -> None:
        """Some more units are done; `note` stands beside the bar, after the time left."""
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
        """For example "time left 1 h 20 min"; empty where it is not known, or nothing is left.

        It is told by the units after the first ones, with which programs are compiled.
        """
        speed, left = self._speed(), 0 if self._total is None else self._total - self.done
        return f"time left {duration(left / speed)}" if speed and left > 0 else ""

    def line(self, text: str) -> None:
        """A line of a log. A terminal does not show it: it has the bar."""
        if self._show and self._bar is None:
            _write(text)

    def say(self, text: str) -> None:
        """A line of a log, or above the bar of a terminal."""
        if self._bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bar.write(text, file=sys.stderr)
        else:
            self.line(text)

    # -------------------------------------------------------------------------------------------- figures

    def _speed(self) -> float:
        """Units a second after the first ones; 0 while there are no others."""
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
    """The items one after the other, with a `Progress` over them."""
    with Progress(show, len(items) if isinstance(items, Sized) else None, unit, name=name) as progress:
        for item in items:
            yield item
            progress.update()


@contextlib.contextmanager
def by_default(show: bool | None) -> Iterator[None]:
    """Within, a `show` of None means this one. The command line uses it: a log of a command should say something."""
    global _default
    before, _default = _default, show
    try:
        yield
    finally:
        _default = before


def shows(show: bool | None) -> bool:
    """Whether anything is shown: in the first of several processes, by what the caller and `by_default` say."""
    if show is None:
        show = _default
    if show is None:
        show = on_terminal()
    return show and _first()


def on_terminal() -> bool:
    """Whether standard error is a terminal."""
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # it is closed
        return False


def tell(text: str, show: bool | None = None) -> None:
    """A line of a log that belongs to no `Progress`. A terminal does not show it."""
    if shows(show) and not on_terminal():
        _write(text)


def download_bars(show: bool | None, name: str) -> type[tqdm] | None:
    """What `huggingface_hub` is to make its bars with; None for its own, on a terminal.

    In a log, all bars of a download together become one line every 30 seconds.
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
        """Counts, and displays nothing."""

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
    """Bytes for people, for example "17.0 GB"."""
    for scale, unit in _UNITS:
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 100 * scale else f"{count / scale:,.0f} {unit}"
    return f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    """For example "45 s", "3 min 20 s", "1 h 20 min" or "2 d 3 h"."""
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
    """Whether this is the first of the processes of a run.

    JAX is not imported here: the command line imports this module before it has set JAX up. And a process that is
    alone is not asked for its number, for which JAX would look for devices.
    """
    jax = sys.modules.get("jax")
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0


def _listed(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def _write(text: str) -> None:
    """One call, so that lines of several processes do not mix. Work goes on where nobody can read them."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        sys.stderr.flush()

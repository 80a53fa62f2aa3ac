"""How a run is asked to stop: by Ctrl-C, or by SIGTERM, as machines are before they are taken away."""

import contextlib
import math
import os
import signal
import threading
import time
import types
from collections.abc import Iterator
from typing import Any

import jax

_STOPPING = b"emu3-jax: stopping after this step; Ctrl-C again ends at once\n"
_ONE_PRESS = 0.3  # seconds; a terminal and a launcher may both pass on the same Ctrl-C


class _Interrupt:
    """The handler of Ctrl-C while a run trains: the first one asks it to stop, a second one interrupts it."""

    def __init__(self, received: list[int]):
        self._received, self._several = received, jax.process_count() > 1
        self._came = math.inf
        self._told = False

    def tell(self) -> None:
        """Says once what will happen. Where a program compiles for minutes, the handler itself waits for its end: who
        hears of the signal before calls this."""
        if not self._told:
            self._told = True
            with contextlib.suppress(OSError):
                start = b"\n" if os.isatty(2) else b""  # there a progress bar may stand on the line
                os.write(2, start + _STOPPING)  # the signal may come in the middle of `sys.stderr.write`

    def __call__(self, number: int, frame: types.FrameType | None) -> None:
        now = time.monotonic()
        if now - self._came > _ONE_PRESS:
            raise KeyboardInterrupt
        if self._came < math.inf:
            return  # a terminal and a launcher both passed on the first
        self._came = now
        self.tell()
        self._received.append(number)
        if self._several:  # JAX waits for this one, to agree with the other processes on the last step
            signal.raise_signal(signal.SIGTERM)


@contextlib.contextmanager
def stop_signal() -> Iterator[list[int]]:
    """A list that SIGTERM and Ctrl-C put their numbers into; elsewhere than in the main thread it stays empty.

    Where there are several processes JAX itself waits for SIGTERM, to tell them all (`reached_preemption`).
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    handlers: dict[int, Any] = {signal.SIGINT: _Interrupt(received)}
    if jax.process_count() == 1:
        handlers[signal.SIGTERM] = lambda number, _: received.append(number)
    old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield received
    finally:
        for number, handler in old.items():
            if handler is not None:  # one that was not installed from Python
                signal.signal(number, handler)

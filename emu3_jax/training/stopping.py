"""Signals that stop a run early: Ctrl-C, and SIGTERM, which cloud machines get before they are taken away."""

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
_ONE_PRESS = 0.3  # seconds; a terminal and a launcher may both send a signal for one press of Ctrl-C


class _Interrupt:
    """The handler of Ctrl-C while a run trains. The first Ctrl-C asks the run to stop, a second one interrupts it."""

    def __init__(self, received: list[int]):
        self._received, self._several = received, jax.process_count() > 1
        self._came = math.inf
        self._told = False

    def tell(self) -> None:
        """Prints once that the run will stop.

        Python runs a signal handler only after a compilation ends, which may take minutes. Code that learns of the
        signal earlier calls this method.
        """
        if not self._told:
            self._told = True
            with contextlib.suppress(OSError):
                start = b"\n" if os.isatty(2) else b""  # on a terminal, a progress bar may occupy the line
                os.write(2, start + _STOPPING)  # not `sys.stderr.write`: the signal may interrupt a call of it

    def __call__(self, number: int, frame: types.FrameType | None) -> None:
        now = time.monotonic()
        if now - self._came > _ONE_PRESS:
            raise KeyboardInterrupt
        if self._came < math.inf:
            return  # the second signal of one press
        self._came = now
        self.tell()
        self._received.append(number)
        if self._several:  # JAX listens for SIGTERM and makes all processes agree on the last step
            signal.raise_signal(signal.SIGTERM)


@contextlib.contextmanager
def stop_signal() -> Iterator[list[int]]:
    """Yields a list to which SIGTERM and Ctrl-C append their signal numbers, instead of ending the process.

    Only the main thread can handle signals: in another thread the list stays empty. In a run of several processes, JAX
    itself handles SIGTERM and informs all processes (`Checkpoints.reached_preemption`).
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
            if handler is not None:  # None: the old handler was not installed from Python
                signal.signal(number, handler)

"""Ctrl-C ends every command, whatever the interpreter is doing.

Python turns the signal into an exception between two instructions of the main thread. That fails in three cases:

- In a destructor or a callback of the garbage collector, Python prints exceptions and drops them. JAX has such
  callbacks.
- A compiled function that calls Python may replace the exception by its own.
- While a compiled function runs for minutes, the main thread executes no instruction.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterator
from types import FrameType

from emu3_jax.files import remove_temporaries

CODE = 130  # exit code that shells use for SIGINT
MESSAGE = "emu3-jax: interrupted"
_PATIENCE = 10.0  # seconds that an interrupted command gets to clean up; compiled code may not return earlier
_PAUSE = 0.02  # seconds; long enough for a callback that dropped the exception to end
_LOST = b"\0"  # no signal has this number
_ONE_PRESS = 0.3  # seconds; a terminal and a launcher may both send the signal of one Ctrl-C

told = False  # whether the message about the last command was written
_telling = threading.RLock()  # the main thread and the watcher may both want to write the message


def tell(write: Callable[[str], object]) -> None:
    """Writes the message about the interruption, but only once. The process does not end while it is being written."""
    global told
    with _telling:
        if not told:
            told = True
            write(MESSAGE)


class Interruption:
    """The state of Ctrl-C while a command runs.

    Attributes:
        came: whether Ctrl-C was pressed.
        first: the time of the first Ctrl-C, by `time.monotonic`.
        lost: whether Python dropped the exception, and the watcher is about to raise it again.
        repeated: how often the watcher has raised it again.
    """

    def __init__(self) -> None:
        self.came = False
        self.first = float("inf")
        self.lost = False
        self.repeated = 0


@contextlib.contextmanager
def watched(*, last: bool = False) -> Iterator[Interruption]:
    """Within the block, Ctrl-C raises `KeyboardInterrupt` in the main thread, and no callback can swallow it.

    If the block has not ended after 10 seconds, the process ends. At a second Ctrl-C it ends at once. It then writes
    one line on standard error, removes temporary files and returns exit code 130.

    A block that handles SIGINT itself has no time limit: training does so, to write a last checkpoint. If its handler
    has a method `tell`, that is called at once, because the handler itself must wait until compiled code returns.

    In other threads, and if SIGINT is ignored, this does nothing.

    Args:
        last: the process ends after the block. After Ctrl-C, other threads then print no exceptions until the end.
    """
    global told
    told = False
    state = Interruption()
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as for background processes of a script
    if ignored or threading.current_thread() is not threading.main_thread():
        yield state
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        now, again = time.monotonic(), state.lost
        if state.came and now - state.first < _ONE_PRESS and not again:
            return  # the same press again: it must not stop the cleaning up
        state.came, state.lost, state.first = True, False, min(now, state.first)
        # Other threads may fail when the main thread ends. Their tracebacks would not help the user.
        sys.excepthook = threading.excepthook = _silent
        if _importing(frame):
            end_now()
        raise KeyboardInterrupt

    def unraisable(lost: "sys.UnraisableHookArgs") -> None:
        if isinstance(lost.exc_value, KeyboardInterrupt):
            state.lost = True
            with contextlib.suppress(OSError):
                theirs.send(_LOST)
        elif not state.came:
            hook(lost)

    # The interpreter writes the number of every signal to this socket at once, whatever the main thread does.
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    watcher = threading.Thread(target=_watch, args=(ours, state, interrupt), daemon=True)
    hooks = sys.excepthook, threading.excepthook
    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    handler = signal.signal(signal.SIGINT, interrupt)
    descriptor = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    watcher.start()
    try:
        yield state
    finally:
        signal.set_wakeup_fd(descriptor)
        signal.signal(signal.SIGINT, handler)
        if not (last and state.came):
            sys.unraisablehook = hook
            sys.excepthook, threading.excepthook = hooks
        theirs.close()  # ends the watcher
        watcher.join()
        ours.close()


def _watch(signals: socket.socket, state: Interruption, handler: object) -> None:
    """Reads the numbers of signals until the socket is closed. Ends the process if the exception does not end it."""
    count = 0
    first = deadline = float("inf")
    while True:
        signals.settimeout(None if deadline == float("inf") else max(0.0, deadline - time.monotonic()))
        try:
            number = signals.recv(1)
        except TimeoutError:
            end_now()
        if not number:
            return
        if number == _LOST:
            # Wait until the callback has ended: inside it, the new exception would be dropped too. If it is dropped
            # elsewhere, `unraisable` sends _LOST again.
            time.sleep(_PAUSE)
            state.repeated += 1
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            continue
        if number[0] != signal.SIGINT:
            continue
        count += 1
        now = time.monotonic()
        first = min(first, now)
        if count - state.repeated > 1 and now - first > _ONE_PRESS:
            end_now()
        current = signal.getsignal(signal.SIGINT)
        if current is handler:
            deadline = first + _PATIENCE
        elif hasattr(current, "tell"):
            current.tell()


def _silent(*_: object) -> None:
    """Replaces the hooks that print exceptions."""


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported. There, an exception gives a traceback or a crash of a compiled module."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def end_now() -> typing.NoReturn:
    """Ends this process without waiting for anything."""
    remove_temporaries()

    def write(message: str) -> None:
        with contextlib.suppress(OSError):
            start = "\n" if os.isatty(2) else ""  # the line may hold a progress bar
            os.write(2, f"{start}{message}\n".encode())

    if _telling.acquire(timeout=1.0):  # the main thread may be blocked in a write
        tell(write)
    os._exit(CODE)

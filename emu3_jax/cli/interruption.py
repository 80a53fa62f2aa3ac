"""Ctrl-C ends every command, wherever the interpreter stands when it comes.

Python turns the signal into an exception between two instructions of the main thread. That fails in three places: in a
callback of the garbage collector or a destructor, exceptions are printed and dropped (JAX has such callbacks); a
compiled function that calls back into Python may turn the exception into its own; and while a compiled function runs
for minutes, no instruction follows.
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

CODE = 130  # as a shell reports SIGINT
MESSAGE = "emu3-jax: interrupted"
_PATIENCE = 10.0  # seconds in which an interrupted command cleans up; compiled code may not come back before
_PAUSE = 0.02  # seconds, in which a callback that lost the exception has ended
_LOST = b"\0"  # beside the numbers of signals
_ONE_PRESS = 0.3  # seconds; a terminal and a launcher may both pass on the same Ctrl-C

told = False  # whether the user was told that the last command was interrupted
_telling = threading.RLock()  # the main thread and the watcher may want to at once


def tell(write: Callable[[str], object]) -> None:
    """Says once that the command was interrupted. The process does not end in the middle of it."""
    global told
    with _telling:
        if not told:
            told = True
            write(MESSAGE)


class Interruption:
    """What is known of Ctrl-C while a command runs.

    Attributes:
        came: whether it came.
        first: when the first one came, by `time.monotonic`.
        lost: whether its exception was lost, and is about to be raised again.
        repeated: how often it was.
    """

    def __init__(self) -> None:
        self.came = False
        self.first = float("inf")
        self.lost = False
        self.repeated = 0


@contextlib.contextmanager
def watched(*, last: bool = False) -> Iterator[Interruption]:
    """For the main thread: within the block, Ctrl-C raises `KeyboardInterrupt` there, and nothing can lose it.

    Where the block has not ended 10 seconds later, and at the second Ctrl-C at once, the process ends: one line on
    standard error, temporary files removed, exit code 130. A block that handles SIGINT itself, as training does to end
    with a checkpoint, has the time that it takes; if its handler has a method `tell`, that is called at once, while the
    handler waits for compiled code to come back. In other threads, and where SIGINT is ignored, this does nothing.

    Args:
        last: the process ends after the block: threads that go on after Ctrl-C stay silent to its very end.
    """
    global told
    told = False
    state = Interruption()
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as in the background of a script
    if ignored or threading.current_thread() is not threading.main_thread():
        yield state
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        now, again = time.monotonic(), state.lost
        if state.came and now - state.first < _ONE_PRESS and not again:
            return  # it is being cleaned up, which the same press must not stop
        state.came, state.lost, state.first = True, False, min(now, state.first)
        # What other threads make of the end of this one is of no use to anybody.
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
        theirs.close()  # which ends the watcher
        watcher.join()
        ours.close()


def _watch(signals: socket.socket, state: Interruption, handler: object) -> None:
    """Reads the numbers of signals until the socket is closed, and ends the process where an exception does not."""
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
            # Not from within the callback, where the exception would be lost like the first. If this one is lost too,
            # its end comes here again.
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
    """In the place of hooks that print exceptions."""


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported: what compiled ones make of an exception there is a traceback or a crash."""
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
            start = "\n" if os.isatty(2) else ""  # there a progress bar may stand on the line
            os.write(2, f"{start}{message}\n".encode())

    if _telling.acquire(timeout=1.0):  # unless the main thread waits for somebody to read what it says
        tell(write)
    os._exit(CODE)

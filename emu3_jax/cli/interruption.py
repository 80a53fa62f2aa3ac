"""Ctrl-C and SIGTERM end every command, whatever the interpreter is doing.

Python calls the handler of a signal between two instructions of the main thread. The handler raises
`KeyboardInterrupt`. That fails in three cases:

- In a destructor or a callback of the garbage collector, Python prints exceptions and drops them. JAX has such
  callbacks.
- A compiled function that calls Python may replace the exception by its own.
- While a compiled function runs for minutes, the main thread executes no instruction.

The handler of SIGTERM also keeps libtpu silent: libtpu prints a stack trace at SIGTERM, but only if nothing handles
SIGTERM when JAX loads it.
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

MESSAGES = {signal.SIGINT: "emu3-jax: interrupted", signal.SIGTERM: "emu3-jax: terminated"}
CODES = {128 + number for number in MESSAGES}  # exit codes that shells use: 130 and 143
_PATIENCE = 10.0  # seconds that an interrupted command gets to clean up; compiled code may not return earlier
_PAUSE = 0.02  # seconds; long enough for a callback that dropped the exception to end
_LOST = b"\0"  # no signal has this number
_ONE_PRESS = 0.3  # seconds; a terminal and a launcher may both send the signal of one Ctrl-C

told = False  # whether the message about the last command was written
_telling = threading.RLock()  # the main thread and the watcher may both want to write the message


def tell(number: int, write: Callable[[str], object]) -> None:
    """Writes the message about a signal, but only once. The process does not end while it is being written."""
    global told
    with _telling:
        if not told:
            told = True
            write(MESSAGES[number])


class Interruption:
    """What Ctrl-C and SIGTERM have done while a command runs.

    Attributes:
        came: whether one of the signals came.
        number: the number of the first one; of Ctrl-C, if none came.
        raised: when the handler last raised the exception, by `time.monotonic`.
        lost: whether Python dropped the exception, and the watcher is about to raise it again.
        repeated: how often the watcher has raised it again.
    """

    def __init__(self) -> None:
        self.came = False
        self.number: int = signal.SIGINT
        self.raised = -float("inf")
        self.lost = False
        self.repeated = 0

    @property
    def code(self) -> int:
        """The exit code after the signal."""
        return 128 + self.number


@contextlib.contextmanager
def watched(state: Interruption, *, last: bool = False) -> Iterator[None]:
    """Within the block, Ctrl-C and SIGTERM raise `KeyboardInterrupt` in the main thread. No callback can swallow it.

    If the block has not ended after 10 seconds, the process ends. At a second signal it ends at once. It then writes
    one line on standard error, removes temporary files and returns exit code 130 or 143.

    A block that handles a signal itself has no time limit: training does so, to write a last checkpoint. If its
    handler of SIGINT has a method `tell`, that is called at once, because the handler itself must wait until compiled
    code returns.

    A signal that is ignored stays ignored. In other threads this does nothing.

    Args:
        state: what came, for the caller.
        last: the process ends after the block. After a signal, other threads then print no exceptions until the end.
    """
    global told
    told = False
    # SIGINT is ignored in background processes of a script.
    numbers = [number for number in MESSAGES if signal.getsignal(number) is not signal.SIG_IGN]
    if not numbers or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        now, again = time.monotonic(), state.lost
        if now - state.raised < _ONE_PRESS and not again:
            return  # the same press again: it must not stop the cleaning up
        if not state.came:
            state.came, state.number = True, number
        state.lost, state.raised = False, now
        # Other threads may fail when the main thread ends. Their tracebacks would not help the user.
        sys.excepthook = threading.excepthook = _silent
        if _importing(frame):
            end_now(state.number)
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
    handlers = {number: signal.signal(number, interrupt) for number in numbers}
    descriptor = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not installed from Python
        if not (last and state.came):
            sys.unraisablehook = hook
            sys.excepthook, threading.excepthook = hooks
        theirs.close()  # ends the watcher
        watcher.join()
        ours.close()


def _watch(signals: socket.socket, state: Interruption, handler: object) -> None:
    """Reads the numbers of signals until the socket is closed. Ends the process if the exception does not end it."""
    count = 0
    came: int = signal.SIGINT  # the number of the first signal that counts
    first = deadline = float("inf")
    while True:
        patience = _PAUSE if state.lost else deadline - time.monotonic()
        signals.settimeout(None if patience == float("inf") else max(0.0, patience))
        try:
            number = signals.recv(1)
        except TimeoutError:
            if time.monotonic() >= deadline:
                end_now(came)
            if state.lost:
                # By now the callback has ended: inside it, the new exception would be dropped too. The signal may come
                # just before the main thread begins to sleep, which it then does not end. So it is sent until the
                # handler has run.
                if signal.getsignal(state.number) is not handler:
                    state.lost = False  # this handler does not say that it has run
                state.repeated += 1
                signal.pthread_kill(threading.main_thread().ident, state.number)
            continue
        if not number:
            return
        if number[0] not in MESSAGES:  # _LOST, or a signal that others handle
            continue
        current = signal.getsignal(number[0])
        if number[0] == signal.SIGTERM and current is not handler:
            continue  # training stops at SIGTERM as it sees fit; cloud machines may send it more than once
        count += 1
        now = time.monotonic()
        if count == 1:
            came, first = number[0], now
        if count - state.repeated > 1 and now - first > _ONE_PRESS:
            end_now(came)
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


def end_now(number: int) -> typing.NoReturn:
    """Ends this process after a signal without waiting for anything."""
    remove_temporaries()

    def write(message: str) -> None:
        with contextlib.suppress(OSError):
            start = "\n" if os.isatty(2) else ""  # the line may hold a progress bar
            os.write(2, f"{start}{message}\n".encode())

    if _telling.acquire(timeout=1.0):  # the main thread may be blocked in a write
        tell(number, write)
    os._exit(128 + number)

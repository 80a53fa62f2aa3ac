"""Runs Python files that the user names, and says in one line what went wrong in them."""

import queue
import sys
import threading
import traceback
import types
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

_MOST = 200  # characters of an error's message


_Call = tuple[Callable[[], Any], Future[Any]]


class TookTooLong(Exception):
    """A call took longer than its time limit."""


class TimedThread:
    """A thread that makes calls, one after the other, each with a time limit.

    Unlike a worker process, the calls can use the devices of this process. A call that takes too long cannot be
    stopped: its thread is left alone, see `left_behind`. The limit has no effect while compiled code holds Python's
    interpreter lock.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        # Not an executor: Python waits for an executor's threads before it exits.
        self._thread = threading.Thread(target=_make_calls, args=[self._calls], daemon=True, name="user code")
        self._thread.start()
        weakref.finalize(self, self._calls.put, None)  # ends the thread

    def call(self, work: Callable[[], Any], seconds: float) -> Any:
        """Returns what `work` returns. Its exceptions pass, also `SystemExit`.

        Raises:
            TookTooLong: it took longer than `seconds`. Make no further call then.
        """
        future: Future[Any] = Future()
        self._calls.put((work, future))
        wait([future], seconds)
        if not future.done():
            _late.append(self._thread)
            raise TookTooLong(f"it took longer than {seconds:g} s")
        return future.result()


def _make_calls(calls: "queue.SimpleQueue[_Call | None]") -> None:
    while (call := calls.get()) is not None:
        work, future = call
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)
        del call, work, future  # they hold pictures


_late: list[threading.Thread] = []


def left_behind() -> bool:
    """Whether a call took too long in this process. Then only `os._exit` ends the process for certain."""
    return bool(_late)


def run_file(file: str, source: bytes, name: str) -> types.ModuleType:
    """Runs a Python file with all rights of the user. Its errors pass unchanged.

    Args:
        file: its path, for tracebacks and `__file__`.
        source: its contents. Compiled code and archives do not run, whatever the file's name.
        name: name of the module, which stays in `sys.modules`: dataclasses that the file declares look it up there.
    """
    module = types.ModuleType(name)
    module.__file__ = file
    sys.modules[name] = module
    exec(compile(source, file, "exec", dont_inherit=True), module.__dict__)
    return module


def what_failed(error: BaseException, file: str | None) -> tuple[str, int | None]:
    """The type and the message of an error in one line, and the number of the line of `file` where it arose, if any."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines.append(error.lineno or 1)
    try:
        text = " ".join(str(error).split())[:_MOST]
    except Exception:  # the file's own exception class may fail in `__str__`
        text = ""
    return type(error).__name__ + (f": {text}" if text else ""), lines[-1] if lines else None

"""Locks of directories: only one process uses a directory at a time.

The kernel releases a lock even if its process is killed.
"""

import contextlib
import fcntl
import logging
import os
import pathlib
import socket
from collections.abc import Callable, Iterator
from typing import TextIO

from emu3_jax import storage
from emu3_jax.errors import Emu3Error

_log = logging.getLogger("emu3_jax")


@contextlib.contextmanager
def locked(file: pathlib.Path, busy: Callable[[str], str], *, passing: bool = False) -> Iterator[None]:
    """Holds a lock during the block, so that only one process uses a directory.

    On a file system without locks, this only logs a warning. Locks in a bucket: see `storage.held`.

    Args:
        file: the lock file; made if absent. Its directory must exist.
        busy: makes the error message from a description of the process that holds the lock.
        passing: delete the lock file after the block.

    Raises:
        Emu3Error: another process holds the lock, or the file cannot be made.
    """
    if storage.is_remote(file):
        with storage.held(file, busy):
            yield
        return
    while (stream := _lock_file(file, busy, passing)) is None:
        pass
    with stream:
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}")
        stream.flush()
        try:
            yield
        finally:
            if passing:
                with contextlib.suppress(OSError):
                    file.unlink()


def _lock_file(file: pathlib.Path, busy: Callable[[str], str], passing: bool) -> TextIO | None:
    """Opens and locks the lock file. Returns None if another process has just removed it: then try again."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if passing and isinstance(error, FileNotFoundError):
            file.parent.mkdir(parents=True, exist_ok=True)  # another process made the directory, failed and removed it
            return None
        raise Emu3Error(f"{file.parent}: cannot be used ({error.strerror}); choose another directory") from error
    stream = os.fdopen(descriptor, "r+", errors="replace")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        with stream:
            raise Emu3Error(busy(stream.read(200).strip() or "another process")) from error
    except OSError as error:
        _log.warning("%s: cannot be locked (%s); do not let another run write there", file.parent, error.strerror)
    with contextlib.suppress(OSError):
        if os.stat(file).st_ino == os.fstat(descriptor).st_ino:
            return stream
    stream.close()
    return None

"""Locks in a bucket. The holder renews its lock, because a bucket cannot release the lock of a process that died."""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

from emu3_jax.errors import Emu3Error
from emu3_jax.storage.objects import delete_object, look_up
from emu3_jax.storage.paths import split
from emu3_jax.storage.requests import client, explained

_BEAT = 15.0  # seconds between two renewals of a lock
_LOOKS, _LOOK = 9, 5.0  # a lock is abandoned if this many checks, this many seconds apart, see no renewal
_log = logging.getLogger("emu3_jax")
_mine: set[str] = set()  # locks that this process holds


@contextlib.contextmanager
def held(file: str | os.PathLike, busy: Callable[[str], str]) -> Iterator[None]:
    """Holds a lock object during the block. A thread renews the lock, and it is deleted after the block.

    Takes over a lock that nobody renews, and a lock of a dead process on this host.

    Args:
        file: path of the object.
        busy: makes the error message from a description of the process that holds the lock.

    Raises:
        Emu3Error: another process holds the lock, or the bucket cannot be written.
    """
    key = os.fspath(file)
    with explained(file):
        if key in _mine:
            raise Emu3Error(busy("this process"))
        while (generation := _create(key)) is None:
            _await_end(key, busy)
    _mine.add(key)
    done = threading.Event()
    renewer = threading.Thread(target=_renew, args=(key, generation, done), daemon=True)
    renewer.start()
    try:
        yield
    finally:
        done.set()
        renewer.join()
        _mine.discard(key)
        with contextlib.suppress(Exception):  # if this fails, the next run takes over the lock
            delete_object(key, ifGenerationMatch=generation)


def _create(key: str) -> str | None:
    """Creates the lock object and returns its generation. Returns None if the object already exists."""
    holder = json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode()
    try:
        client().pipe_file(key, holder, mode="create")
    except FileExistsError:
        return None
    found = look_up(key)
    return None if found is None else str(found["generation"])


def _await_end(key: str, busy: Callable[[str], str]) -> None:
    """Deletes an abandoned lock. Raises the error of `busy` if another process renews the lock."""
    first = look_up(key)
    if first is None:
        return
    try:
        said = json.loads(client().cat_file(key))
        host, process = str(said["host"]), int(said["process"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        host, process = "", 0
    holder = f"process {process} on {host}" if host else "another process"
    if not (host == socket.gethostname() and _ended(process)):
        _log.warning("%s is held by %s; waiting %.0f s to see whether it still runs", key, holder, _LOOKS * _LOOK)
        for _ in range(_LOOKS):
            time.sleep(_LOOK)
            now = look_up(key)
            if now is None:
                return
            if (now["generation"], now["metageneration"]) != (first["generation"], first["metageneration"]):
                raise Emu3Error(busy(holder))
    with contextlib.suppress(FileNotFoundError, FileExistsError):  # another process was faster
        delete_object(key, ifGenerationMatch=str(first["generation"]))


def _ended(process: int) -> bool:
    """Whether no other process of this host has this number.

    Our own number counts as ended: a restarted container reuses numbers, so the lock is from before the restart.
    """
    if process == os.getpid():
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _renew(key: str, generation: str, done: threading.Event) -> None:
    bucket, name = split(key)
    beat = 0
    while not done.wait(_BEAT):
        beat += 1
        note = {"metadata": {"beat": str(beat)}}
        try:
            client().call("PATCH", "b/{}/o/{}", bucket, name, json=note, ifGenerationMatch=generation)
        except (FileNotFoundError, FileExistsError):
            _log.warning("%s: another run took this lock and may write to the same place; stop one of the two", key)
            return
        except Exception as error:  # mostly network errors; the next renewal may succeed
            _log.debug("%s was not renewed: %s", key, error)

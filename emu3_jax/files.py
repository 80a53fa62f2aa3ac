"""Writing all or nothing: everything goes to a temporary name and is renamed at the end.

Temporary files and directories stand beside what they become and are called `.emu3-tmp-...`. The process that writes
one holds a lock on it, which the kernel gives back even when the process is killed. So the next run that writes to the
same directory can tell what a killed run left, and removes it.

What goes to a bucket is written to a temporary directory of this machine and uploaded at the end (see `storage`).
"""

import contextlib
import errno
import fcntl
import logging
import os
import pathlib
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from emu3_jax import storage
from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import local_path

_PREFIX = ".emu3-tmp-"
_OLD = re.compile(r"\.(.+)\.([0-9]{1,9})\.tmp")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_log = logging.getLogger("emu3_jax")
_lock = threading.Lock()
_live: set[pathlib.Path] = set()  # temporaries of this process
_swept: set[pathlib.Path] = set()  # directories that this process has looked through


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary sibling of `path` that takes its name when the block ends well, and vanishes otherwise.

    Raises:
        Emu3Error: if the place cannot be written (no such directory, a full disk, ...).
    """
    if storage.is_remote(path):
        with _staged(path) as (folder, target):
            if storage.listing(target):
                raise Emu3Error(f"cannot write {target}: it is a directory; choose another name")
            yield folder / target.name
            storage.upload(folder / target.name, target)
        return
    path = _place(path)
    with _explained(path):
        if path.is_dir():
            raise Emu3Error(f"cannot write {path}: it is a directory; choose another name")
        with _temporary(path, path.parent) as temporary:
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)


@contextlib.contextmanager
def files_into(directory: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary directory whose files move into `directory` when the block ends well.

    Files of the same names are replaced; nothing moves unless everything was written and has a place.
    """
    if storage.is_remote(directory):
        with _staged(directory) as (folder, target):
            storage.require_directory(target)
            (folder / target.name).mkdir()
            yield folder / target.name
            storage.upload(folder / target.name, target)
        return
    directory = _place(directory)
    if directory.exists() and not directory.is_dir():
        raise Emu3Error(f"{directory} is a file: choose a directory to write to")
    with _explained(directory), _new_parents(directory.parent):
        if directory.is_dir() and not os.access(directory, os.W_OK | os.X_OK):
            raise Emu3Error(f"cannot write to {directory}: permission denied; choose another directory")
        with _temporary(directory, directory.parent, is_directory=True) as temporary:
            yield temporary
            items = sorted(temporary.iterdir())
            for item in items:
                if (directory / item.name).is_dir():
                    raise Emu3Error(
                        f"cannot write {directory / item.name}: it is a directory; choose another output directory"
                    )
            directory.mkdir(exist_ok=True)
            for item in items:
                item.replace(directory / item.name)


@contextlib.contextmanager
def new_directory(target: str | os.PathLike, nbytes: int) -> Iterator[pathlib.Path]:
    """A temporary sibling that becomes `target` when the block succeeds, and vanishes when it does not.

    Raises:
      Emu3Error: `target` exists, its parent cannot be written, or the disk has less than `nbytes` left.
    """
    if storage.is_remote(target):
        with _staged(target) as (folder, place):
            if storage.exists(place):
                raise Emu3Error(f"{place} exists already: choose another name or delete it first")
            _require_space(folder, nbytes, f"{place.name}, before it is uploaded,", "set TMPDIR to another disk")
            (folder / place.name).mkdir()
            with _full_disk(place):
                yield folder / place.name
            storage.upload(folder / place.name, place)
        return
    target = _place(target)
    if os.path.lexists(target):
        raise Emu3Error(f"{target} exists already: choose another name or delete it first")
    with _explained(target), _new_parents(target.parent):
        _require_space(target.parent, nbytes, target.name, "choose another disk")
        with _temporary(target, target.parent, is_directory=True) as temporary:
            with _full_disk(target):
                yield temporary
            temporary.chmod(0o777 & ~_umask())
            temporary.rename(target)


def _require_space(directory: pathlib.Path, nbytes: int, what: str, remedy: str) -> None:
    free = shutil.disk_usage(directory).free
    if free < nbytes:
        raise Emu3Error(
            f"{directory} has {_gigabytes(free)} free, {what} needs {_gigabytes(nbytes)}: free space or {remedy}"
        )


def is_full(error: BaseException) -> bool:
    """Whether a disk, a quota or a limit of a file's size is exhausted; TensorStore says so in a `ValueError`."""
    return getattr(error, "errno", None) in _FULL or any(os.strerror(code) in str(error) for code in _FULL)


@contextlib.contextmanager
def _full_disk(target: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        if is_full(error):
            raise Emu3Error(
                f"{target}: the disk is full; nothing was kept; free space or choose another disk"
            ) from error
        raise


@contextlib.contextmanager
def local_directory() -> Iterator[pathlib.Path]:
    """A temporary directory of this machine (`TMPDIR` chooses where), which goes after the block."""
    parent = pathlib.Path(tempfile.gettempdir())
    with _explained(parent), _temporary(parent / "directory", parent, is_directory=True) as folder:
        yield folder


@contextlib.contextmanager
def _staged(path: str | os.PathLike) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """A local temporary directory for what goes to a bucket, and its place there."""
    target = storage.place(path)
    with local_directory() as folder:
        yield folder, target


def _place(path: str | os.PathLike) -> pathlib.Path:
    """A path to write to, without `..`: a directory that it leads out of again is not made."""
    path = local_path(path)
    return pathlib.Path(os.path.realpath(path)) if ".." in path.parts else path


@contextlib.contextmanager
def _explained(path: pathlib.Path) -> Iterator[None]:
    """Errors of the system become one line. Those that name another file were made reading it."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            raise Emu3Error(f"cannot write {path}: {reason}; free space or choose another place") from error
        culprit = error.filename2 or error.filename
        named = None if culprit is None or isinstance(culprit, int) else pathlib.Path(os.fsdecode(culprit))
        ours = named is None or named in (path, path.parent) or any(part.startswith(_PREFIX) for part in named.parts)
        if ours or named in path.parents:
            raise Emu3Error(f"cannot write {path}: {reason}; choose another place") from error
        raise Emu3Error(f"cannot use {named}: {reason}") from error


@contextlib.contextmanager
def _new_parents(directory: pathlib.Path) -> Iterator[None]:
    """Makes a directory and those above it; where the block fails, what was made goes again."""
    missing = []
    place = directory
    while not os.path.lexists(place):
        missing.append(place)
        place = place.parent
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for made in missing:
            with contextlib.suppress(OSError):  # someone else uses it meanwhile
                made.rmdir()
        raise


# ------------------------------------------------------------------------------------------------ temporaries


@contextlib.contextmanager
def _temporary(target: pathlib.Path, parent: pathlib.Path, *, is_directory: bool = False) -> Iterator[pathlib.Path]:
    """A temporary file or directory in `parent`, locked by this process. It is gone after the block, if not renamed."""
    _sweep_once(parent)
    temporary, descriptor = _make(parent, target.suffix if len(target.suffix) < 16 else "", is_directory)
    with _lock:
        _live.add(temporary)
    try:
        yield temporary
    finally:
        remove(temporary)
        os.close(descriptor)
        with _lock:
            _live.discard(temporary)


def _make(parent: pathlib.Path, suffix: str, is_directory: bool) -> tuple[pathlib.Path, int]:
    """A new temporary, and the descriptor that holds its lock."""
    while True:
        if is_directory:
            name = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
            descriptor = os.open(name, os.O_RDONLY)
        else:
            descriptor, name = tempfile.mkstemp(prefix=_PREFIX, suffix=suffix, dir=parent)
        with contextlib.suppress(OSError):  # a file system without locks: then nothing sweeps there either
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another process that sweeps may have come between the making and the lock.
        with contextlib.suppress(OSError):
            if os.stat(name).st_ino == os.fstat(descriptor).st_ino:
                return pathlib.Path(name), descriptor
        os.close(descriptor)


def remove(temporary: pathlib.Path) -> None:
    """Removes a file, a link, or a directory with all that it holds, as far as that is possible."""
    if temporary.is_dir() and not temporary.is_symlink():
        for _ in range(20):
            shutil.rmtree(temporary, ignore_errors=True)
            if not temporary.exists():
                break
            time.sleep(0.05)  # after Ctrl-C threads of a library still write into it for a moment
    else:
        with contextlib.suppress(OSError):
            temporary.unlink()


def remove_temporaries() -> None:
    """Removes all temporaries of this process. For its hard end, where no block ends any more."""
    with _lock:
        for temporary in _live:
            remove(temporary)


def sweep(directory: str | os.PathLike) -> list[pathlib.Path]:
    """Removes the temporaries in `directory` that killed runs left, and returns their paths. None is an error."""
    removed = []
    try:
        candidates = [entry.path for entry in os.scandir(os.fspath(directory)) if entry.name.startswith(_PREFIX)]
    except OSError:
        return []
    for name in candidates:
        with contextlib.suppress(OSError):  # another process was faster, or it is not ours to remove
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(pathlib.Path(name))
                removed.append(pathlib.Path(name))
            finally:
                os.close(descriptor)
    return removed


def clean(path: str | os.PathLike) -> list[pathlib.Path]:
    """Removes what killed runs left in the directory `path` and beside it, and returns the paths.

    Beside it: temporaries, and what version 0.1.0 called `.NAME.PID.tmp`, NAME being that of `path`. `path` itself may
    be absent, as after the first run that wrote to it was killed.
    """
    path = local_path(path)
    removed = [*sweep(path), *sweep(path.absolute().parent)]
    for directory, name in ((path, None), (path.absolute().parent, path.absolute().name)):
        with contextlib.suppress(OSError):
            for entry in sorted(os.listdir(directory)):
                match = _OLD.fullmatch(entry)
                if match and name in (None, match[1]) and not _runs(int(match[2])):
                    remove(directory / entry)
                    removed.append(directory / entry)
    return removed


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sweep_once(directory: pathlib.Path) -> None:
    place = directory.absolute()
    with _lock:
        if place in _swept:
            return
        _swept.add(place)
    for leftover in sweep(directory):
        _log.warning("removed %s, which a run that was killed had left", leftover)


@contextlib.contextmanager
def shared_directory(directory: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Makes a directory that others may write to at the same time. An empty one goes again where the block fails.

    Raises:
        Emu3Error: it is a file, or cannot be made or written.
    """
    if storage.is_remote(directory):
        place = storage.place(directory)
        storage.require_directory(place)
        yield place
        return
    directory = _place(directory)
    if os.path.lexists(directory) and not directory.is_dir():
        raise Emu3Error(f"{directory} is a file: choose a directory to write to")
    with _explained(directory), _new_parents(directory):
        yield directory


@contextlib.contextmanager
def locked(file: pathlib.Path, busy: Callable[[str], str], *, passing: bool = False) -> Iterator[None]:
    """Holds the lock file `file` for this process; its directory must exist.

    On a file system that has no locks this does nothing. In a bucket see `storage.held`.

    Args:
        file: is made if need be.
        busy: from who holds it, an error line.
        passing: it goes again after the block; otherwise it stays.

    Raises:
        Emu3Error: another process holds it, or it cannot be made.
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
    """The open lock file, locked; None where another process just now removed it, so that the lock holds nobody off."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if passing and isinstance(error, FileNotFoundError):
            file.parent.mkdir(parents=True, exist_ok=True)  # the other process failed, and removed what it had made
            return None
        raise Emu3Error(f"{file.parent}: cannot be used ({error.strerror}); choose another directory") from error
    stream = os.fdopen(descriptor, "r+", errors="replace")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        with stream:
            raise Emu3Error(busy(stream.read(200).strip() or "another process")) from error
    except OSError as error:
        _log.warning("%s: cannot be locked (%s); let no other run use it", file.parent, error.strerror)
    with contextlib.suppress(OSError):
        if os.stat(file).st_ino == os.fstat(descriptor).st_ino:
            return stream
    stream.close()
    return None


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

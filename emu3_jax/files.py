"""All-or-nothing writes: results are written under a temporary name and renamed at the end.

Temporary files and directories are called `.emu3-tmp-...` and lie in the same directory as the result. The process
that writes one holds a lock on it, and the kernel releases the lock even if the process is killed. So the next run
that writes to the same directory can recognise the leftovers of a killed run, and removes them.

Results for a bucket are written to a local temporary directory, and uploaded at the end (see `storage`).
"""

import contextlib
import errno
import fcntl
import logging
import os
import pathlib
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator

from emu3_jax import storage
from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import local_path

_PREFIX = ".emu3-tmp-"
_OLD = re.compile(r"\.(.+)\.([0-9]{1,9})\.tmp")
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_log = logging.getLogger("emu3_jax")
_lock = threading.Lock()
_live: dict[pathlib.Path, pathlib.Path] = {}  # temporary files and directories of this process, and their targets
_removed: set[pathlib.Path] = set()  # temporary directories that this process removed because of an error or Ctrl-C
_swept: set[pathlib.Path] = set()  # directories from which this process has removed leftovers


@contextlib.contextmanager
def new_file(path: str | os.PathLike, *, replace: bool = True) -> Iterator[pathlib.Path]:
    """Yields a temporary path for a new file. It is renamed to `path` if the block succeeds, and deleted if it fails.

    Args:
        path: local or in a bucket.
        replace: whether to replace an existing file. A file in a bucket is always replaced.

    Raises:
        Emu3Error: `path` is a directory or cannot be written (no such directory, a full disk, ...), or exists at the
            end of the block and must not be replaced.
    """
    if storage.is_remote(path):
        with _staged(path) as (folder, target):
            if storage.listing(target):
                raise Emu3Error(f"cannot write {target}: it is a directory; choose another name")
            yield folder / target.name
            storage.upload(folder / target.name, target)
        return
    path = _place(path)
    check_directory(path.parent)
    with _explained(path):
        if path.is_dir():
            raise Emu3Error(f"cannot write {path}: it is a directory; choose another name")
        with _temporary(path, path.parent) as temporary:
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            if replace:
                temporary.replace(path)
            else:
                _name(temporary, path)


@contextlib.contextmanager
def files_into(directory: str | os.PathLike, *, replace: bool = True) -> Iterator[pathlib.Path]:
    """Yields a temporary directory. Its files move into `directory` if the block succeeds, and are deleted if it fails.

    A new file never replaces a directory: then nothing moves.

    Args:
        directory: local or in a bucket; made if absent.
        replace: whether to replace files of the same names. If not, and one of the names is taken, no file stays in
            `directory`. Files in a bucket are always replaced.

    Raises:
        Emu3Error: `directory` is a file or cannot be written, or holds a directory with the name of a new file, or
            holds a file with such a name that must not be replaced.
    """
    if storage.is_remote(directory):
        with _staged(directory) as (folder, target):
            storage.require_directory(target)
            (folder / target.name).mkdir()
            yield folder / target.name
            storage.upload(folder / target.name, target)
        return
    directory = _place(directory)
    check_directory(directory)
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
            if replace:
                for item in items:
                    item.replace(directory / item.name)
                return
            named: list[pathlib.Path] = []
            try:
                for item in items:
                    _name(item, directory / item.name)
                    named.append(directory / item.name)
            except BaseException:
                for path in named:
                    path.unlink()
                raise


def _name(temporary: pathlib.Path, path: pathlib.Path) -> None:
    """Gives a temporary file its name. If the name is taken, also by a file of this moment, raises `Emu3Error`."""
    try:
        try:
            os.link(temporary, path)  # unlike a rename, this fails if `path` exists
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # A file system without hard links. An empty file takes the name first: only one process can make it.
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            temporary.replace(path)
    except FileExistsError as error:
        raise Emu3Error(f"{path} exists already: another program wrote it just now; choose another output") from error


@contextlib.contextmanager
def new_directory(target: str | os.PathLike, nbytes: int) -> Iterator[pathlib.Path]:
    """Yields a temporary directory. It is renamed to `target` if the block succeeds, and deleted if it fails.

    Args:
        target: local or in a bucket; must not exist.
        nbytes: disk space that the directory needs, in bytes.

    Raises:
        Emu3Error: `target` exists, its parent cannot be written, or the disk has less than `nbytes` free.
    """
    if storage.is_remote(target):
        with _staged(target) as (folder, place):
            if storage.exists(place):
                raise Emu3Error(f"{place} exists already: choose another name or delete it first")
            _require_space(folder, nbytes, f"the local copy of {place.name}", "set TMPDIR to another disk")
            (folder / place.name).mkdir()
            with _full_disk(place):
                yield folder / place.name
            storage.upload(folder / place.name, place)
        return
    target = _place(target)
    if os.path.lexists(target):
        raise Emu3Error(f"{target} exists already: choose another name or delete it first")
    check_directory(target)
    with _explained(target), _new_parents(target.parent):
        _require_space(target.parent, nbytes, target.name, "choose another disk")
        with _temporary(target, target.parent, is_directory=True) as temporary:
            with _full_disk(target):
                yield temporary
            temporary.chmod(0o777 & ~_umask())
            temporary.rename(target)


def check_directory(directory: str | os.PathLike) -> None:
    """Checks that a directory exists, or that nothing on its path prevents making it. Makes nothing.

    Args:
        directory: local or in a bucket; a bucket is not asked.

    Raises:
        Emu3Error: the directory, or one above it, is a file or a link that leads nowhere.
    """
    if storage.is_remote(directory):
        return
    directory = place = _place(directory)
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not os.path.exists(place):
        raise Emu3Error(
            f"cannot write to {directory}: {place} is a link that leads nowhere; delete it or choose another place"
        )
    if not os.path.isdir(place):
        if place == directory:
            raise Emu3Error(f"{directory} is a file: choose a directory to write to")
        raise Emu3Error(f"cannot write to {directory}: {place} is a file, not a directory; choose another place")


def require_outside(output: str | os.PathLike, *inputs: str | os.PathLike) -> None:
    """Checks that an output is not inside a directory that is read. A new file there would not be in its checksums.

    Args:
        output: path of the output, local or in a bucket. It may be absent.
        inputs: paths that are read, local or in a bucket. Links are followed.

    Raises:
        Emu3Error: `output` is below one of the inputs.
    """
    for read in inputs:
        if any(parent == _real(read) for parent in _real(output).parents):
            raise Emu3Error(f"cannot write {output}: it is inside {read}, which is read; choose a place outside it")


def _real(path: str | os.PathLike) -> pathlib.PurePath:
    """The path without links and `..`, to compare it with others."""
    return pathlib.PurePosixPath(os.fspath(path) if storage.is_remote(path) else os.path.realpath(path))


def _require_space(directory: pathlib.Path, nbytes: int, what: str, remedy: str) -> None:
    free = shutil.disk_usage(directory).free
    if free < nbytes:
        raise Emu3Error(f"{directory} has {_size(free)} free, but {what} needs {_size(nbytes)}: free space or {remedy}")


def is_full(error: BaseException) -> bool:
    """Whether the error reports a full disk, quota or file size limit. TensorStore reports it as a `ValueError`."""
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
    """Yields a local temporary directory, and deletes it after the block. `TMPDIR` chooses the disk."""
    parent = pathlib.Path(tempfile.gettempdir())
    with _explained(parent), _temporary(parent / "directory", parent, is_directory=True, named=False) as folder:
        yield folder


@contextlib.contextmanager
def _staged(path: str | os.PathLike) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """Yields a local temporary directory for a result, and the path in the bucket that it will be uploaded to."""
    target = storage.place(path)
    with local_directory() as folder:
        yield folder, target


def _place(path: str | os.PathLike) -> pathlib.Path:
    """Resolves `..` in an output path. In `new/../out`, the directory `new` must not be made."""
    path = local_path(path)
    return pathlib.Path(os.path.realpath(path)) if ".." in path.parts else path


@contextlib.contextmanager
def _explained(path: pathlib.Path) -> Iterator[None]:
    """Turns an `OSError` of the block, which writes `path`, into a one-line `Emu3Error`.

    An error that names an unrelated file came from reading that file, so the message names that file.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        given = _given(path)
        if error.errno in _FULL:
            raise Emu3Error(f"cannot write {given}: {reason}; free space or choose another place") from error
        culprit = error.filename2 or error.filename
        named = None if culprit is None or isinstance(culprit, int) else pathlib.Path(os.fsdecode(culprit))
        ours = named is None or named in (path, path.parent) or any(part.startswith(_PREFIX) for part in named.parts)
        if ours or named in path.parents:
            raise Emu3Error(f"cannot write {given}: {reason}; choose another place") from error
        raise Emu3Error(f"cannot use {named}: {reason}") from error


def _given(path: pathlib.Path) -> pathlib.Path:
    """The path that the user gave for a path in a temporary directory. Other paths stay as they are."""
    for parent in path.parents:
        if (target := _live.get(parent)) is not None:
            return target / path.relative_to(parent)
    return path


@contextlib.contextmanager
def _new_parents(directory: pathlib.Path) -> Iterator[None]:
    """Makes a directory and its parents. If the block fails, removes the directories that it made."""
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
            with contextlib.suppress(OSError):  # another process has put files there
                made.rmdir()
        raise


# ------------------------------------------------------------------------------------------------ temporaries


@contextlib.contextmanager
def _temporary(
    target: pathlib.Path, parent: pathlib.Path, *, is_directory: bool = False, named: bool = True
) -> Iterator[pathlib.Path]:
    """Yields a temporary file or directory in `parent`, locked by this process. Deletes it after the block.

    A block that renames it keeps the result. If `named`, error lines name the target in place of what is temporary.
    """
    _sweep_once(parent)
    temporary, descriptor = _make(parent, target.suffix if len(target.suffix) < 16 else "", is_directory)
    with _lock:
        _live[temporary] = target if named else temporary
    try:
        yield temporary
    finally:
        remove(temporary)
        os.close(descriptor)
        with _lock:
            del _live[temporary]


def _make(parent: pathlib.Path, suffix: str, is_directory: bool) -> tuple[pathlib.Path, int]:
    """Makes a temporary file or directory. Returns its path, and the file descriptor that holds its lock."""
    while True:
        if is_directory:
            name = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
            descriptor = os.open(name, os.O_RDONLY)
        else:
            descriptor, name = tempfile.mkstemp(prefix=_PREFIX, suffix=suffix, dir=parent)
        with contextlib.suppress(OSError):  # a file system without locks, where `sweep` removes nothing either
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The `sweep` of another process may have deleted it before it was locked. Then make another one.
        with contextlib.suppress(OSError):
            if os.stat(name).st_ino == os.fstat(descriptor).st_ino:
                return pathlib.Path(name), descriptor
        os.close(descriptor)


def remove(temporary: pathlib.Path) -> None:
    """Removes a file, a link, or a directory with its contents. Ignores errors."""
    if temporary.is_dir() and not temporary.is_symlink():
        _removed.add(temporary)
        for _ in range(20):
            shutil.rmtree(temporary, ignore_errors=True)
            if not temporary.exists():
                break
            time.sleep(0.05)  # after Ctrl-C, threads of a library may still write files into it for a moment
    else:
        with contextlib.suppress(OSError):
            temporary.unlink()


def remove_temporaries() -> None:
    """Removes all temporary files and directories of this process. Call it before `os._exit`, which runs no cleanup.

    After Ctrl-C, a thread of a library may make a directory again that was removed, so those are looked at once more.
    """
    with _lock:
        for temporary in [*_live, *_removed]:
            remove(temporary)


def sweep(directory: str | os.PathLike) -> list[pathlib.Path]:
    """Removes the temporary files and directories of killed runs from `directory`, and returns their paths.

    Ignores errors: an unreadable directory counts as empty.
    """
    removed = []
    try:
        candidates = [entry.path for entry in os.scandir(os.fspath(directory)) if entry.name.startswith(_PREFIX)]
    except OSError:
        return []
    for name in candidates:
        with contextlib.suppress(OSError):  # its process still runs, another process removed it, or access is denied
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(pathlib.Path(name))
                removed.append(pathlib.Path(name))
            finally:
                os.close(descriptor)
    return removed


def clean(path: str | os.PathLike) -> list[pathlib.Path]:
    """Removes leftovers of killed runs from the directory `path` and from its parent, and returns their paths.

    Leftovers are temporary files and directories, and files `.NAME.PID.tmp` that version 0.1.0 wrote. In the parent,
    such a file of version 0.1.0 is removed only if NAME is the name of `path`. `path` itself may be absent: a killed
    run may have left its temporary directory only.
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
        _log.warning("removed %s, a leftover of a killed run", leftover)


@contextlib.contextmanager
def shared_directory(directory: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Makes a directory that several processes may write to. If the block fails, removes it if it is new and empty.

    Raises:
        Emu3Error: `directory` is a file, or cannot be made or written.
    """
    if storage.is_remote(directory):
        place = storage.place(directory)
        storage.require_directory(place)
        yield place
        return
    directory = _place(directory)
    check_directory(directory)
    with _explained(directory), _new_parents(directory):
        yield directory


def _size(nbytes: int) -> str:
    if nbytes >= 1e10:
        return f"{nbytes / 1e9:.2f} GB"
    return f"{nbytes / 1e6:,.2f} MB" if nbytes >= 1e6 else f"{nbytes:,} bytes"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

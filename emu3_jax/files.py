"""Writing all or nothing: everything goes to a temporary name and is renamed at the end."""

import contextlib
import errno
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from emu3_jax.errors import Emu3Error


@contextlib.contextmanager
def _explained(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise Emu3Error(f"cannot write {path}: {reason}; free space or choose another place") from error


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary sibling of `path` that takes its name when the block ends well, and vanishes otherwise.

    Raises:
        Emu3Error: if the place cannot be written (no such directory, a full disk, ...).
    """
    path = pathlib.Path(path)
    with _explained(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = pathlib.Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def files_into(directory: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary directory whose files move into `directory` when the block ends well.

    Files of the same names are replaced; nothing moves unless everything was written.
    """
    directory = pathlib.Path(directory)
    if directory.exists() and not directory.is_dir():
        raise Emu3Error(f"{directory} is a file: choose a directory to write to")
    with _explained(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        try:
            yield temporary
            directory.mkdir(exist_ok=True)
            for item in sorted(temporary.iterdir()):
                item.replace(directory / item.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def new_directory(target: pathlib.Path, nbytes: int) -> Iterator[pathlib.Path]:
    """A temporary sibling that becomes `target` when the block succeeds, and vanishes when it does not.

    Raises:
      Emu3Error: `target` exists, its parent cannot be written, or the disk has less than `nbytes` left.
    """
    if target.exists():
        raise Emu3Error(f"{target} exists already: choose another name or delete it first")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < nbytes:
            raise Emu3Error(
                f"{target.parent} has {_gigabytes(free)} free, {target.name} needs {_gigabytes(nbytes)}: "
                "free space or choose another disk"
            )
        temporary.mkdir()
        try:
            yield temporary
            temporary.rename(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except Emu3Error:
        raise
    except (OSError, ValueError) as error:  # TensorStore reports a full disk as a ValueError
        full = getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)
        if full:
            raise Emu3Error(
                f"{target}: the disk is full; nothing was kept; free space or choose another disk"
            ) from error
        if isinstance(error, OSError):
            raise Emu3Error(f"{target}: cannot be written ({error}); choose another place") from error
        raise


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""Copies files and folders to a bucket and from a bucket to the local cache, and deletes them from a bucket."""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import local_path
from emu3_jax.progress import Progress
from emu3_jax.storage.objects import Item, delete_object, listing, look_up, place, size
from emu3_jax.storage.paths import split
from emu3_jax.storage.requests import client, explained

# Readers of a result look for these files first. They mark it as complete: they are uploaded last, and deleted first.
_LAST = ("config.json", "index.json", "model.safetensors.index.json", "run.json", "SHA256SUMS")
_THREADS = 8  # concurrent requests
_PATIENCE = 2.0  # seconds before a copy shows a bar
_PART = ".emu3-tmp-"


def upload(source: Path, target: str | os.PathLike, progress: bool | None = None) -> None:
    """Uploads a local file or directory. Replaces objects with the same names.

    Files that mark a result as complete (`_LAST`) are uploaded last. If the upload of a directory fails, the objects
    that it added are deleted.

    Args:
        source: local file or directory.
        target: path in a bucket.
        progress: `show` of `progress.Progress`.

    Raises:
        Emu3Error: the bucket does not exist, or cannot be written or reached.
    """
    if source.is_file():
        with explained(target):
            client().put_file(os.fspath(source), os.fspath(target))
        return
    local = {file.relative_to(source).as_posix(): file for file in sorted(source.rglob("*")) if file.is_file()}
    old = listing(target)
    done: list[str] = []
    total = sum(file.stat().st_size for file in local.values())
    bar = Progress(progress, total, "bytes", name="upload", delay=_PATIENCE)

    def put(name: str) -> None:
        client().put_file(os.fspath(local[name]), f"{os.fspath(target)}/{name}")
        done.append(name)
        bar.update(local[name].stat().st_size)

    try:
        with bar, explained(target):
            for names in _in_turn(local):
                _each(put, names)
    except BaseException:
        with contextlib.suppress(Emu3Error):
            _delete(target, [name for name in done if name not in old])
        raise


def _in_turn(names: Iterable[str]) -> Iterator[list[str]]:
    """Groups file names in upload order: first all names that are not in `_LAST`, then `_LAST` in order.

    Files with the same name in `_LAST` are ordered from the deepest directory to the top.
    """
    names = list(names)

    def last(name: str) -> tuple[int, int]:
        path = PurePosixPath(name)
        return (_LAST.index(path.name), -len(path.parts)) if path.name in _LAST else (-1, 0)

    for rank in sorted({last(name) for name in names}):
        yield [name for name in names if last(name) == rank]


def _each(step: Callable[[str], None], names: list[str]) -> None:
    """Calls `step` for each name, in several threads. After an error, no further calls begin."""
    pool = concurrent.futures.ThreadPoolExecutor(_THREADS)
    try:
        for _ in pool.map(step, names):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def delete(path: str | os.PathLike) -> None:
    """Deletes an object and all objects below it, if any. Deletes files that mark a result as complete first."""
    _delete(path, list(listing(path)))
    with explained(path), contextlib.suppress(FileNotFoundError):
        delete_object(path)


def _delete(path: str | os.PathLike, names: list[str]) -> None:
    def step(name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            delete_object(f"{os.fspath(path)}/{name}")

    with explained(path):
        for group in reversed(list(_in_turn(names))):
            _each(step, group)


def cache_directory() -> Path:
    """The directory for local copies: `EMU3_JAX_CACHE`, or else `emu3_jax` in the user's cache directory."""
    chosen = os.environ.get("EMU3_JAX_CACHE")
    if chosen:
        return local_path(chosen)
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # HOME is not set, and the system does not know the user
        raise Emu3Error("no home directory for local copies of files in buckets: set EMU3_JAX_CACHE") from error
    return base / "emu3_jax"


def fetched(
    path: str | os.PathLike, keep: Callable[[str], bool] = lambda name: True, progress: bool | None = None
) -> Path:
    """Copies a folder from a bucket to the local cache. Files that the cache already holds are not copied again.

    The name of the copy is a hash of the objects' generations. So a folder that has changed gets a new copy.

    Args:
        path: the folder in the bucket.
        keep: whether to copy an object, given its path below the folder.
        progress: `show` of `progress.Progress`.

    Returns:
        The local directory.

    Raises:
        Emu3Error: the folder holds nothing to copy or cannot be read, or the cache cannot be written.
    """
    folder = Folder(path, keep)
    folder.fetch(*folder.found, progress=progress)
    return folder.copy


class Folder:
    """A folder in a bucket, whose files are copied to the local cache when they are needed.

    The name of the copy is a hash of the objects' generations. So a folder that has changed gets a new copy.

    Attributes:
        path: the folder in the bucket.
        copy: the local directory.
        found: the objects of the folder, by their paths below it.
    """

    def __init__(self, path: str | os.PathLike, keep: Callable[[str], bool] = lambda name: True):
        """Lists the folder. Raises an `Emu3Error` if it cannot be read, or if `keep` is true for nothing in it."""
        self.path = place(path)
        self.found = {name: item for name, item in listing(self.path).items() if keep(name)}
        if not self.found:
            raise Emu3Error(f"{self.path}: the bucket holds nothing with this name; correct the path")
        digest = hashlib.sha256(json.dumps([os.fspath(self.path), self.found]).encode()).hexdigest()[:20]
        self.copy = cache_directory() / "buckets" / digest / self.path.name

    def size(self, name: str) -> int:
        """Number of bytes of a file; 0 if it is not in the folder."""
        return self.found[name].size if name in self.found else 0

    def fetch(self, *names: str, progress: bool | None = None) -> None:
        """Copies files that are in the folder and not in the cache yet. `progress` is `show` of `progress.Progress`.

        Raises:
            Emu3Error: a file cannot be read, or the cache cannot be written.
        """
        wanted = [name for name in names if name in self.found]
        missing = [name for name in wanted if size(self.copy / name) != self.found[name].size]
        total = sum(self.found[name].size for name in missing)
        bar = Progress(progress, total, "bytes", name="download", delay=_PATIENCE)

        def get(name: str) -> None:
            _get(self.path / name, self.copy / name, self.found[name])
            bar.update(self.found[name].size)

        with bar, explained(self.path):
            _each(get, missing)


def download(source: str | os.PathLike, target: Path) -> None:
    """Copies one object to a local file, all or nothing. Raises `Emu3Error` if the copy fails."""
    with explained(source):
        found = look_up(source)
        if found is None:
            raise FileNotFoundError(source)
        _get(place(source), target, Item(int(found["size"]), str(found["generation"])))


def _get(source: Path, target: Path, item: Item) -> None:
    """Copies one object, all or nothing. `item` is its size and generation from the listing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=_PART, dir=target.parent)
    os.close(descriptor)
    try:
        bucket, inner = split(source)
        if item.size:
            client().get_file(f"{bucket}/{inner}", name)
        got = os.stat(name).st_size
        if got != item.size:
            raise Emu3Error(f"{source}: got {got} of {item.size} bytes: run again while nothing writes to it")
        os.replace(name, target)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)


def of_original(path: Path, copy: Path, inner: Path) -> str:
    """Translates `inner`, a file in the local copy `copy`, to its path in the bucket below `path`."""
    return f"{os.fspath(path)}/{inner.relative_to(copy).as_posix()}"

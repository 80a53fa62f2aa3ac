"""Paths in buckets, `gs://BUCKET/PATH`. This module is the one place that knows them.

Outputs: `files` writes them to a local temporary directory, as any output, and uploads them when they are whole. The
files that mark a result as complete go last (`_LAST`), so that nothing half-uploaded is taken for whole.
Bundles: `fetched` copies the small files to a local cache. Orbax and TensorStore read the weights from the bucket.
Prepared data: `fetched` copies them to the cache, for ArrayRecord reads local files alone.
Runs: Orbax writes checkpoints straight to the bucket. Metrics and curves are written locally, and uploaded at each
checkpoint. A bucket has no locks that end with their process, so `held` keeps one alive by renewing it.
All other uses, and all other schemes, are refused by `foreign.local_path`.

gcsfs sends the requests. `etils.epath`, which Orbax uses, finds it too. Without the extra `gcs` there is no gcsfs, and
paths in buckets are refused in one line.
"""

import concurrent.futures
import contextlib
import errno
import fnmatch
import functools
import hashlib
import json
import logging
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, cast

from emu3_jax import foreign
from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import AGAIN, MAX_JSON_BYTES, inner_path, limit, local_path, parse_json
from emu3_jax.printable import shown
from emu3_jax.progress import Progress

_SCHEME = "gs://"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_MAX_NAME = 1024  # bytes of an object's name
_MAX_OBJECTS = 1_000_000  # below a folder
_SPECIAL = re.compile(r"[*?\[\]#\x00-\x1f\x7f]")  # gcsfs takes some of these for patterns and versions
# Whoever reads a result looks for these first: they are uploaded last, and deleted first.
_LAST = ("config.json", "index.json", "model.safetensors.index.json", "run.json", "SHA256SUMS")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_THREADS = 8  # requests at once
_BEAT = 15.0  # seconds between two renewals of a lock
_LOOKS, _LOOK = 9, 5.0  # how often, and seconds apart, a lock is seen without a renewal until it counts as left behind
_PATIENCE = 2.0  # seconds that a copy takes before it shows a bar
_PART = ".emu3-tmp-"
_DENIED = (
    "access is denied: log in with `gcloud auth application-default login`, or give the service account of this "
    "machine the role Storage Object User of the bucket"
)
_log = logging.getLogger("emu3_jax")
_mine: set[str] = set()  # locks that this process holds


class Item(NamedTuple):
    """An object: its bytes, and the generation that a bucket gives to each version of it."""

    size: int
    generation: str


# ------------------------------------------------------------------------------------------------ paths


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path lies in a bucket."""
    text = os.fspath(path)
    return isinstance(text, str) and text.startswith(_SCHEME)


def check_place(path: str | os.PathLike) -> None:
    """Raises an `Emu3Error` unless `path` is a legal local path, or one in a bucket. Nothing is looked up."""
    if not is_remote(path):
        local_path(path)
        return
    text = os.fspath(path)
    bucket, _, name = text.removeprefix(_SCHEME).partition("/")
    name = name.rstrip("/")
    if not _BUCKET.fullmatch(bucket):
        raise Emu3Error(f"{shown(text)}: {shown(bucket)} is not the name of a bucket; give gs://BUCKET/PATH")
    if not name:
        raise Emu3Error(f"{shown(text)}: it names a bucket alone; give gs://BUCKET/PATH")
    if _SPECIAL.search(name) or name != name.encode(errors="replace").decode():
        raise Emu3Error(f"{shown(text)}: its path has one of * ? [ ] # or a control character; choose another name")
    if len(name.encode()) > _MAX_NAME or any(part in ("", ".", "..") for part in name.split("/")):
        raise Emu3Error(f"{shown(text)}: its path is longer than {_MAX_NAME} bytes, or has an empty part, . or ..")


def place(path: str | os.PathLike) -> Path:
    """A path of the user's that may lie in a bucket: a local path unchanged, otherwise an `etils.epath.Path`.

    Raises:
        Emu3Error: as `check_place`; or gcsfs is not installed.
    """
    check_place(path)
    if not is_remote(path):
        return local_path(path)
    _gcsfs()
    from etils import epath

    return cast(Path, epath.Path(os.fspath(path).rstrip("/")))


def storage_place(path: str | os.PathLike) -> Path:
    """The same as Orbax and TensorStore take it, see `foreign.storage_path`."""
    return place(path) if is_remote(path) else foreign.storage_path(path)


def kvstore(directory: str | os.PathLike) -> dict[str, Any]:
    """The specification of a directory for TensorStore's key-value stores."""
    if not is_remote(directory):
        return {"driver": "file", "path": f"{os.fspath(directory)}/"}
    bucket, name = _split(directory)
    return {"driver": "gcs", "bucket": bucket, "path": f"{name}/"}


def _split(path: str | os.PathLike) -> tuple[str, str]:
    """Bucket, and name of the object."""
    bucket, _, name = os.fspath(path).removeprefix(_SCHEME).partition("/")
    return bucket, name.rstrip("/")


# ------------------------------------------------------------------------------------------------ requests


@functools.cache
def _gcsfs() -> Any:
    """gcsfs's file system."""
    _check_emulator()
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # gRPC, which emulators do not speak
    try:
        import gcsfs  # noqa: F401
    except ImportError as missing:
        raise Emu3Error(
            "paths with gs:// need gcsfs, which is not installed: pip install 'emu3-jax[gcs]', or give a local path"
        ) from missing
    import fsspec
    import fsspec.config

    for name in ("gcsfs", "google.auth"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what fails is told in one line
    # Listings that are kept would hide what other hosts write. Orbax's instance reads this too.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return fsspec.filesystem("gcs")


def _check_emulator() -> None:
    """Raises an `Emu3Error` unless all requests go to one place. TensorStore tries another one for many minutes."""
    names = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")
    gcsfs, tensorstore = (os.environ.get(name, "") for name in names)
    if gcsfs.rstrip("/") != tensorstore.rstrip("/"):
        found = " and ".join(f"{name} is {shown(os.environ[name])}" for name in names if name in os.environ)
        raise Emu3Error(
            f"{found}: {names[0]} and {names[1]} must name one emulator: set both to http://HOST:PORT, or neither"
        )


@contextlib.contextmanager
def explained(path: str | os.PathLike) -> Iterator[None]:
    """For a block that uses a bucket: whatever fails there is one line that begins with `path`."""
    try:
        yield
    except (Emu3Error, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except Exception as error:  # of gcsfs, and of the three libraries that it calls
        raise Emu3Error(f"{os.fspath(path)}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such bucket, or nothing of this name in it; correct the path"
    if isinstance(error, OSError) and error.errno in _FULL:
        return f"{error.strerror} ({error.filename}); free space, or choose another cache with EMU3_JAX_CACHE"
    return _of_access(error) or (
        f"Cloud Storage answered {type(error).__name__} ({_first_line(error)}): mend that and run again"
    )


def _first_line(error: BaseException) -> str:
    return f"{error!s}".strip().split("\n", 1)[0][:160]


def _of_access(error: BaseException) -> str | None:
    """The reason where a bucket may not be used or cannot be reached, else None."""
    text, kind = _first_line(error), type(error).__module__.split(".")[0]
    denied = re.search(r"^Forbidden|PERMISSION_DENIED|UNAUTHENTICATED|Anonymous caller", text)
    if isinstance(error, PermissionError) or denied or str(getattr(error, "code", "")) in ("401", "403"):
        return _DENIED
    if isinstance(error, (ConnectionError, TimeoutError)) or kind in ("aiohttp", "requests") or "UNAVAILABLE" in text:
        return f"Cloud Storage cannot be reached ({text or type(error).__name__}): check the network and run again"
    return _DENIED if kind == "google" else None


def require_access(path: str | os.PathLike, error: BaseException) -> None:
    """To be called before an error of Orbax is told as damage.

    Raises:
        Emu3Error: `path` lies in a bucket, and the bucket is to blame, as without a network.
    """
    for cause in (error, error.__cause__):
        reason = _of_access(cause) if cause is not None and is_remote(path) else None
        if reason:
            raise Emu3Error(f"{os.fspath(path)}: {reason}") from error


def _object(path: str | os.PathLike) -> dict[str, Any] | None:
    """What the bucket says of one object; None where there is none."""
    bucket, name = _split(path)
    try:
        return _gcsfs().call("GET", "b/{}/o/{}", bucket, name, json_out=True)
    except FileNotFoundError:
        return None


def listing(path: str | os.PathLike) -> dict[str, Item]:
    """The objects below a folder, by their paths below it, in order.

    Raises:
        Emu3Error: there is no such bucket, it cannot be read, or a name in it could lead elsewhere.
    """
    bucket, name = _split(path)
    found: dict[str, Item] = {}
    page = None
    with explained(path):
        while True:
            query = {"prefix": f"{name}/", "pageToken": page, "fields": "items(name,size,generation),nextPageToken"}
            answer = _gcsfs().call("GET", "b/{}/o", bucket, json_out=True, **query)
            for item in answer.get("items", []):
                inner = item["name"].removeprefix(f"{name}/")
                if not inner or inner.endswith("/"):  # what the console makes for an empty folder
                    continue
                found[inner_path(inner, os.fspath(path))] = Item(int(item["size"]), str(item["generation"]))
            limit(path, "objects", len(found), _MAX_OBJECTS)
            page = answer.get("nextPageToken")
            if page is None:
                return dict(sorted(found.items()))


def exists(path: str | os.PathLike) -> bool:
    """Whether there is a file or a directory, or an object of this name or below it. Raises as `listing`."""
    if not is_remote(path):
        return os.path.lexists(path)
    return bool(listing(path)) or is_file(path)


def matching(directory: Path, pattern: str) -> list[Path]:
    """The files of a directory whose names match a pattern such as `*.json`, in order."""
    if not is_remote(directory):
        return sorted(directory.glob(pattern))
    return [directory / name for name in listing(directory) if "/" not in name and fnmatch.fnmatchcase(name, pattern)]


def unlink(file: Path) -> None:
    """Deletes a file or object, if it is there."""
    if not is_remote(file):
        file.unlink(missing_ok=True)
        return
    with explained(file), contextlib.suppress(FileNotFoundError):
        _delete_object(file)


def require_directory(path: str | os.PathLike) -> None:
    """Raises an `Emu3Error` where a place in a bucket cannot be looked at, or is a file."""
    listing(path)
    if is_file(path):
        raise Emu3Error(f"{os.fspath(path)} is a file: choose a directory to write to")


def is_file(path: str | os.PathLike) -> bool:
    """Whether there is a file, or an object of this name. Raises as `listing` where a bucket cannot be read."""
    if not is_remote(path):
        return Path(path).is_file()
    with explained(path):
        return _object(path) is not None


def size(path: str | os.PathLike) -> int | None:
    """Bytes of a file or object; None where it is not there."""
    if not is_remote(path):
        return Path(path).stat().st_size if Path(path).is_file() else None
    with explained(path):
        found = _object(path)
    return None if found is None else int(found["size"])


def read_json(path: str | os.PathLike, remedy: str = AGAIN) -> Any:
    """`foreign.read_json`, of an object too. An absent one is an `Emu3Error` whose cause is `FileNotFoundError`."""
    if not is_remote(path):
        return foreign.read_json(path, remedy)
    with explained(path):
        found = _object(path)
        if found is None:
            raise FileNotFoundError(path)
        limit(path, "bytes", int(found["size"]), MAX_JSON_BYTES)
        text = _gcsfs().cat_file(os.fspath(path))
    return parse_json(text, path, remedy)


# ------------------------------------------------------------------------------------------------ uploads


def upload(source: Path, target: str | os.PathLike, progress: bool | None = None) -> None:
    """Uploads a local file, or a directory with all that it holds. Objects of the same names are replaced.

    What marks a result as complete goes last. Where an upload fails, what came new with it is deleted again.

    Args:
        source: local.
        target: in a bucket.
        progress: as `progress.Progress` takes it.

    Raises:
        Emu3Error: the bucket is absent, or cannot be written or reached.
    """
    if source.is_file():
        with explained(target):
            _gcsfs().put_file(os.fspath(source), os.fspath(target))
        return
    local = {file.relative_to(source).as_posix(): file for file in sorted(source.rglob("*")) if file.is_file()}
    old = listing(target)
    done: list[str] = []
    total = sum(file.stat().st_size for file in local.values())
    bar = Progress(progress, total, "bytes", name="upload", delay=_PATIENCE)

    def put(name: str) -> None:
        _gcsfs().put_file(os.fspath(local[name]), f"{os.fspath(target)}/{name}")
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
    """The names in groups: what marks a result as complete comes last, of it what lies deepest first."""
    names = list(names)

    def last(name: str) -> tuple[int, int]:
        path = PurePosixPath(name)
        return (_LAST.index(path.name), -len(path.parts)) if path.name in _LAST else (-1, 0)

    for rank in sorted({last(name) for name in names}):
        yield [name for name in names if last(name) == rank]


def _each(step: Callable[[str], None], names: list[str]) -> None:
    """Takes a step for each name, several at once. After an error no new ones begin."""
    pool = concurrent.futures.ThreadPoolExecutor(_THREADS)
    try:
        for _ in pool.map(step, names):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def delete(path: str | os.PathLike) -> None:
    """Deletes an object, and all below it, if there are any: what marks a result as complete first."""
    _delete(path, list(listing(path)))
    with explained(path), contextlib.suppress(FileNotFoundError):
        _delete_object(path)


def _delete(path: str | os.PathLike, names: list[str]) -> None:
    def step(name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            _delete_object(f"{os.fspath(path)}/{name}")

    with explained(path):
        for group in reversed(list(_in_turn(names))):
            _each(step, group)


def _delete_object(path: str | os.PathLike, **condition: str) -> None:
    bucket, name = _split(path)
    _gcsfs().call("DELETE", "b/{}/o/{}", bucket, name, **condition)


# ------------------------------------------------------------------------------------------------ copies


def cache_directory() -> Path:
    """Where copies are kept: `EMU3_JAX_CACHE`, else `emu3_jax` in the user's cache directory."""
    chosen = os.environ.get("EMU3_JAX_CACHE")
    if chosen:
        return local_path(chosen)
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # no HOME, and a user that the system does not know
        raise Emu3Error("there is no home directory for copies of what is in buckets: set EMU3_JAX_CACHE") from error
    return base / "emu3_jax"


def fetched(
    path: str | os.PathLike, keep: Callable[[str], bool] = lambda name: True, progress: bool | None = None
) -> Path:
    """A local copy of a folder of a bucket. What is there already is not fetched again.

    A copy has the generations of its objects in its name: a folder that changed gets a new copy.

    Args:
        path: the folder.
        keep: whether an object is fetched, by its path below the folder.
        progress: as `progress.Progress` takes it.

    Raises:
        Emu3Error: there is nothing to fetch, it cannot be read, or the cache cannot be written.
    """
    path = place(path)
    found = {name: item for name, item in listing(path).items() if keep(name)}
    if not found:
        raise Emu3Error(f"{path}: there is nothing of this name in the bucket; correct the path")
    digest = hashlib.sha256(json.dumps([os.fspath(path), found]).encode()).hexdigest()[:20]
    copy = cache_directory() / "buckets" / digest / path.name
    missing = [name for name, item in found.items() if size(copy / name) != item.size]
    total = sum(found[name].size for name in missing)
    bar = Progress(progress, total, "bytes", name="download", delay=_PATIENCE)

    def get(name: str) -> None:
        _get(path / name, copy / name, found[name])
        bar.update(found[name].size)

    with bar, explained(path):
        _each(get, missing)
    return copy


def download(source: str | os.PathLike, target: Path) -> None:
    """Copies one object to a local file, whole or not at all. Raises `Emu3Error` where that fails."""
    with explained(source):
        found = _object(source)
        if found is None:
            raise FileNotFoundError(source)
        _get(place(source), target, Item(int(found["size"]), str(found["generation"])))


def _get(source: Path, target: Path, item: Item) -> None:
    """Copies one version of an object, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=_PART, dir=target.parent)
    os.close(descriptor)
    try:
        bucket, inner = _split(source)
        if item.size:
            _gcsfs().get_file(f"{bucket}/{inner}", name)
        got = os.stat(name).st_size
        if got != item.size:
            raise Emu3Error(f"{source}: {got} bytes came, the bucket lists {item.size}: it changes, or run again")
        os.replace(name, target)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)


def of_original(path: Path, copy: Path, inner: Path) -> str:
    """The path in a bucket of a file of its copy."""
    return f"{os.fspath(path)}/{inner.relative_to(copy).as_posix()}"


# ------------------------------------------------------------------------------------------------ locks


@contextlib.contextmanager
def held(file: str | os.PathLike, busy: Callable[[str], str]) -> Iterator[None]:
    """Holds a lock object for this process, which renews it until the block ends; then it is deleted.

    One that nobody renews, or that a dead process of this host left, is taken over.

    Args:
        file: the object.
        busy: from who holds it, an error line.

    Raises:
        Emu3Error: another process holds it, or the bucket cannot be written.
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
        with contextlib.suppress(Exception):  # the next run takes it over
            _delete_object(key, ifGenerationMatch=generation)


def _create(key: str) -> str | None:
    """Makes the lock, and returns its generation; None where it is there already."""
    holder = json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode()
    try:
        _gcsfs().pipe_file(key, holder, mode="create")
    except FileExistsError:
        return None
    found = _object(key)
    return None if found is None else str(found["generation"])


def _await_end(key: str, busy: Callable[[str], str]) -> None:
    """Deletes a lock that was left behind. Raises the error of `busy` where its process lives."""
    first = _object(key)
    if first is None:
        return
    try:
        said = json.loads(_gcsfs().cat_file(key))
        host, process = str(said["host"]), int(said["process"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        host, process = "", 0
    holder = f"process {process} on {host}" if host else "another process"
    if not (host == socket.gethostname() and _ended(process)):
        _log.warning("%s is held by %s; waiting %.0f s to see whether it lives", key, holder, _LOOKS * _LOOK)
        for _ in range(_LOOKS):
            time.sleep(_LOOK)
            now = _object(key)
            if now is None:
                return
            if (now["generation"], now["metageneration"]) != (first["generation"], first["metageneration"]):
                raise Emu3Error(busy(holder))
    with contextlib.suppress(FileNotFoundError, FileExistsError):  # another process was faster
        _delete_object(key, ifGenerationMatch=str(first["generation"]))


def _ended(process: int) -> bool:
    """Whether no process of this host has that number. Our own: a container that started again has its numbers anew."""
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
    bucket, name = _split(key)
    beat = 0
    while not done.wait(_BEAT):
        beat += 1
        note = {"metadata": {"beat": str(beat)}}
        try:
            _gcsfs().call("PATCH", "b/{}/o/{}", bucket, name, json=note, ifGenerationMatch=generation)
        except (FileNotFoundError, FileExistsError):
            _log.warning("%s was taken away: another run may write there too; stop one of the two", key)
            return
        except Exception as error:  # the network; the next one may come through
            _log.debug("%s was not renewed: %s", key, error)

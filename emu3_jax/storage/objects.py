"""Functions for single files that accept local paths and paths in buckets alike."""

import contextlib
import fnmatch
import os
from pathlib import Path
from typing import Any, NamedTuple, cast

from emu3_jax import foreign
from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import AGAIN, MAX_JSON_BYTES, inner_path, limit, local_path, parse_json
from emu3_jax.storage.paths import check_place, is_remote, split
from emu3_jax.storage.requests import client, explained

_MAX_OBJECTS = 1_000_000  # in a folder


class Item(NamedTuple):
    """Size of an object in bytes, and its generation, a number that differs for every version of the object."""

    size: int
    generation: str


def place(path: str | os.PathLike) -> Path:
    """Checks a user's path that may be local or in a bucket.

    Returns:
        A local path unchanged; a path in a bucket as an `etils.epath.Path`.

    Raises:
        Emu3Error: as `check_place`; or the path is in a bucket and gcsfs is not installed.
    """
    check_place(path)
    if not is_remote(path):
        return local_path(path)
    client()
    from etils import epath

    return cast(Path, epath.Path(os.fspath(path).rstrip("/")))


def storage_place(path: str | os.PathLike) -> Path:
    """Like `place`, but local paths are resolved for Orbax and TensorStore, see `foreign.storage_path`."""
    return place(path) if is_remote(path) else foreign.storage_path(path)


def look_up(path: str | os.PathLike) -> dict[str, Any] | None:
    """Fetches the metadata of one object. Returns None if it does not exist."""
    bucket, name = split(path)
    try:
        return client().call("GET", "b/{}/o/{}", bucket, name, json_out=True)
    except FileNotFoundError:
        return None


def listing(path: str | os.PathLike) -> dict[str, Item]:
    """Lists all objects below a folder in a bucket.

    Returns:
        The objects, sorted by path. Keys are paths relative to the folder.

    Raises:
        Emu3Error: the bucket does not exist or cannot be read, or an object's name is not a legal file path.
    """
    bucket, name = split(path)
    found: dict[str, Item] = {}
    page = None
    with explained(path):
        while True:
            query = {"prefix": f"{name}/", "pageToken": page, "fields": "items(name,size,generation),nextPageToken"}
            answer = client().call("GET", "b/{}/o", bucket, json_out=True, **query)
            for item in answer.get("items", []):
                inner = item["name"].removeprefix(f"{name}/")
                if not inner or inner.endswith("/"):  # a placeholder that the console makes for an empty folder
                    continue
                found[inner_path(inner, os.fspath(path))] = Item(int(item["size"]), str(item["generation"]))
            limit(path, "objects", len(found), _MAX_OBJECTS)
            page = answer.get("nextPageToken")
            if page is None:
                return dict(sorted(found.items()))


def exists(path: str | os.PathLike) -> bool:
    """Whether a file, directory or object with this name exists, or objects below it. Raises as `listing`."""
    if not is_remote(path):
        return os.path.lexists(path)
    return bool(listing(path)) or is_file(path)


def matching(directory: Path, pattern: str) -> list[Path]:
    """Lists the files in a directory whose names match a pattern such as `*.json`, sorted."""
    if not is_remote(directory):
        return sorted(directory.glob(pattern))
    return [directory / name for name in listing(directory) if "/" not in name and fnmatch.fnmatchcase(name, pattern)]


def unlink(file: Path) -> None:
    """Deletes a file or object, if it exists."""
    if not is_remote(file):
        file.unlink(missing_ok=True)
        return
    with explained(file), contextlib.suppress(FileNotFoundError):
        delete_object(file)


def require_directory(path: str | os.PathLike) -> None:
    """Raises an `Emu3Error` if a path in a bucket cannot be read, or is a file."""
    listing(path)
    if is_file(path):
        raise Emu3Error(f"{os.fspath(path)} is a file: choose a directory to write to")


def is_file(path: str | os.PathLike) -> bool:
    """Whether a file or object with this name exists. Raises an `Emu3Error` if the bucket cannot be read."""
    if not is_remote(path):
        return Path(path).is_file()
    with explained(path):
        return look_up(path) is not None


def size(path: str | os.PathLike) -> int | None:
    """Size of a file or object in bytes; None if it does not exist."""
    if not is_remote(path):
        return Path(path).stat().st_size if Path(path).is_file() else None
    with explained(path):
        found = look_up(path)
    return None if found is None else int(found["size"])


def read_json(path: str | os.PathLike, remedy: str = AGAIN) -> Any:
    """Reads a JSON file or object. Raises as `foreign.read_json`.

    If the file or object does not exist, the cause of the `Emu3Error` is a `FileNotFoundError`.
    """
    if not is_remote(path):
        return foreign.read_json(path, remedy)
    with explained(path):
        found = look_up(path)
        if found is None:
            raise FileNotFoundError(path)
        limit(path, "bytes", int(found["size"]), MAX_JSON_BYTES)
        text = client().cat_file(os.fspath(path))
    return parse_json(text, path, remedy)


def delete_object(path: str | os.PathLike, **condition: str) -> None:
    """Deletes one object, on a condition such as `ifGenerationMatch`. Raises `FileNotFoundError` if it is absent."""
    bucket, name = split(path)
    client().call("DELETE", "b/{}/o/{}", bucket, name, **condition)

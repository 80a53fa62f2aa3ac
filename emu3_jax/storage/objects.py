"""Files and objects one at a time: both sorts of paths go through the same functions."""

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

_MAX_OBJECTS = 1_000_000  # below a folder


class Item(NamedTuple):
    """An object: its bytes, and the generation that a bucket gives to each version of it."""

    size: int
    generation: str


def place(path: str | os.PathLike) -> Path:
    """A path of the user's that may lie in a bucket: a local path unchanged, otherwise an `etils.epath.Path`.

    Raises:
        Emu3Error: as `check_place`; or gcsfs is not installed.
    """
    check_place(path)
    if not is_remote(path):
        return local_path(path)
    client()
    from etils import epath

    return cast(Path, epath.Path(os.fspath(path).rstrip("/")))


def storage_place(path: str | os.PathLike) -> Path:
    """The same as Orbax and TensorStore take it, see `foreign.storage_path`."""
    return place(path) if is_remote(path) else foreign.storage_path(path)


def look_up(path: str | os.PathLike) -> dict[str, Any] | None:
    """What the bucket says of one object; None where there is none."""
    bucket, name = split(path)
    try:
        return client().call("GET", "b/{}/o/{}", bucket, name, json_out=True)
    except FileNotFoundError:
        return None


def listing(path: str | os.PathLike) -> dict[str, Item]:
    """The objects below a folder, by their paths below it, in order.

    Raises:
        Emu3Error: there is no such bucket, it cannot be read, or a name in it could lead elsewhere.
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
        delete_object(file)


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
        return look_up(path) is not None


def size(path: str | os.PathLike) -> int | None:
    """Bytes of a file or object; None where it is not there."""
    if not is_remote(path):
        return Path(path).stat().st_size if Path(path).is_file() else None
    with explained(path):
        found = look_up(path)
    return None if found is None else int(found["size"])


def read_json(path: str | os.PathLike, remedy: str = AGAIN) -> Any:
    """`foreign.read_json`, of an object too. An absent one is an `Emu3Error` whose cause is `FileNotFoundError`."""
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
    bucket, name = split(path)
    client().call("DELETE", "b/{}/o/{}", bucket, name, **condition)

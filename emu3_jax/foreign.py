"""The boundary that foreign bytes cross: files that users bring, and names and values in them.

Every reader of such a file works inside `reading`, which turns whatever it raises into one line. What the file says of
sizes is checked against `limit` before memory is taken. A name becomes a file's only through `file_name`, and a path of
the user's passes `local_path`.
"""

import contextlib
import json
import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emu3_jax.errors import Emu3Error
from emu3_jax.printable import printable, shown

AGAIN = "download or copy it again"
MAX_JSON_BYTES = 64 << 20  # a published tokenizer.json has about 17 MB
# Each value of a JSON text takes up to 100 bytes in memory, and as few as two in the file.
MAX_JSON_VALUES = 4_000_000
_NAME_BYTES = 255  # of a file's name, on every file system in use
_PATH_BYTES = 4096
# `gs://bucket`, and what `pathlib` makes of it: `gs:/bucket`. One letter before `:/` is a drive of Windows.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/|(.*)://", re.DOTALL)
# What to do instead, by the scheme.
_INSTEAD = {
    "gs": "copy it with `gcloud storage cp -r`, or mount the bucket with gcsfuse, and give the local path",
    "s3": "mount the bucket with Mountpoint for S3 (mount-s3), or copy it with `aws s3 cp`, and give the local path",
    "hdfs": "copy it with `hdfs dfs -get`, or mount HDFS by its NFS gateway, and give the local path",
    "hf": "prepare takes hf:NAME, convert a hub id such as BAAI/Emu3-Gen; else download it and give the local path",
    "file": "give the path without file://",
    **dict.fromkeys(("http", "https", "ftp"), "download it, and give the local path"),
    **dict.fromkeys(("az", "abfs", "abfss", "wasbs"), "mount the container with blobfuse2, and give the local path"),
}
# Names of devices on Windows, and of the temporaries of `files`, which the next run would remove.
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?|\.emu3-tmp-.*", re.IGNORECASE)


@contextlib.contextmanager
def reading(path: str | os.PathLike, remedy: str = AGAIN) -> Iterator[None]:
    """For a block that reads a foreign file: whatever it raises becomes an `Emu3Error` that names the file.

    An `Emu3Error` passes as it is: who raises it names the culprit. So do Ctrl-C and the end of the process.

    Args:
        path: of the file; it stands in front of the reason.
        remedy: what to do where the file is damaged.
    """
    try:
        yield
    except (Emu3Error, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except FileNotFoundError as error:
        raise Emu3Error(f"cannot read {path}: there is no such file; correct the name") from error
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise Emu3Error(f"cannot read {path}: {reason}; {remedy}") from error
    except RecursionError as error:
        raise Emu3Error(f"{path} is damaged: it is nested too deeply; {remedy}") from error
    except MemoryError as error:
        raise Emu3Error(f"{path} needs more memory than there is: {remedy}") from error
    except BaseException as error:  # extensions written in Rust raise panics, which are no `Exception`
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise Emu3Error(f"{path} is damaged ({reason:.120}); {remedy}") from error


def limit(path: str | os.PathLike, what: str, found: float, most: float) -> None:
    """Raises an `Emu3Error` where a file claims more of something than is read. To be called before memory is taken.

    Args:
        path: of the file.
        what: with its unit, as in "elements of tensor x".
        found: how many the file claims.
        most: how many are read.
    """
    if found > most:
        raise Emu3Error(f"{path}: {shown(found)} {what}, and at most {most:,} are read: {AGAIN}")


def read_bytes(path: str | os.PathLike, most: int, remedy: str = AGAIN) -> bytes:
    """A whole file of at most `most` bytes. Pipes and devices, which may never end, are refused.

    Raises:
        Emu3Error: it is absent, unreadable, too long, or no plain file.
    """
    with reading(path, remedy):
        plain_file(path)
        limit(path, "bytes", os.stat(path).st_size, most)
        with open(path, "rb") as stream:
            return stream.read(most)


def plain_file(path: str | os.PathLike) -> None:
    """Raises an `Emu3Error` for what is there and is no plain file; an absent one raises `FileNotFoundError`."""
    mode = os.stat(local_path(path)).st_mode
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a pipe or device"
        raise Emu3Error(f"cannot read {path}: it is {kind}; give a file")


def parse_json(text: bytes, path: str | os.PathLike, remedy: str = AGAIN, *, unique: bool = False) -> Any:
    """What a JSON text of a file says.

    Args:
        text: of the file.
        path: of the file.
        remedy: what to do where it is damaged.
        unique: refuses objects in which a name stands twice. Python takes the last one, other readers the first.

    Raises:
        Emu3Error: it is no JSON, nested too deeply, or has too many values to be held.
    """
    limit(path, "bytes of JSON", len(text), MAX_JSON_BYTES)
    limit(path, "values in its JSON", sum(text.count(mark) for mark in b",[{:"), MAX_JSON_VALUES)
    with reading(path, remedy):
        try:
            return json.loads(text, object_pairs_hook=_unique if unique else None)
        except ValueError as error:  # and what is no UTF-8
            raise Emu3Error(f"{path}: not readable as JSON ({error}); {remedy}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in an object")
    return found


def read_json(path: str | os.PathLike, remedy: str = AGAIN) -> Any:
    """What a JSON file says. Raises as `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path, MAX_JSON_BYTES, remedy), path, remedy)


def read_object(path: str | os.PathLike, remedy: str = AGAIN) -> dict[str, Any]:
    """The JSON object that a file holds; anything else in it is an `Emu3Error`, too. Raises as `read_json`."""
    if not os.path.lexists(local_path(path)):
        raise Emu3Error(f"{path}: not found; the directory must hold it: copy it from where its other files came from")
    data = read_json(path, remedy)
    if not isinstance(data, dict):
        raise Emu3Error(f"{path}: holds a JSON {type(data).__name__}, not an object; {remedy}")
    return data


# ------------------------------------------------------------------------------------------------ names and paths


def file_name(name: Any, where: str) -> str:
    """`name`, which foreign data gave, as the name of a file in a directory that was chosen by the user.

    Args:
        name: to be checked.
        where: it was found, in front of the error line.

    Raises:
        Emu3Error: it is no text, empty, a path, too long, the name of a device, or has characters that a terminal would
            act on.
    """
    if not isinstance(name, str):
        raise Emu3Error(f"{where}: the name {shown(name)} is no text: rename it")
    if not name or name in (".", "..") or "/" in name or "\\" in name or _RESERVED.fullmatch(name):
        raise Emu3Error(f"{where}: the name {shown(name)} is not that of a file in a directory: rename it")
    if name != printable(name) or any(unicodedata.category(c) == "Zl" for c in name):
        raise Emu3Error(f"{where}: the name {shown(name)} has control characters: rename it")
    if len(name.encode()) > _NAME_BYTES - 10:  # an ending follows
        raise Emu3Error(f"{where}: the name {shown(name)} is too long for a file: shorten it")
    return name


def local_path(path: str | os.PathLike) -> Path:
    """A path of the user's, unchanged.

    Raises:
        Emu3Error: it is empty; an address such as gs://bucket, which would become a local folder of that name; or no
            file system has a place for it.
    """
    text = os.fspath(path)
    if not text:
        raise Emu3Error("the path is empty: give the name of a file or directory")
    if address := _ADDRESS.match(text):
        scheme = (address[1] or address[2]).rsplit("/", 1)[-1].lower()
        instead = _INSTEAD.get(scheme, "copy or mount it, and give the local path")
        raise Emu3Error(f"{shown(text)}: {printable(scheme)[:20]}:// addresses are not supported here: {instead}")
    if "\0" in text:
        raise Emu3Error(f"the path {shown(text)} has a zero character: no file is named so; correct it")
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError as error:
        raise Emu3Error(f"the path {shown(text)} has half of a character: no file is named so; correct it") from error
    if len(encoded) > _PATH_BYTES or any(len(part) > _NAME_BYTES for part in encoded.split(b"/")):
        raise Emu3Error(
            f"the path {shown(text)} is too long: a name has at most {_NAME_BYTES} bytes, a path {_PATH_BYTES}"
        )
    return Path(path)


def storage_path(path: str | os.PathLike) -> Path:
    """A path of the user's as Orbax, TensorStore and ArrayRecord take it: absolute, links followed, without `..`.

    TensorStore refuses a path with `..` in it, which without this would be told as damage.

    Raises:
        Emu3Error: as `local_path`; or the path is no UTF-8, which these libraries cannot open.
    """
    resolved = os.path.realpath(local_path(path))
    try:
        resolved.encode()
    except UnicodeEncodeError as error:
        raise Emu3Error(f"the path {shown(resolved)} is no UTF-8, and cannot be used for weights: rename it") from error
    return Path(resolved)


def inner_path(name: Any, where: str) -> str:
    """`name`, which foreign data gave, as the path of a file below a directory that was chosen by the user.

    Args:
        name: to be checked: names of files as `file_name` takes them, joined by `/`.
        where: it was found, in front of the error line.

    Raises:
        Emu3Error: it is no text, or leads out of the directory.
    """
    if not isinstance(name, str):
        raise Emu3Error(f"{where}: the name {shown(name)} is no text: rename it")
    if len(name) > _PATH_BYTES:
        raise Emu3Error(f"{where}: the path {shown(name)} is too long: shorten it")
    for part in name.split("/"):
        try:
            file_name(part, where)
        except Emu3Error as error:
            raise Emu3Error(f"{where}: {shown(name)} does not name a file below its directory: rename it") from error
    return name


def step_number(name: str) -> int | None:
    """The whole number that a name spells in the digits 0 to 9 as Python writes it, or None.

    `str.isdigit` is true of `²` too, of which `int` makes an error, and `int` takes the digits of every script.
    """
    return int(name) if re.fullmatch(r"0|[1-9][0-9]{0,17}", name) else None

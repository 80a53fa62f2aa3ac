"""Safe handling of foreign files, and of the names and values that they contain.

Every reader of a foreign file works inside `reading`, which turns any exception into a one-line error. Sizes that a
file claims pass `limit` before memory is allocated. Names from a file pass `file_name` or `inner_path` before they
become paths. Paths that the user gives pass `local_path`.
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
# A JSON value of two bytes in the file can take 100 bytes in memory.
MAX_JSON_VALUES = 4_000_000
_NAME_BYTES = 255  # maximum length of a file name on common file systems
_PATH_BYTES = 4096
# `pathlib` shortens `gs://bucket` to `gs:/bucket`. A single letter before `:/` is a Windows drive, not a scheme.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/|(.*)://", re.DOTALL)
# The remedy for each scheme.
_INSTEAD = {
    "gs": "copy it with `gcloud storage cp -r`, or mount the bucket with gcsfuse, and give the local path",
    "s3": "mount the bucket with Mountpoint for S3 (mount-s3), or copy it with `aws s3 cp`, and give the local path",
    "hdfs": "copy it with `hdfs dfs -get`, or mount HDFS by its NFS gateway, and give the local path",
    "hf": "prepare takes hf:NAME, convert a hub id such as BAAI/Emu3-Gen; else download it and give the local path",
    "file": "give the path without file://",
    **dict.fromkeys(("http", "https", "ftp"), "download it, and give the local path"),
    **dict.fromkeys(("az", "abfs", "abfss", "wasbs"), "mount the container with blobfuse2, and give the local path"),
}
# Windows device names, and names of temporary files of `files`, which the next run would delete.
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?|\.emu3-tmp-.*", re.IGNORECASE)


@contextlib.contextmanager
def reading(path: str | os.PathLike, remedy: str = AGAIN) -> Iterator[None]:
    """Turns any exception of the block, which reads a foreign file, into an `Emu3Error` that names the file.

    An `Emu3Error` passes unchanged, and so do Ctrl-C and exits.

    Args:
        path: path of the file, for the error message.
        remedy: what the user should do if the file is damaged.

    Raises:
        Emu3Error: the block failed.
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
        raise Emu3Error(f"{path} needs more memory than is free: {remedy}") from error
    except BaseException as error:  # Rust extensions raise panics, which do not derive from `Exception`
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise Emu3Error(f"{path} is damaged ({reason:.120}); {remedy}") from error


def limit(path: str | os.PathLike, what: str, found: float, most: float) -> None:
    """Raises an `Emu3Error` if a count in a file exceeds a limit. Call it before memory is allocated.

    Args:
        path: path of the file.
        what: what is counted, such as "elements of tensor x".
        found: the count that the file claims.
        most: the highest count that is accepted.
    """
    if found > most:
        raise Emu3Error(f"{path}: {shown(found)} {what}; the limit is {most:,}: {AGAIN}")


def read_bytes(path: str | os.PathLike, most: int, remedy: str = AGAIN) -> bytes:
    """Reads a whole file of at most `most` bytes. Refuses pipes and devices, because they may never end.

    Raises:
        Emu3Error: the file is absent, unreadable, too long, or not a regular file.
    """
    with reading(path, remedy):
        plain_file(path)
        limit(path, "bytes", os.stat(path).st_size, most)
        with open(path, "rb") as stream:
            return stream.read(most)


def plain_file(path: str | os.PathLike) -> None:
    """Checks that `path` is a regular file.

    Raises:
        Emu3Error: the path is a directory, pipe or device.
        FileNotFoundError: the path does not exist.
    """
    mode = os.stat(local_path(path)).st_mode
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a pipe or device"
        raise Emu3Error(f"cannot read {path}: it is {kind}; give a file")


def parse_json(text: bytes, path: str | os.PathLike, remedy: str = AGAIN, *, unique: bool = False) -> Any:
    """Parses the JSON text of a file.

    Args:
        text: contents of the file.
        path: path of the file, for error messages.
        remedy: what the user should do if the file is damaged.
        unique: refuse objects that contain a name twice. Python takes the last value, other readers the first.

    Raises:
        Emu3Error: the text is not JSON, is nested too deeply, or has too many bytes or values.
    """
    limit(path, "bytes of JSON", len(text), MAX_JSON_BYTES)
    limit(path, "values in its JSON", sum(text.count(mark) for mark in b",[{:"), MAX_JSON_VALUES)
    with reading(path, remedy):
        try:
            return json.loads(text, object_pairs_hook=_unique if unique else None)
        except ValueError as error:  # includes UnicodeDecodeError
            raise Emu3Error(f"{path}: not readable as JSON ({error}); {remedy}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object contains a name twice")
    return found


def read_json(path: str | os.PathLike, remedy: str = AGAIN) -> Any:
    """Reads a JSON file. Raises the same errors as `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path, MAX_JSON_BYTES, remedy), path, remedy)


def read_object(path: str | os.PathLike, remedy: str = AGAIN) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
        Emu3Error: as `read_json`; or the file holds another JSON value.
    """
    if not os.path.lexists(local_path(path)):
        raise Emu3Error(f"{path}: not found; copy this file from the source of the directory's other files")
    data = read_json(path, remedy)
    if not isinstance(data, dict):
        raise Emu3Error(f"{path}: holds a JSON {type(data).__name__}, not an object; {remedy}")
    return data


# ------------------------------------------------------------------------------------------------ names and paths


def file_name(name: Any, where: str) -> str:
    """Checks a name from foreign data that will become a file name in a directory that the user chose.

    Args:
        name: the name.
        where: the place that contains the name; begins the error message.

    Returns:
        The name, unchanged.

    Raises:
        Emu3Error: the name is not a string, is empty, is a path, is too long, is reserved (such as a Windows device),
            or has control characters.
    """
    if not isinstance(name, str):
        raise Emu3Error(f"{where}: the name {shown(name)} is not text: rename it")
    if not name or name in (".", "..") or "/" in name or "\\" in name or _RESERVED.fullmatch(name):
        raise Emu3Error(f"{where}: the name {shown(name)} is not a legal file name: rename it")
    if name != printable(name) or any(unicodedata.category(c) == "Zl" for c in name):
        raise Emu3Error(f"{where}: the name {shown(name)} has control characters: rename it")
    if len(name.encode()) > _NAME_BYTES - 10:  # callers append a suffix
        raise Emu3Error(f"{where}: the name {shown(name)} is too long for a file: shorten it")
    return name


def local_path(path: str | os.PathLike) -> Path:
    """Checks a local path that the user gave.

    Addresses such as gs://bucket are refused, because they would become a local folder of that name.

    Returns:
        The path, unchanged.

    Raises:
        Emu3Error: the path is empty, is an address, is too long, or has characters that no file system accepts.
    """
    text = os.fspath(path)
    if not text:
        raise Emu3Error("the path is empty: give the name of a file or directory")
    if address := _ADDRESS.match(text):
        scheme = (address[1] or address[2]).rsplit("/", 1)[-1].lower()
        instead = _INSTEAD.get(scheme, "copy or mount it, and give the local path")
        raise Emu3Error(f"{shown(text)}: {printable(scheme)[:20]}:// addresses are not supported here: {instead}")
    if "\0" in text:
        raise Emu3Error(f"the path {shown(text)} has a null character, which no file name may have; correct it")
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError as error:
        raise Emu3Error(f"the path {shown(text)} has an unpaired surrogate (half a character); correct it") from error
    if len(encoded) > _PATH_BYTES or any(len(part) > _NAME_BYTES for part in encoded.split(b"/")):
        raise Emu3Error(
            f"the path {shown(text)} is too long: a name has at most {_NAME_BYTES} bytes, a path {_PATH_BYTES}; "
            "shorten it"
        )
    return Path(path)


def storage_path(path: str | os.PathLike) -> Path:
    """Resolves a user's path for Orbax, TensorStore and ArrayRecord: absolute, links followed, without `..`.

    TensorStore refuses paths with `..`. Without this step, its error would be reported as a damaged checkpoint.

    Raises:
        Emu3Error: as `local_path`; or the path is not UTF-8, so these libraries cannot open it.
    """
    resolved = os.path.realpath(local_path(path))
    try:
        resolved.encode()
    except UnicodeEncodeError as error:
        raise Emu3Error(f"the path {shown(resolved)} is not UTF-8 and cannot hold weights: rename it") from error
    return Path(resolved)


def inner_path(name: Any, where: str) -> str:
    """Checks a relative path from foreign data that will become a path below a directory that the user chose.

    Args:
        name: the path: names that `file_name` accepts, joined by `/`.
        where: the place that contains the path; begins the error message.

    Returns:
        The path, unchanged.

    Raises:
        Emu3Error: the path is not a string, is too long, or leads out of the directory.
    """
    if not isinstance(name, str):
        raise Emu3Error(f"{where}: the name {shown(name)} is not text: rename it")
    if len(name) > _PATH_BYTES:
        raise Emu3Error(f"{where}: the path {shown(name)} is too long: shorten it")
    for part in name.split("/"):
        try:
            file_name(part, where)
        except Emu3Error as error:
            raise Emu3Error(f"{where}: {shown(name)} is not a legal path inside the directory: rename it") from error
    return name


def step_number(name: str) -> int | None:
    """Parses a directory name as a step number: ASCII digits, no leading zeros, at most 18 digits.

    `str.isdigit` does not suffice: it accepts `²`, for which `int` raises, and the digits of other scripts.

    Returns:
        The number, or None if the name is not a step number.
    """
    return int(name) if re.fullmatch(r"0|[1-9][0-9]{0,17}", name) else None

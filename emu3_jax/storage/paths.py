"""Recognises, checks and splits paths in buckets. Sends no requests."""

import os
import re
from typing import Any

from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import local_path
from emu3_jax.printable import shown

_SCHEME = "gs://"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_RETRIES = 6  # retries of a request, about one minute in all; TensorStore's default of 32 takes many minutes
_MAX_NAME = 1024  # maximum length of an object's name in bytes
_SPECIAL = re.compile(r"[*?\[\]#\x00-\x1f\x7f]")  # gcsfs reads some of these as patterns or versions


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is in a bucket."""
    text = os.fspath(path)
    return isinstance(text, str) and text.startswith(_SCHEME)


def check_place(path: str | os.PathLike) -> None:
    """Raises an `Emu3Error` unless `path` is a legal local path or a legal path in a bucket. Sends no requests."""
    if not is_remote(path):
        local_path(path)
        return
    text = os.fspath(path)
    bucket, _, name = text.removeprefix(_SCHEME).partition("/")
    name = name.rstrip("/")
    if not _BUCKET.fullmatch(bucket):
        raise Emu3Error(f"{shown(text)}: {shown(bucket)} is not a legal bucket name; give gs://BUCKET/PATH")
    if not name:
        raise Emu3Error(f"{shown(text)}: the path inside the bucket is missing; give gs://BUCKET/PATH")
    if _SPECIAL.search(name) or name != name.encode(errors="replace").decode():
        raise Emu3Error(f"{shown(text)}: its path has one of * ? [ ] # or a control character; choose another name")
    if len(name.encode()) > _MAX_NAME or any(part in ("", ".", "..") for part in name.split("/")):
        raise Emu3Error(
            f"{shown(text)}: its path is longer than {_MAX_NAME} bytes, or has an empty part, . or ..; correct it"
        )


def kvstore(directory: str | os.PathLike) -> dict[str, Any]:
    """Returns TensorStore's specification of a key-value store in this directory."""
    if not is_remote(directory):
        return {"driver": "file", "path": f"{os.fspath(directory)}/"}
    bucket, name = split(directory)
    context = {"gcs_request_retries": {"max_retries": _RETRIES}}
    return {"driver": "gcs", "bucket": bucket, "path": f"{name}/", "context": context}


def split(path: str | os.PathLike) -> tuple[str, str]:
    """Splits a path in a bucket into the bucket's name and the object's name."""
    bucket, _, name = os.fspath(path).removeprefix(_SCHEME).partition("/")
    return bucket, name.rstrip("/")

"""Which paths lie in a bucket, which are legal, and their parts. Nothing is looked up."""

import os
import re
from typing import Any

from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import local_path
from emu3_jax.printable import shown

_SCHEME = "gs://"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_RETRIES = 6  # of a request, about a minute; TensorStore's own 32 take many
_MAX_NAME = 1024  # bytes of an object's name
_SPECIAL = re.compile(r"[*?\[\]#\x00-\x1f\x7f]")  # gcsfs takes some of these for patterns and versions


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


def kvstore(directory: str | os.PathLike) -> dict[str, Any]:
    """The specification of a directory for TensorStore's key-value stores."""
    if not is_remote(directory):
        return {"driver": "file", "path": f"{os.fspath(directory)}/"}
    bucket, name = split(directory)
    context = {"gcs_request_retries": {"max_retries": _RETRIES}}
    return {"driver": "gcs", "bucket": bucket, "path": f"{name}/", "context": context}


def split(path: str | os.PathLike) -> tuple[str, str]:
    """Bucket, and name of the object."""
    bucket, _, name = os.fspath(path).removeprefix(_SCHEME).partition("/")
    return bucket, name.rstrip("/")

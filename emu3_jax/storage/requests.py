"""The gcsfs client for Cloud Storage, and one-line explanations of its errors."""

import contextlib
import errno
import functools
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

from emu3_jax.errors import Emu3Error
from emu3_jax.printable import shown
from emu3_jax.storage.paths import is_remote

_FULL = (errno.ENOSPC, errno.EDQUOT)
_DENIED = (
    "access is denied: log in with `gcloud auth application-default login`, or give the service account of this "
    "machine the role Storage Object User of the bucket"
)


@functools.cache
def client() -> Any:
    """Makes the gcsfs file system, once per process.

    Raises:
        Emu3Error: gcsfs is not installed, or the two variables that name an emulator differ.
    """
    _check_emulator()
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # uses gRPC, which emulators lack
    try:
        import gcsfs  # noqa: F401
    except ImportError as missing:
        raise Emu3Error(
            "paths with gs:// need gcsfs, which is not installed: pip install 'emu3-jax[gcs]', or give a local path"
        ) from missing
    import fsspec
    import fsspec.config

    for name in ("gcsfs", "google.auth"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # `explained` already reports failures in one line
    # Cached listings would hide files that other hosts write. Orbax's own gcsfs instance reads this setting too.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return fsspec.filesystem("gcs")


def _check_emulator() -> None:
    """Raises an `Emu3Error` unless gcsfs and TensorStore use the same server.

    Otherwise TensorStore would retry requests to the wrong server for many minutes.
    """
    names = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")
    gcsfs, tensorstore = (os.environ.get(name, "") for name in names)
    if gcsfs.rstrip("/") != tensorstore.rstrip("/"):
        found = " and ".join(f"{name} is {shown(os.environ[name])}" for name in names if name in os.environ)
        raise Emu3Error(
            f"{found}: {names[0]} and {names[1]} must name one emulator: set both to http://HOST:PORT, or neither"
        )


@contextlib.contextmanager
def explained(path: str | os.PathLike) -> Iterator[None]:
    """Turns any exception of the block, which uses a bucket, into a one-line `Emu3Error` that begins with `path`."""
    try:
        yield
    except (Emu3Error, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except Exception as error:  # gcsfs and the libraries that it calls raise errors of many kinds
        raise Emu3Error(f"{os.fspath(path)}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "this bucket does not exist, or holds nothing with this name; correct the path"
    if isinstance(error, OSError) and error.errno in _FULL:
        return f"{error.strerror} ({error.filename}); free space, or choose another cache with EMU3_JAX_CACHE"
    return _of_access(error) or (
        f"Cloud Storage answered {type(error).__name__} ({_first_line(error)}): correct that and run again"
    )


def _first_line(error: BaseException) -> str:
    return f"{error!s}".strip().split("\n", 1)[0][:160]


def _of_access(error: BaseException) -> str | None:
    """Explains an error if access was denied or the bucket cannot be reached. Returns None for other errors."""
    text, kind = _first_line(error), type(error).__module__.split(".")[0]
    denied = re.search(r"^Forbidden|PERMISSION_DENIED|UNAUTHENTICATED|Anonymous caller", text)
    if isinstance(error, PermissionError) or denied or str(getattr(error, "code", "")) in ("401", "403"):
        return _DENIED
    if (
        isinstance(error, (ConnectionError, TimeoutError))
        or kind in ("aiohttp", "requests")
        or re.search("UNAVAILABLE|retry attempts failed", text)
    ):
        return f"Cloud Storage cannot be reached ({text or type(error).__name__}): check the network and run again"
    return _DENIED if kind == "google" else None


def require_access(path: str | os.PathLike, error: BaseException) -> None:
    """Checks whether an error of Orbax comes from the bucket. Call it before reporting a checkpoint as damaged.

    Args:
        path: local or in a bucket.
        error: the error of Orbax.

    Raises:
        Emu3Error: `path` is in a bucket, and access was denied or the bucket cannot be reached.
    """
    for cause in (error, error.__cause__):
        reason = _of_access(cause) if cause is not None and is_remote(path) else None
        if reason:
            raise Emu3Error(f"{os.fspath(path)}: {reason}") from error

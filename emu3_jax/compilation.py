"""How JAX runs our programs: its backend, its settings, and the persistent compilation cache.

The cache is on by default, so that the second run starts in seconds.
"""

import contextlib
import logging
import os
import pathlib
from collections.abc import Iterator

import jax

from emu3_jax.errors import Emu3Error
from emu3_jax.printable import shown

_LEAST_SECONDS = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"

_log = logging.getLogger("emu3_jax")


def enable_persistent_cache() -> None:
    """Keeps compiled programs in `~/.cache/emu3_jax`, also small ones, unless the user configured JAX's cache already.

    `JAX_COMPILATION_CACHE_DIR` or `jax.config` choose another place; `JAX_ENABLE_COMPILATION_CACHE=false` turns it off.
    Where the place cannot be written, or there is no home directory, programs are compiled anew in each process.
    """
    if not jax.config.jax_enable_compilation_cache:
        return
    if jax.config.jax_compilation_cache_dir is None:
        try:
            base = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        except RuntimeError:  # no HOME, and a user that the system does not know
            return
        jax.config.update("jax_compilation_cache_dir", str(base / "emu3_jax" / "compiled"))
        if _LEAST_SECONDS not in os.environ:
            # By default JAX keeps what took a second to compile: on a fast machine nothing of the embedded model.
            jax.config.update(_LEAST_SECONDS.lower(), 0.0)
    place = jax.config.jax_compilation_cache_dir
    if not place or "://" in place:  # a bucket, which JAX knows how to write
        return
    try:
        place.encode()  # JAX takes no other bytes
        os.makedirs(place, exist_ok=True)
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(None, "permission denied")
    except (OSError, ValueError) as error:
        # JAX would warn of each program.
        jax.config.update("jax_enable_compilation_cache", False)
        reason = getattr(error, "strerror", None) or error
        _log.warning("compiled programs are not kept, cannot write to %s: %s; set XDG_CACHE_HOME", shown(place), reason)


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """Within, programs get JAX's own settings of what decides results, whatever the environment or the caller set.

    Numbers are of 32 bits, and random keys give the same numbers: a seed means the same picture. Everything that is
    traced, lowered or called within belongs to it.
    """
    with jax.enable_x64(False), jax.threefry_partitionable(True), jax.default_prng_impl("threefry2x32"):
        yield


def check_backend() -> None:
    """Starts JAX's backend. In runs of several processes these have to have met before.

    Raises:
        Emu3Error: it cannot be used: it is absent, or another process uses it.
    """
    try:
        jax.devices()
    except Exception as error:  # RuntimeError, and AssertionError where no backend is left
        reason = str(error).split(" (set JAX_PLATFORMS", 1)[0] or "there is no such device"
        names = [name for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME") if os.environ.get(name)]
        if names:
            said = " and ".join(f"{name} is {shown(os.environ[name])}" for name in names)
            remedy = "correct it, or unset it and JAX chooses a backend itself; end other processes that use the device"
        else:
            said = "JAX has no backend"
            remedy = "end other processes that use the device, or set JAX_PLATFORMS=cpu"
        raise Emu3Error(f"{said}, which cannot be used ({reason:.150}): {remedy}") from error

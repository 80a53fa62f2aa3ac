"""JAX's backend, the JAX settings that this package needs, and the persistent compilation cache.

The cache is on by default, so the second run of a command starts faster.
"""

import contextlib
import logging
import os
import pathlib
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache

from emu3_jax.errors import Emu3Error
from emu3_jax.printable import shown

_LEAST_SECONDS = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"

_log = logging.getLogger("emu3_jax")


def enable_persistent_cache() -> None:
    """Keeps compiled programs in `~/.cache/emu3_jax/compiled`, unless the user already configured JAX's cache.

    `XDG_CACHE_HOME`, `JAX_COMPILATION_CACHE_DIR` or `jax.config` choose another directory.
    `JAX_ENABLE_COMPILATION_CACHE=false` turns the cache off. If the directory cannot be written, or the user has no
    home directory, each process compiles its programs again. In the default directory, small programs are kept too.

    Runs of several processes on CPUs have no cache, whatever the user configured: their programs can hang. Call
    `distributed.start` first.
    """
    if not jax.config.jax_enable_compilation_cache:
        return
    if _several_cpu_processes():
        # XLA runs the collectives of a program in one order, because all of them use the same `Resource`. A CPU program
        # from the cache has another `Resource` for each loop and call (ThunkSequenceSerDesProtobuf, jaxlib 0.10). Then
        # devices enter a loop's collectives and those around it in different orders, and Gloo matches calls by order.
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # JAX reads the setting once, at its first compilation
        return
    if jax.config.jax_compilation_cache_dir is None:
        try:
            base = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        except RuntimeError:  # HOME is not set, and the system does not know the user
            return
        jax.config.update("jax_compilation_cache_dir", str(base / "emu3_jax" / "compiled"))
        if _LEAST_SECONDS not in os.environ:
            # By default JAX keeps only programs that took over a second to compile. On a fast machine that excludes
            # all programs of the embedded model.
            jax.config.update(_LEAST_SECONDS.lower(), 0.0)
    place = jax.config.jax_compilation_cache_dir
    if not place or "://" in place:  # a bucket, which JAX itself can write
        return
    try:
        place.encode()  # JAX accepts UTF-8 paths only
        os.makedirs(place, exist_ok=True)
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(None, "permission denied")
    except (OSError, ValueError) as error:
        # Otherwise JAX would warn once per compiled program.
        jax.config.update("jax_enable_compilation_cache", False)
        reason = getattr(error, "strerror", None) or error
        _log.warning("compiled programs are not kept, cannot write to %s: %s; set XDG_CACHE_HOME", shown(place), reason)


def _several_cpu_processes() -> bool:
    # Before `jax.distributed.initialize`, to ask for their number would start the backend.
    return jax.distributed.is_initialized() and jax.process_count() > 1 and jax.default_backend() == "cpu"


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """Resets the JAX settings that affect results to JAX's defaults inside the block.

    Arrays have 32 bits, and random numbers come from JAX's default generator. So a seed gives the same picture
    whatever the environment or the caller set. Trace, lower and call compiled programs inside this block.
    """
    with jax.enable_x64(False), jax.threefry_partitionable(True), jax.default_prng_impl("threefry2x32"):
        yield


def check_backend() -> None:
    """Starts JAX's backend. In runs of several processes, call `distributed.start` first.

    Raises:
        Emu3Error: the backend cannot be used, because the device is absent or another process uses it.
    """
    try:
        jax.devices()
    except Exception as error:  # RuntimeError, or AssertionError if no backend is left
        reason = str(error).split(" (set JAX_PLATFORMS", 1)[0] or "there is no such device"
        names = [name for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME") if os.environ.get(name)]
        if names:
            said = " and ".join(f"{name} is {shown(os.environ[name])}" for name in names) + ", which cannot be used"
            remedy = "correct it, or unset it so that JAX chooses a backend; end other processes that use the device"
        else:
            said = "JAX has no usable backend"
            remedy = "end other processes that use the device, or set JAX_PLATFORMS=cpu"
        raise Emu3Error(f"{said} ({reason:.150}): {remedy}") from error

"""The persistent compilation cache: on by default, so that the second run starts in seconds."""

import os
import pathlib

import jax


def enable_persistent_cache() -> None:
    """Keeps compiled programs in `~/.cache/emu3_jax` unless the user configured JAX's cache already.

    `JAX_COMPILATION_CACHE_DIR` or `jax.config` choose another place; `JAX_ENABLE_COMPILATION_CACHE=false` turns it off.
    """
    if jax.config.jax_compilation_cache_dir is None:
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(base) / "emu3_jax" / "compiled"))

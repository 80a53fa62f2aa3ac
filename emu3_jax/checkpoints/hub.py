"""Finds or downloads a checkpoint: a local directory, a bucket, or the Hugging Face hub."""

import functools
import re
from pathlib import Path

from emu3_jax import storage
from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import local_path
from emu3_jax.printable import one_line
from emu3_jax.progress import download_bars

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def local_source(source: str) -> Path | None:
    """The directory of a source, or None for a hub id. Raises `Emu3Error` if the source is neither."""
    path = local_path(source)
    if path.is_dir():
        return path
    if path.exists() or not _HUB_ID.fullmatch(source):
        raise Emu3Error(f"{source}: no such directory; give a checkpoint directory or a hub id like BAAI/Emu3-Gen")
    return None


def fetch(source: str, progress: bool | None = None) -> Path:
    """Returns the local directory of a source.

    Files of a hub id are downloaded to the cache of huggingface_hub, files in a bucket to the cache of this package.

    Args:
      source: directory, bucket address or hub id.
      progress: as in `progress.Progress`.

    Raises:
      Emu3Error: the source does not exist, or the hub cannot be reached.
    """
    if storage.is_remote(source):
        return storage.fetched(source, lambda name: "/" not in name)
    path = local_source(source)
    if path is not None:
        return path
    try:
        import huggingface_hub
    except ImportError as error:
        raise Emu3Error(
            f"{source}: no such directory; to download it from the hub, pip install 'emu3-jax[convert]'"
        ) from error
    # `*` matches path separators too. Without `ignore_patterns`, a file name could lead out of the hub's cache.
    settings = {"ignore_patterns": ["*/*", "*\\*"], "tqdm_class": download_bars(progress, source)}
    download = functools.partial(huggingface_hub.snapshot_download, source, **settings)
    beside = ["*.json", "config.yaml", "*.tiktoken", "*.txt"]
    try:
        # A repository may hold the same weights in several forms: the first one is enough.
        for weights in ("*.safetensors", "*.bin", "model.ckpt"):
            directory = Path(download(allow_patterns=[*beside, weights]))
            if any(directory.glob(weights)):
                break
    except Exception as error:  # the hub's library, its network libraries and the disk raise many classes
        reason = one_line(str(error).strip().split("\n", 1)[0] or type(error).__name__)[:120]
        raise Emu3Error(
            f"{source}: no such directory, and the download from the hub failed ({reason}); check the name and the "
            "connection"
        ) from error
    return directory

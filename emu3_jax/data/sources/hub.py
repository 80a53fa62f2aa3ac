"""Data sets on the Hugging Face hub: `hf:NAME`, `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`.

The library `datasets` downloads a data set once, and stores it in Arrow files that are mapped into memory. It does not
run code from a data set.
"""

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emu3_jax.data.sources.arrow import CellPicture, cell_bytes, choose
from emu3_jax.data.sources.examples import Example, clean_caption
from emu3_jax.data.sources.tables import Columns
from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import limit, plain_file, reading
from emu3_jax.printable import printable, shown
from emu3_jax.progress import on_terminal, shows, tell

PREFIX = "hf:"
_PATIENCE = 20  # seconds to wait for the hub's first answer
_MAX_PICTURE = 1 << 28  # bytes
_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_USE = "write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, with names that the hub shows"


class HubDataset:
    """The captioned pictures of one split of a hub data set."""

    def __init__(self, location: str, columns: Columns):
        """Downloads the data set, unless it was downloaded before.

        Args:
            location: `hf:NAME` and so on, see the module. The default split is `train`, or the only split.
            columns: names of the columns with pictures and captions.

        Raises:
            Emu3Error: `datasets` is not installed, the hub cannot be reached, the data set or split does not exist, or
                it has no column with pictures or captions.
        """
        parts = location.removeprefix(PREFIX).split(":")
        if not _NAME.fullmatch(parts[0]) or len(parts) > 3 or not all(parts):
            raise Emu3Error(f"{shown(location)} is not a legal name of a hub data set: {_USE}")
        name, split = parts[0], parts[-1] if len(parts) > 1 else None
        self._where = f"{PREFIX}{name}"
        builder, split = _download(self._where, name, parts[1] if len(parts) == 3 else None, split)
        data = builder.as_dataset(split=split).with_format("arrow")
        self._picture, self._text = choose(data.features.arrow_schema, columns, self._where)
        if not len(data):
            raise Emu3Error(f"{location} has no rows: choose another split")
        self._data = data.select_columns([self._picture, self._text])
        # The builder's hash is the data set's commit.
        version = (name, str(builder.hash), builder.config.name, split, len(data), self._picture, self._text)
        self.digest = hashlib.sha256(repr(("hub", version)).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Example:
        """Reads example `index`. Raises an `Emu3Error` that names the row if its caption is empty or not text."""
        where = f"{self._where} row {index}"
        with reading(where):
            text = self._data[index : index + 1][self._text][0].as_py()
        return Example(where, where, clean_caption(text, where), CellPicture(self._bytes, index, where))

    def _bytes(self, index: int) -> bytes:
        with reading(f"{self._where} row {index}"):
            data, path = cell_bytes(self._data[index : index + 1][self._picture][0].as_py())
        if data:
            return data
        if path and (file := _downloaded(path)) is not None:
            plain_file(file)
            limit(path, "bytes", file.stat().st_size, _MAX_PICTURE)
            return file.read_bytes()
        raise Emu3Error("this row has no picture: leave the row out of the data set")


def _downloaded(path: str) -> Path | None:
    """Returns the path of a file in the download caches, else None. A data set could name any file on this machine."""
    import datasets
    from huggingface_hub import constants

    file = os.path.realpath(path)
    for cache in (datasets.config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE):
        root = os.path.realpath(cache)
        if os.path.commonpath([root, file]) == root and os.path.isfile(file):
            return Path(file)
    return None


def _download(where: str, name: str, config: str | None, split: str | None) -> tuple[Any, str]:
    """Downloads a data set. Returns its builder and the name of the split. Raises as `HubDataset`."""
    try:
        import datasets
        import huggingface_hub
    except ImportError as missing:
        raise Emu3Error(
            f"{where} needs datasets, which is not installed: pip install 'emu3-jax[data]', or give local files"
        ) from missing
    from huggingface_hub import constants

    with _quietly(datasets), _explained(where):
        # `datasets` would look up the newest commit itself, and wait half a minute for an unreachable hub. So look it
        # up here with a shorter timeout, and pin it.
        offline = constants.HF_HUB_OFFLINE
        commit = None if offline else huggingface_hub.HfApi().dataset_info(name, timeout=_PATIENCE).sha
        builder = datasets.load_dataset_builder(f"hf://datasets/{name}", config, revision=commit)
        tell(f"download {printable(where)}")
        builder.download_and_prepare()
        splits = [str(split) for split in builder.info.splits or ()]
        chosen = split or ("train" if "train" in splits or len(splits) != 1 else splits[0])
        if chosen not in splits:
            raise Emu3Error(f"{where} has no split {shown(chosen)}: it has {shown(splits)}; {_USE}")
        return builder, chosen


@contextlib.contextmanager
def _quietly(datasets: Any) -> Iterator[None]:
    """Silences the warnings of `datasets` and `huggingface_hub`, and their bars unless on a terminal."""
    from huggingface_hub.utils import logging

    before, hub = datasets.logging.get_verbosity(), logging.get_verbosity()
    bars = datasets.utils.are_progress_bars_disabled()
    datasets.logging.set_verbosity_error()
    logging.set_verbosity_error()
    if not (shows(None) and on_terminal()):
        datasets.utils.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)
        logging.set_verbosity(hub)
        if not bars:
            datasets.utils.enable_progress_bars()


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    """Turns any exception of the two libraries into a one-line `Emu3Error` that begins with `where`."""
    from huggingface_hub import constants, errors

    try:
        yield
    except (Emu3Error, KeyboardInterrupt):
        raise
    except errors.GatedRepoError as error:
        raise Emu3Error(f"{where}: access is restricted: request access on its page, then run hf auth login") from error
    except errors.RepositoryNotFoundError as error:
        raise Emu3Error(
            f"{where}: this data set does not exist or is private: correct the name, or run hf auth login"
        ) from error
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        if _unreached(error) and constants.HF_HUB_OFFLINE:
            raise Emu3Error(f"{where}: not downloaded yet, and HF_HUB_OFFLINE is set: unset the variable") from error
        if _unreached(error):
            raise Emu3Error(
                f"{where}: the hub cannot be reached ({said:.120}): check the network, set HF_ENDPOINT to a mirror, or "
                "copy the data set to this machine and give its folder"
            ) from error
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Emu3Error(
                f"{where}: the disk is full ({said:.120}): free space, or set HF_HOME to a folder on another disk"
            ) from error
        remedy = _USE if "config" in said.lower() else "choose another data set, or give files that you downloaded"
        raise Emu3Error(f"{where}: {said:.150}; {remedy}") from error


def _unreached(error: BaseException | None) -> bool:
    """Whether the error, or one of its causes, is a network error."""
    while error is not None:
        names = {kind.__name__ for kind in type(error).__mro__}
        if names & {"ConnectionError", "TransportError", "OfflineModeIsEnabled", "LocalEntryNotFoundError"}:
            return True
        error = error.__cause__ or error.__context__
    return False

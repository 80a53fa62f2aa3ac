"""The metrics of a run: one JSON object per line in `metrics.jsonl`, and the same numbers for TensorBoard.

Objects in a bucket cannot be appended to. For a run in a bucket, both are written to a local directory and uploaded at
each checkpoint. A kill loses only lines after the last checkpoint, and the resumed run writes these lines again.
"""

import contextlib
import json
import logging
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from emu3_jax import storage
from emu3_jax.errors import Emu3Error
from emu3_jax.fields import is_whole
from emu3_jax.files import local_directory, new_file
from emu3_jax.foreign import limit, parse_json, plain_file, reading

FILE = "metrics.jsonl"
_MAX_BYTES = 4 << 30  # largest metrics.jsonl; a step is a line of about 200 bytes
_MAX_LINE = 1 << 20  # longest line, in bytes
_CURVES = "emu3-jax"  # path prefix that makes tensorboardX open its files with `_Curves`
_log = logging.getLogger("emu3_jax")


@contextlib.contextmanager
def without_torch() -> Iterator[None]:
    """Hides an installed PyTorch from imports inside the block, unless it was imported before.

    tensorboardX imports PyTorch for type annotations alone, which takes 2 s.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # makes `import torch` raise ModuleNotFoundError
    try:
        yield
    finally:
        del sys.modules["torch"]


class Metrics:
    """Writes the metrics of one run from `step` on. It first deletes lines that a killed run wrote for later steps."""

    def __init__(self, directory: pathlib.Path, step: int):
        self._remote = directory if storage.is_remote(directory) else None
        self._local = contextlib.ExitStack()
        if self._remote:
            directory = self._local.enter_context(local_directory())
            if storage.is_file(self._remote / FILE):
                storage.download(self._remote / FILE, directory / FILE)
        self._file = directory / FILE
        kept = [line for line in read_metrics(directory) if line["step"] <= step]
        with new_file(self._file) as file:
            file.write_text("".join(json.dumps(line) + "\n" for line in kept))
        try:
            with without_torch():
                from tensorboardX import SummaryWriter
                from tensorboardX.record_writer import register_writer_factory
        except ImportError as missing:
            raise Emu3Error(
                "metrics need tensorboardX, which is not installed: pip install 'emu3-jax[train]'"
            ) from missing
        register_writer_factory(_CURVES, _CurvesFactory())
        self._board = SummaryWriter(f"{_CURVES}:{directory.absolute() / 'tensorboard'}", purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float], group: str = "train") -> None:
        """Appends one line `{"step": ..., "group": ..., name: number, ...}`. The file is closed before this returns."""
        line = json.dumps({"step": step, "group": group, **values})
        try:
            with open(self._file, "a") as file:
                file.write(line + "\n")
        except OSError as error:
            raise Emu3Error(f"cannot write {self._file}: {error.strerror}; free space, then run again") from error
        for name, value in values.items():
            self._board.add_scalar(f"{group}/{name}", value, step)

    def keep(self) -> None:
        """Uploads all files written so far if the run's directory is in a bucket."""
        if self._remote:
            self._board.flush()
            for file in sorted(self._file.parent.rglob("*")):
                if file.is_file():
                    storage.upload(file, self._remote / file.relative_to(self._file.parent))

    def close(self) -> None:
        with self._local:
            self._board.close()
            self.keep()


class _CurvesFactory:
    """The object through which tensorboardX opens files and makes directories."""

    def open(self, path: str) -> "_Curves":
        return _Curves(path.removeprefix(f"{_CURVES}:"))

    def directory_check(self, path: str) -> None:
        os.makedirs(path.removeprefix(f"{_CURVES}:"), exist_ok=True)


class _Curves:
    """A file for TensorBoard that never raises: if a write fails, as on a full disk, it warns once and ends.

    An exception would end tensorboardX's writer thread, and the run would hang waiting for it. No numbers are lost:
    metrics.jsonl holds them too.
    """

    def __init__(self, path: str):
        self._path = path
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115

    def write(self, data: bytes) -> None:
        if self._file.closed:
            return
        try:
            if self._file.write(data) == len(data):
                return
            reason = "the disk is full"
        except OSError as error:
            reason = str(error.strerror)
        self._file.close()
        _log.warning("%s ends here: %s; metrics.jsonl has the same numbers", self._path, reason)

    def flush(self) -> None:
        """Does nothing: the file is unbuffered."""

    def close(self) -> None:
        self._file.close()


def read_metrics(directory: pathlib.Path) -> list[dict[str, Any]]:
    """Reads all lines of a run's metrics. It leaves out broken lines (such as the last one after a kill).

    Args:
        directory: directory of the run.

    Returns:
        One dict per line, with at least an int `step` and a text `group`. Empty without a metrics file.

    Raises:
        Emu3Error: the file cannot be read or is too large.
    """
    file = directory / FILE
    if not file.exists():
        return []
    lines = []
    with reading(file, "move it away; the run goes on without it"):
        plain_file(file)
        limit(file, "bytes", file.stat().st_size, _MAX_BYTES)
        with file.open("rb") as stream:
            while text := stream.readline(_MAX_LINE):
                with contextlib.suppress(Emu3Error):
                    line = parse_json(text, file)
                    if isinstance(line, dict) and is_whole(line.get("step"), 0) and isinstance(line.get("group"), str):
                        lines.append(line)
    return lines

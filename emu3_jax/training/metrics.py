"""A run's metrics: one JSON object a line in `metrics.jsonl`, and the same numbers for TensorBoard."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from emu3_jax.errors import Emu3Error
from emu3_jax.files import new_file

FILE = "metrics.jsonl"


class Metrics:
    """Writes metrics of one run, from `step` on: what a killed run wrote about later steps goes first."""

    def __init__(self, directory: pathlib.Path, step: int):
        self._file = directory / FILE
        kept = [line for line in read_metrics(directory) if line["step"] <= step]
        with new_file(self._file) as file:
            file.write_text("".join(json.dumps(line) + "\n" for line in kept))
        try:
            from tensorboardX import SummaryWriter
        except ImportError as missing:
            raise Emu3Error(
                "metrics need tensorboardX, which is not installed: pip install 'emu3-jax[train]'"
            ) from missing
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float], group: str = "train") -> None:
        """One line `{"step": ..., "group": ..., name: number, ...}`, on disk when this returns."""
        line = json.dumps({"step": step, "group": group, **values})
        try:
            with open(self._file, "a") as file:
                file.write(line + "\n")
        except OSError as error:
            raise Emu3Error(f"cannot write {self._file}: {error.strerror}; free space, then run again") from error
        for name, value in values.items():
            self._board.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        self._board.close()


def read_metrics(directory: pathlib.Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics; one that a kill left unfinished is left out."""
    file = directory / FILE
    lines = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines

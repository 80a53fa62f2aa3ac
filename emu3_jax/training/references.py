"""The reference model's log-probabilities of preference pairs: computed once, and kept in the run's directory.

They are computed before the first step by the weights that training starts from, so no second model lies in memory.
`DIRECTORY/reference/HASH.npy` holds float32 [pairs, 2] of one data set, chosen sides first. HASH names the data, the
weights, and all that a log-probability depends on. A pass that is killed goes on where its file ends.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from emu3_jax import distributed, files, storage
from emu3_jax.data.pipeline import Batch, Batches
from emu3_jax.errors import Emu3Error
from emu3_jax.files import new_file
from emu3_jax.foreign import limit, plain_file, reading
from emu3_jax.progress import Progress

FOLDER = "reference"
_SAVE_EVERY = 60.0  # seconds; a killed pass loses at most this much work
_MISSING, _TOO_LONG = np.nan, np.inf  # not computed yet; left out of training, because it is longer than a row
_MAX_BYTES = 16 << 30

Compute = Callable[[Batch], tuple[np.ndarray, np.ndarray]]


class References:
    """The stored log-probabilities of a run's data sets."""

    def __init__(self, directory: Path, progress: bool | None = None):
        """
        Args:
            directory: directory of the run, local or in a bucket. The caller must hold its lock.
            progress: see `progress.Progress`.
        """
        self._directory, self._progress = directory / FOLDER, progress

    def get(
        self,
        identity: Mapping[str, Any],
        pairs: int,
        per_batch: int,
        batches: Callable[[], Batches],
        compute: Callable[[], Compute],
    ) -> np.ndarray:
        """Reads the log-probabilities of a data set, and first computes those that the run's directory lacks.

        All processes of a run must call it with equal arguments, and all get the same result.

        Args:
            identity: JSON values that determine the log-probabilities: data, weights and settings.
            pairs: number of pairs of the data set.
            per_batch: number of pairs in a batch of all processes.
            batches: opens one pass over the data set in order, with the array `pair` in each batch.
            compute: loads the weights if needed, and returns a function of a batch that gives the log-probability of
                each row, float32 [B], and each row's pair, int [B] (-1: an empty row), over all processes. It is called
                only if something is missing.

        Returns:
            float32 [pairs, 2]; infinite for pairs that are longer than a row.

        Raises:
            Emu3Error: the file is damaged or cannot be written, or a log-probability is not finite.
        """
        text = json.dumps(identity, sort_keys=True)
        file = self._directory / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npy"
        values = self._read(file, pairs)
        distributed.wait("the reference's log-probabilities are read")
        if np.isnan(values).any():
            self._complete(file, values, per_batch, batches(), compute())
            distributed.wait("the reference's log-probabilities are written")
        return values

    def _complete(self, file: Path, values: np.ndarray, per_batch: int, batches: Batches, compute: Compute) -> None:
        """Computes the missing values in place."""
        saved, done = time.monotonic(), int(np.argmax(np.isnan(values).any(axis=1)))
        bar = Progress(self._progress, len(values), "pairs", name="reference", initial=done)
        with contextlib.closing(batches), bar:
            for number, batch in enumerate(batches):
                part = values[number * per_batch : (number + 1) * per_batch]
                if not np.isnan(part).any():
                    continue
                log_probs, pairs = compute(batch)
                rows = np.flatnonzero(pairs >= 0)
                bad = rows[~np.isfinite(log_probs[rows])]
                if len(bad):
                    raise Emu3Error(
                        f"the reference's log-probability of pair {pairs[bad[0]]} is {log_probs[bad[0]]}: check the "
                        "model and the pairs (emu3-jax doctor)"
                    )
                values[pairs[rows], rows % 2] = log_probs[rows]
                part[np.isnan(part)] = _TOO_LONG
                bar.update(len(part))
                if time.monotonic() - saved > _SAVE_EVERY:
                    self._write(file, values)
                    saved = time.monotonic()
        self._write(file, values)

    def _read(self, file: Path, pairs: int) -> np.ndarray:
        if not storage.is_file(file):
            return np.full((pairs, 2), _MISSING, np.float32)
        remedy = "delete it, and run again"
        with contextlib.ExitStack() as stack:
            local = file
            if storage.is_remote(file):
                local = stack.enter_context(files.local_directory()) / file.name
                storage.download(file, local)
            with reading(file, remedy):
                plain_file(local)
                limit(file, "bytes", local.stat().st_size, _MAX_BYTES)
                values = np.load(local, allow_pickle=False)
        if values.shape != (pairs, 2) or values.dtype != np.float32:
            raise Emu3Error(f"{file} is damaged ({values.dtype} {list(values.shape)}): {remedy}")
        return values

    def _write(self, file: Path, values: np.ndarray) -> None:
        if not distributed.first():
            return
        with files.shared_directory(self._directory), new_file(file) as temporary, temporary.open("wb") as stream:
            np.save(stream, values)


def attached(batch: Batch, stored: np.ndarray | None) -> Batch:
    """A batch for a step: without `pair`, and with `reference`, float32 [B], if there are stored log-probabilities."""
    pairs = batch.get("pair")
    if pairs is None:
        return batch
    kept = {name: array for name, array in batch.items() if name != "pair"}
    if stored is None:
        return kept
    found = stored[pairs, np.arange(len(pairs)) % 2]
    return kept | {"reference": np.where(pairs < 0, np.float32(0), found)}

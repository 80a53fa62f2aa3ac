"""Stored log-probabilities of references: computed once, kept in a directory or bucket, refused if not finite."""

import numpy as np
import pytest

from emu3_jax import Emu3Error, storage
from emu3_jax.training.references import References, attached

PAIRS, PER_BATCH = 7, 3
WANTED = -np.arange(2 * PAIRS, dtype=np.float32).reshape(PAIRS, 2)


class Pass:
    """One pass over the pairs. Pair 4 is left out, as one that is longer than a row."""

    def __iter__(self):
        for first in range(0, PAIRS, PER_BATCH):
            numbers = [n if n < PAIRS and n != 4 else -1 for n in range(first, first + PER_BATCH)]
            yield {"pair": np.repeat(np.array(numbers, np.int32), 2)}

    def close(self):
        pass


def log_probs(batch):
    pairs = batch["pair"]
    return np.where(pairs < 0, np.nan, WANTED[pairs, np.arange(len(pairs)) % 2]).astype(np.float32), pairs


def get(directory, compute, identity="a"):
    stored = References(storage.place(directory), progress=False)
    return stored.get({"data": identity}, PAIRS, PER_BATCH, Pass, lambda: compute)


def never(batch):
    raise AssertionError("it is stored")


@pytest.mark.parametrize("place", ["run", "gs://bucket/run"])
def test_they_are_computed_once(request, tmp_path, monkeypatch, place):
    if place == "run":
        monkeypatch.chdir(tmp_path)
    else:
        pytest.importorskip("gcsfs", reason="the extra gcs is not installed")
        request.getfixturevalue("bucket")
    wanted = WANTED.copy()
    wanted[4] = np.inf
    np.testing.assert_array_equal(get(place, log_probs), wanted)
    np.testing.assert_array_equal(get(place, never), wanted)
    with pytest.raises(AssertionError, match="it is stored"):
        get(place, never, identity="b")  # other data, another file


def test_log_probabilities_that_are_not_finite(tmp_path):
    def broken(batch):
        values, pairs = log_probs(batch)
        return np.where(pairs == 5, -np.inf, values), pairs

    with pytest.raises(Emu3Error, match="the reference's log-probability of pair 5 is -inf: check the model"):
        get(tmp_path, broken)


def test_batches_get_the_values_of_their_pairs():
    batch = {"tokens": np.zeros((6, 2)), "pair": np.array([3, 3, -1, -1, 0, 0])}
    made = attached(batch, WANTED)
    assert made["reference"].tolist() == [-6, -7, 0, 0, 0, -1] and made["reference"].dtype == np.float32
    assert made.keys() == {"tokens", "reference"} and attached(batch, None).keys() == {"tokens"}
    assert attached({"tokens": batch["tokens"]}, None).keys() == {"tokens"}

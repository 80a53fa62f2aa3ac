"""What batches are made of: settings that are not legal, and the words that say so."""

import pytest

from emu3_jax import Emu3Error
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import TextOnly


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"sequence_length": 1}, "sequence_length is 1"),
        ({"packing": -1}, "packing is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"too_long": "cut"}, "too_long is 'cut'"),
        ({"sources": []}, "sources is \\[\\]: it must be a tuple of Source"),
        ({"loss_on_padding": True}, "loss_on_padding is true: it needs packing=0"),
        ({"sources": (Source("d", TextOnly(), parts=2),)}, "parts of d is 2: parts need in_memory=True"),
    ],
)
def test_bad_settings(fields, reason):
    with pytest.raises(Emu3Error, match=reason):
        DataConfig(**{"sources": (Source("d", TextOnly()),), "sequence_length": 8, **fields})


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), "1"])
def test_bad_weights(weight):
    with pytest.raises(Emu3Error, match="weight of d is"):
        Source("d", TextOnly(), weight)


@pytest.mark.parametrize("parts", [0, 1.5, True])
def test_bad_parts(parts):
    with pytest.raises(Emu3Error, match="parts of d is"):
        Source("d", TextOnly(), parts=parts)

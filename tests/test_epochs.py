"""Orders and dropped prompts: what they were when runs in progress began, and how places find them."""

import numpy as np
import pytest

from emu3_jax.data.epochs import Epochs, PerEpoch, drops_prompt, drops_prompts


@pytest.mark.parametrize(
    ("epochs", "number", "order"),
    [
        (Epochs(7, (3, 1)), 0, [2, 1, 4, 0, 5, 6, 3]),
        (Epochs(7, (3, 1)), 1, [5, 4, 3, 0, 2, 6, 1]),
        (Epochs(7, (3, 1)), 5, [6, 5, 3, 0, 1, 4, 2]),
        (Epochs(7, (3,), suffix=(6,)), 0, [0, 2, 1, 5, 6, 4, 3]),
        (Epochs(7, (3,), suffix=(6,)), 1, [1, 3, 0, 4, 2, 6, 5]),
    ],
)
def test_orders_stay_what_they_were(epochs, number, order):
    np.testing.assert_array_equal(epochs.order(number), order)


def test_dropped_prompts_stay_what_they_were():
    alone = [[record for record in range(20) if drops_prompt((3, 1), epoch, record, 0.3)] for epoch in (0, 1)]
    assert alone == [[2, 8, 10, 15, 16, 18], [4, 7, 9, 12, 13]]
    together = [np.flatnonzero(drops_prompts((3, 1), epoch, 20, 0.3)).tolist() for epoch in (0, 1)]
    assert together == [[0, 5, 6, 7, 13, 14, 19], [2, 16]]
    for share, expected in ((0.0, False), (1.0, True)):
        assert drops_prompt((3, 1), 0, 5, share) is expected
        assert (drops_prompts((3, 1), 0, 20, share) == expected).all()


def test_places_in_any_order_over_several_epochs():
    epochs = Epochs(7, (3, 1))
    places = np.random.default_rng(0).permutation(3 * 7)
    found, records = epochs.at(places)
    np.testing.assert_array_equal(found, places // 7)
    for place, epoch, record in zip(places, found, records, strict=True):
        assert record == Epochs(7, (3, 1)).order(epoch)[place % 7]


def test_the_last_two_epochs_are_kept():
    made = []
    recent = PerEpoch(lambda epoch: made.append(epoch) or epoch)
    for epoch in (0, 1, 0, 1, 2, 1, 2):
        assert recent(epoch) == epoch
    assert made == [0, 1, 2] and recent(0) == 0 and made[-1] == 0

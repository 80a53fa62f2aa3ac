"""The sequences that batches of token rows hold, and what must hold of every row."""

import numpy as np

from emu3_jax.config import SpecialTokens

SPECIAL = SpecialTokens()


def segments(batches) -> list[dict[str, np.ndarray]]:
    """The sequences that batches hold, in the order of rows; checks what holds of every row."""
    found = []
    for batch in batches:
        assert {name: array.dtype for name, array in batch.items()} == {
            "tokens": np.int32, "segment_ids": np.int32, "positions": np.int32, "loss_mask": np.bool_,
        }  # fmt: skip
        assert len({array.shape for array in batch.values()}) == 1
        for row in range(len(batch["tokens"])):
            tokens, ids, positions, mask = (batch[k][row] for k in ("tokens", "segment_ids", "positions", "loss_mask"))
            count = ids.max(initial=0)
            filled = int((ids > 0).sum())
            # Segments 1, 2, ... from the left without gaps, then padding, which is no target.
            assert (np.diff(ids[:filled]) >= 0).all() and set(ids[:filled]) == set(range(1, count + 1))
            assert not ids[filled:].any() and not mask[filled:].any() and not positions[filled:].any()
            assert (tokens[filled:] == SPECIAL.pad).all()
            for segment in range(1, count + 1):
                inside = ids == segment
                np.testing.assert_array_equal(positions[inside], np.arange(inside.sum()))
                assert tokens[inside][0] == SPECIAL.bos and not mask[inside][0]
                found.append({"tokens": tokens[inside], "loss_mask": mask[inside]})
    return found


def numbers(found) -> list[int]:
    """The number of each picture that has one code, which is its number."""
    codes = [segment["tokens"][segment["tokens"] >= SPECIAL.visual_start] for segment in found]
    assert all((c == c[0]).all() for c in codes)
    return [int(c[0]) - SPECIAL.visual_start for c in codes]

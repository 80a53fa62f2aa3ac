"""Built sequences to rows: sequences that are too long, padding, packing, and the two rows of a preference pair."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import grain
import numpy as np

from emu3_jax.data.sequences import PairSequence, TokenSequence, padded_pair, padded_row
from emu3_jax.errors import Emu3Error

Batch = dict[str, np.ndarray]

_OF_A_SEQUENCE = ("tokens", "loss_mask")


@dataclasses.dataclass(frozen=True)
class Built:
    """The sequence of a record, the record's name for errors, and the number of a pair (-1 if there is none)."""

    name: str
    sequence: TokenSequence | PairSequence
    pair: int = -1


def fits(built: Built, length: int, too_long: str, room: str = "a row") -> bool:
    tokens = len(built.sequence)
    if tokens > length and too_long == "stop":
        raise Emu3Error(
            f"{built.name} has {tokens} tokens, but {room} has {length}: raise sequence_length, prepare with a smaller "
            'area, or set too_long to "skip"'
        )
    return tokens <= length


class FittingDataset(grain.IterDataset):
    """Converts `Built` sequences to arrays `tokens` and `loss_mask`. Handles sequences that are longer than a row."""

    def __init__(
        self,
        parent: grain.IterDataset[Built],
        length: int,
        too_long: str,
        *,
        instead: Built | None = None,
        patience: int = 0,
        some_fit: Callable[[], bool] = lambda: True,
    ):
        """Prepares the data set.

        Args:
            parent: the sequences.
            length: tokens in a row.
            too_long: "stop" raises an error for a sequence that is too long; "skip" leaves it out and counts it.
            instead: replaces a sequence that is too long. With None, the next sequence that fits takes its place.
            patience: number of consecutive sequences that may be too long before `some_fit` is called.
            some_fit: whether any record fits. If none does, iteration stops with an error instead of searching forever.
        """
        super().__init__(parent)
        self.length, self.too_long, self.instead = length, too_long, instead
        self.patience, self.some_fit = patience, some_fit

    def __iter__(self) -> "_FittingIterator":
        return _FittingIterator(self, iter(self._parent))


class _FittingIterator(grain.DatasetIterator):
    def __init__(self, dataset: FittingDataset, parent: grain.DatasetIterator):
        super().__init__(parent)
        self._dataset, self._count, self._some_fit = dataset, 0, False

    def __next__(self) -> dict[str, np.ndarray]:
        settings = self._dataset
        for passed in itertools.count(1):
            built: Built = next(self._parent)
            if fits(built, settings.length, settings.too_long):
                break
            self._count += 1
            if settings.instead is not None:
                return _arrays(settings.instead)
            if passed >= settings.patience and not self._some_fit:
                self._some_fit = settings.some_fit()
                if not self._some_fit:
                    raise Emu3Error(f"no record fits a row of {settings.length} tokens: raise sequence_length")
        self._some_fit = True
        return _arrays(built)

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._parent.get_state(), "too_long": self._count}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._count = state["too_long"]


def _arrays(built: Built) -> dict[str, np.ndarray]:
    """The built sequence as arrays. Those of a pair's rejected side begin with "rejected_"."""
    sequence = built.sequence
    if isinstance(sequence, TokenSequence):
        return {"tokens": sequence.tokens, "loss_mask": sequence.loss_mask}
    sides = {"": sequence.chosen, "rejected_": sequence.rejected}
    arrays = {f"{prefix}{name}": getattr(side, name) for prefix, side in sides.items() for name in _OF_A_SEQUENCE}
    return arrays | {"pair": np.asarray(built.pair, np.int32)}


def padded_rows(
    sequences: FittingDataset, length: int, pad: int, loss_on_padding: bool = False
) -> grain.IterDataset[Batch]:
    """Rows that hold one sequence each."""
    return sequences.map(
        lambda arrays: padded_row(TokenSequence(**arrays), length, pad, loss_on_padding=loss_on_padding)
    )


def pair_rows(pairs: FittingDataset, batch_size: int, length: int, pad: int) -> grain.IterDataset[Batch]:
    """Batches of `batch_size` rows, two for each pair: the chosen side, then the rejected one."""

    def rows(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        chosen, rejected = (
            TokenSequence(*(arrays[f"{prefix}{name}"] for name in _OF_A_SEQUENCE)) for prefix in ("", "rejected_")
        )
        made = padded_pair(PairSequence(chosen, rejected), length, pad)
        return made | {"pair": np.repeat(arrays["pair"], 2)}

    def flat(batch: Batch) -> Batch:
        return {name: array.reshape(-1, *array.shape[2:]) for name, array in batch.items()}

    return pairs.map(rows).batch(batch_size // 2, drop_remainder=True).map(flat)


def packed_rows(sequences: grain.IterDataset, length: int, bins: int, pad: int) -> grain.IterDataset:
    """Rows that hold several sequences each. Fills `bins` rows at the same time, first-fit."""
    rows = grain.experimental.FirstFitPackIterDataset(
        sequences,
        length_struct={"tokens": length, "loss_mask": length},
        num_packing_bins=bins,
        shuffle_bins=False,
        meta_features=["loss_mask"],  # no segment ids for the mask: it has the same segments as the tokens
        padding_struct={"tokens": pad, "loss_mask": False},
    )
    names = {"segment_ids": "tokens_segment_ids", "positions": "tokens_positions"}
    return rows.map(lambda row: {name: row[names.get(name, name)] for name in ("tokens", *names, "loss_mask")})


def count_too_long(state: Any) -> int:
    """Finds the count of `_FittingIterator` in a nested state."""
    if not isinstance(state, Mapping):
        return 0
    return state.get("too_long", 0) + sum(map(count_too_long, state.values()))

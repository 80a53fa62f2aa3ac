"""Entries to prepare that need no pictures and no JAX; subprocesses of the tests use them too."""

import time
from collections.abc import Callable, Collection

import numpy as np

from emu3_jax.data.records import Record
from emu3_jax.errors import Emu3Error


class Entries:
    """`count` small records of codes below `codes`; those in `bad` are broken.

    `at` is called with each index, `made` lists those made.
    """

    def __init__(
        self,
        count: int = 23,
        bad: Collection[int] = (),
        digest: str = "d",
        at: Callable[[int], None] = lambda index: None,
        codes: int = 32768,
    ):
        self.count, self.bad, self.digest, self.at, self.codes = count, bad, digest, at, codes
        self.made: list[int] = []

    def __len__(self) -> int:
        return self.count

    def check(self, index: int) -> None:
        pass

    def __getitem__(self, index: int) -> Record:
        self.at(index)
        time.sleep(0.001 * (index * 7 % 5))  # some later entries are ready first
        self.made.append(index)
        if index in self.bad:
            raise Emu3Error(f"entry {index} is broken: mend it")
        shape = (2 + index % 3, 3 + index % 4)
        codes = np.random.default_rng(index).integers(0, self.codes, shape, np.int32)
        return Record(f"n{index}", f"text {index}", codes)

"""Memory-saving lists for millions of names or numbers."""

import array
import os


class PackedNames:
    """A list of file names. A million names of 30 characters take 40 MB."""

    def __init__(self) -> None:
        self._bytes, self._ends = bytearray(), array.array("q", [0])

    def append(self, name: str) -> None:
        """Adds a name. Names that are not UTF-8 are kept exactly."""
        self._bytes += os.fsencode(name)
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(bytes(self._bytes[self._ends[index] : self._ends[index + 1]]))


class PackedNumbers:
    """A list of tuples of `width` whole numbers."""

    def __init__(self, width: int):
        self._values, self._width = array.array("q"), width

    def append(self, *numbers: int) -> None:
        """Adds a tuple."""
        self._values.extend(numbers)

    def __len__(self) -> int:
        return len(self._values) // self._width

    def __getitem__(self, index: int) -> tuple[int, ...]:
        return tuple(self._values[index * self._width : (index + 1) * self._width])

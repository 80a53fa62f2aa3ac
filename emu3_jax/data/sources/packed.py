"""Lists of millions of names and numbers in little memory."""

import array
import os


class PackedNames:
    """A list of files' names: a million of 30 characters takes 40 MB."""

    def __init__(self) -> None:
        self._bytes, self._ends = bytearray(), array.array("q", [0])

    def append(self, name: str) -> None:
        """Adds a name as the file system gave it."""
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

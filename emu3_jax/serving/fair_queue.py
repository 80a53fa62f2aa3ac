"""A bounded queue that gives every client its turn."""

import collections
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Full(Exception):
    """The queue has no room. The words say whether that is so for one client or for all."""


class FairQueue(Generic[Item]):
    """Takes items of many clients in turn: each client's oldest item, one client after the other.

    A client may have fewer items than places are free, before it adds another one. So one client alone fills half of
    the queue, and there is room for a client that comes later. The client "" stands for callers without a name, and has
    no such limit. The queue is not safe for several threads.
    """

    def __init__(self, size: int):
        """`size` is the largest number of items, of all clients together."""
        self.size = size
        self._waiting: collections.OrderedDict[str, collections.deque[Item]] = collections.OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def put(self, client: str, item: Item) -> None:
        """Adds an item behind those of its client. Raises `Full` if there is no room."""
        free, own = self.size - len(self), len(self._waiting.get(client, ()))
        if free <= 0:
            raise Full("the queue is full")
        if client and own >= free:
            raise Full(f"{own} of your requests wait, which is your share of the queue")
        self._waiting.setdefault(client, collections.deque()).append(item)

    def take(self, wanted: Callable[[Item], bool]) -> Item | None:
        """Removes and returns the next item that is wanted, or returns None. Its client is then the last in turn."""
        for client, items in self._waiting.items():
            for item in items:
                if wanted(item):
                    self.remove(client, item)
                    if client in self._waiting:
                        self._waiting.move_to_end(client)
                    return item
        return None

    def remove(self, client: str, item: Item) -> bool:
        """Removes an item. Returns False if it is not there."""
        items = self._waiting.get(client)
        if items is None or item not in items:
            return False
        items.remove(item)
        if not items:
            del self._waiting[client]
        return True

    def clear(self) -> list[Item]:
        """Removes and returns all items."""
        found = [item for items in self._waiting.values() for item in items]
        self._waiting.clear()
        return found

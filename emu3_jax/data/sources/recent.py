"""A cache of results that several threads share."""

import collections
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

_K = TypeVar("_K")
_V = TypeVar("_V")


class Recent(Generic[_K, _V]):
    """Caches the most recent results of a function. If several threads need a result, one of them computes it."""

    def __init__(self, make: Callable[[_K], _V], held: int, room: int = 0, size: Callable[[_V], int] = lambda _: 0):
        """Makes an empty cache.

        Args:
            make: the function.
            held: number of results that it holds in any case.
            room: it holds more results while the sum of their sizes is less than this.
            size: the size of a result.
        """
        self._make, self._held, self._room, self._size = make, held, room, size
        self._used = 0
        self._lock = threading.Lock()
        self._results = collections.OrderedDict[_K, Future[_V]]()

    def __len__(self) -> int:
        return len(self._results)

    def __getitem__(self, key: _K) -> _V:
        """Returns the result for `key`, and computes it if necessary. Raises any error of the function."""
        with self._lock:
            missing = key not in self._results
            result = self._results.setdefault(key, Future())
            self._results.move_to_end(key)
        if missing:
            try:
                made = self._make(key)
            except BaseException as error:  # catch everything: other threads may be waiting for the result
                result.set_exception(error)
            else:
                with self._lock:
                    result.set_result(made)
                    if self._results.get(key) is result:
                        self._used += self._size(made)
        with self._lock:
            while len(self._results) > self._held and self._used >= self._room:
                _, oldest = self._results.popitem(last=False)
                if oldest.done() and oldest.exception() is None:
                    self._used -= self._size(oldest.result())
        return result.result()

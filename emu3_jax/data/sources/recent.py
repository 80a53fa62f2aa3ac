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

    def __init__(self, make: Callable[[_K], _V], held: int):
        """Makes an empty cache for `held` results of the function `make`."""
        self._make, self._held = make, held
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
            if len(self._results) > self._held:
                self._results.popitem(last=False)
        if missing:
            try:
                result.set_result(self._make(key))
            except BaseException as error:  # catch everything: other threads may be waiting for the result
                result.set_exception(error)
        return result.result()

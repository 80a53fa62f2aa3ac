"""Results that several threads share."""

import collections
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

_K = TypeVar("_K")
_V = TypeVar("_V")


class Recent(Generic[_K, _V]):
    """The newest results of a function. Whichever thread needs one first makes it, and the others wait for it."""

    def __init__(self, make: Callable[[_K], _V], held: int):
        """Takes the function and how many results are held."""
        self._make, self._held = make, held
        self._lock = threading.Lock()
        self._results = collections.OrderedDict[_K, Future[_V]]()

    def __len__(self) -> int:
        return len(self._results)

    def __getitem__(self, key: _K) -> _V:
        """The result for `key`. Raises what the function raised."""
        with self._lock:
            missing = key not in self._results
            result = self._results.setdefault(key, Future())
            self._results.move_to_end(key)
            if len(self._results) > self._held:
                self._results.popitem(last=False)
        if missing:
            try:
                result.set_result(self._make(key))
            except BaseException as error:  # whatever it is: other threads may wait
                result.set_exception(error)
        return result.result()

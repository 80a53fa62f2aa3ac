"""Functions of pictures that the user names as `FILE.py:NAME`: features, and metrics of pairs of pictures.

They run in this process, with the user's rights and a time limit. Their results are checked, and every error becomes
one line.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import local_path, read_bytes
from emu3_jax.printable import shown
from emu3_jax.user_code import TimedThread, TookTooLong, run_file, what_failed

_MAX_FILE = 10_000_000  # bytes of a Python file
_MAX_NAME = 100  # characters of a function's name, which stands in the figures


@dataclasses.dataclass(frozen=True)
class PictureFunction:
    """A function of pictures, ready to be called.

    Attributes:
        field: the config's field that names it, for error lines.
        place: `FILE.py:NAME`, for error lines.
        name: name of the function, for figures.
        file: absolute path of the file.
        call: the function.
        timeout: seconds that a call may take.
        thread: the thread that runs the function. It has also run the file, because libraries keep settings by thread.
    """

    field: str
    place: str
    name: str
    file: str
    call: Callable[..., Any]
    timeout: float
    thread: TimedThread

    @classmethod
    def load(cls, text: str, field: str, timeout: float) -> "PictureFunction":
        """Runs a Python file and takes a function from it. The file may import its neighbours.

        Args:
            text: `FILE.py:NAME`.
            field: the config's field that names it.
            timeout: seconds that running the file may take, and each call of the function.

        Raises:
            Emu3Error: the text has another form; the file cannot be read, fails or takes too long; or it has no such
                function.
        """
        if not is_function(text):
            raise Emu3Error(f"{field} is {shown(text)}: it must be FILE.py:NAME")
        file, _, name = text.rpartition(":")
        path = local_path(file)
        source = read_bytes(path, _MAX_FILE, "give a Python file")
        whole, thread = str(path.resolve()), TimedThread()
        with _running(f"{field} {text}", whole), contextlib.redirect_stdout(sys.stderr):
            if str(path.resolve().parent) not in sys.path:
                sys.path.append(str(path.resolve().parent))  # at the end: no neighbour may stand in for a library
            module = thread.call(lambda: run_file(whole, source, f"emu3_jax_{field}_file"), timeout)
        call = getattr(module, name, None)
        if not callable(call):
            raise Emu3Error(f"{field} {text}: the file defines no function {name}; correct the name")
        return cls(field, text, name, whole, call, timeout, thread)

    def __call__(self, *pictures: np.ndarray, dims: int) -> np.ndarray:
        """Calls the function, and checks what it returns.

        Args:
            pictures: the arguments, uint8 [N, H, W, 3] each. The function gets copies.
            dims: axes of the result: 2 for features, 1 for a number per picture.

        Returns:
            float64 [N, D] or [N], all finite.

        Raises:
            Emu3Error: the function fails, takes too long, or returns another shape, NaN or infinity.
        """
        where = f"{self.field} {self.place}"
        with _running(where, self.file), contextlib.redirect_stdout(sys.stderr):
            copies = [array.copy() for array in pictures]
            result = self.thread.call(lambda: np.asarray(self.call(*copies), np.float64), self.timeout)
        count = len(pictures[0])
        if result.ndim != dims or len(result) != count or not result.size:
            wanted = f"[{count}, D] with D > 0" if dims == 2 else f"[{count}]"
            raise Emu3Error(
                f"{where} returned an array of shape {list(result.shape)} for {count} pictures: return one of {wanted}"
            )
        if not np.isfinite(result).all():
            raise Emu3Error(f"{where} returned NaN or infinity: return finite numbers")
        return result


def is_function(text: Any) -> bool:
    """Whether a value has the form `FILE.py:NAME`."""
    file, _, name = text.rpartition(":") if isinstance(text, str) else ("", "", "")
    return file.endswith(".py") and name.isascii() and name.isidentifier() and len(name) <= _MAX_NAME


@contextlib.contextmanager
def _running(where: str, file: str) -> Iterator[None]:
    """Turns every exception of the user's code, even `SystemExit`, into a one-line `Emu3Error`."""
    try:
        yield
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except TookTooLong as error:
        raise Emu3Error(f"{where}: {error}; correct the file, or raise reconstruction.timeout") from error
    except BaseException as error:
        said, line = what_failed(error, file)
        raise Emu3Error(f"{where}{f' line {line}' if line else ''}: {said}; correct the file") from error

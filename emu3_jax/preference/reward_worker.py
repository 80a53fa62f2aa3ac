"""A worker process that computes rewards: `python -m emu3_jax.preference.reward_worker`, which `rewards` starts.

It reads requests from its standard input and writes answers to its standard output, each as a frame: the lengths of a
JSON header and of a body, the header, the body. The first request says which reward to load. Nothing is pickled.

It ends at once when its input ends, also while a reward is computed. So no worker outlives the process that started it.
"""

import inspect
import json
import os
import queue
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from emu3_jax.user_code import run_file, what_failed

_LENGTHS = struct.Struct(">QQ")  # bytes of the header and of the body

# A reward: gets prompts and one picture for each, uint8 [H, W, 3], or one clip, uint8 [T, H, W, 3], and returns one
# number for each. Or it gets prompts, one answer for each, and, if it takes them, one reference answer for each, which
# may be None.
RewardFunction = Callable[..., Any]


def write_frame(stream: BinaryIO, header: Any, body: Sequence[bytes | memoryview] = ()) -> None:
    """Writes a frame. `header` is any JSON value; numbers may be NaN or infinite."""
    line = json.dumps(header).encode()
    stream.write(_LENGTHS.pack(len(line), sum(len(part) for part in body)))
    stream.write(line)
    for part in body:
        stream.write(part)
    stream.flush()


def read_frame(stream: BinaryIO) -> tuple[Any, bytes] | None:
    """Reads a frame: its header and its body. Returns None if the stream has ended."""
    lengths = stream.read(_LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        return None
    header, body = _LENGTHS.unpack(lengths)
    line, data = stream.read(header), stream.read(body)
    return (json.loads(line), data) if len(line) == header and len(data) == body else None


def load_file(file: str, name: str) -> RewardFunction:
    """Runs a Python file, and returns its function `name`. The file may import its neighbours.

    Raises:
        ValueError: there is no such function. Errors of the file pass unchanged.
    """
    path = Path(file)
    sys.path.append(str(path.parent))  # at the end: no neighbour may stand in for a library
    module = run_file(file, path.read_bytes(), "emu3_jax_reward_file")
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"the file defines no function {name}")
    return function


def reason(error: BaseException, file: str | None) -> str:
    """One line about an error of a reward: its type and message, and its line in `file`."""
    said, line = what_failed(error, file)
    return said + (f" (line {line})" if line else "")


def numbers(result: Any, count: int, what: str) -> list[float]:
    """The rewards as a list of floats. Raises `ValueError` if they are not `count` numbers."""
    values = np.asarray(result, np.float64)
    if values.shape != (count,):
        found = f"{len(values)} numbers" if values.ndim == 1 else f"an array of shape {list(values.shape)}"
        raise ValueError(f"it returned {found} for {count} {what}")
    return values.tolist()


def pictures(shapes: Sequence[tuple[int, ...]], body: bytes) -> list[np.ndarray]:
    """The pictures of a request, uint8 [H, W, 3] each, or its clips, [T, H, W, 3] each."""
    found, place = [], 0
    for shape in shapes:
        size = int(np.prod(shape))
        found.append(np.frombuffer(body, np.uint8, size, place).reshape(shape))
        place += size
    return found


def takes_references(function: RewardFunction) -> bool:
    """Whether a reward of answers has a third positional parameter, for the reference answers."""
    try:
        inspect.signature(function).bind(None, None, None)
    except (TypeError, ValueError):  # a built-in function may have no signature
        return False
    return True


def _rewards(function: RewardFunction, header: dict[str, Any], body: bytes) -> list[float]:
    """The rewards of a request, which has pictures or answers."""
    prompts = header["prompts"]
    if "answers" not in header:
        clips = header["shapes"] and len(header["shapes"][0]) == 4
        given = pictures(header["shapes"], body)
        return numbers(function(prompts, given), len(prompts), "clips" if clips else "pictures")
    references = [header["references"]] if takes_references(function) else []
    return numbers(function(prompts, header["answers"], *references), len(prompts), "answers")


def _load(spec: dict[str, Any]) -> RewardFunction:
    if spec["file"] is not None:
        return load_file(spec["file"], spec["function"])
    from emu3_jax.preference.shipped_rewards import SHIPPED

    return SHIPPED[spec["function"]](**spec["settings"])


def main() -> None:
    """Serves requests until the input ends."""
    # What the reward prints goes to standard error, and it cannot read the requests.
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    requests: queue.SimpleQueue[tuple[Any, bytes]] = queue.SimpleQueue()

    def read() -> None:
        while (frame := read_frame(source)) is not None:
            requests.put(frame)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    spec, _ = requests.get()
    file = spec["file"]
    try:
        function = _load(spec)
    except BaseException as error:  # the file may also exit
        write_frame(sink, {"error": reason(error, file)})
        return
    write_frame(sink, {})
    while True:
        header, body = requests.get()
        try:
            answer: dict[str, Any] = {"rewards": _rewards(function, header, body)}
        except BaseException as error:
            answer = {"error": reason(error, file)}
        write_frame(sink, answer)


if __name__ == "__main__":
    main()

"""Rewards: Python functions of prompts and pictures or answers, computed in batches by workers with time-outs.

A reward is a function of a file that the user names, `FILE.py:NAME`, or one of `SHIPPED` or `FOR_ANSWERS`. It gets a
list of prompts and a list of as many pictures, NumPy arrays uint8 [H, W, 3], clips, uint8 [T, H, W, 3], or answers,
texts. It returns one number
for each; larger is better. If a reward of answers takes a third list, it gets the reference answers; each is a text, or
None where the question has none.

Workers are new Python processes, never forks: a fork of a process that uses JAX may hang. JAX in a worker uses the CPU,
because accelerators belong to the process that draws.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from emu3_jax.errors import Emu3Error
from emu3_jax.fields import is_count, is_number
from emu3_jax.foreign import local_path, read_bytes
from emu3_jax.preference.reward_worker import read_frame, write_frame
from emu3_jax.printable import shown

SHIPPED = ("procedural", "judge")  # rewards of pictures without a file, see `shipped_rewards`
FOR_ANSWERS = ("answer_length", "answer_format", "answer_match")  # rewards of answers, see `answer_rewards`
TIMEOUT = 60.0  # seconds that a call of a reward may take
START_TIMEOUT = 600.0  # seconds that loading a reward may take: its file may load a model
BATCH_SIZE = 32
MOST_WORKERS = 256
MOST_SECONDS = 1_000_000  # threads cannot wait for any time
_VERSION = 1  # raise it when a shipped reward changes
_MAX_FILE = 10_000_000  # bytes of a file of rewards
_ENDED = "the run ended"


@dataclasses.dataclass(frozen=True)
class Reward:
    """Which function computes rewards.

    Attributes:
        name: name of the reward, for results and error lines.
        function: name of the function in `file`, or of the shipped reward.
        file: path of the Python file, or None for a shipped reward.
        settings: arguments of a shipped reward, which fit into JSON.
    """

    name: str
    function: str
    file: str | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(
        cls,
        text: str,
        name: str | None = None,
        settings: Mapping[str, Any] | None = None,
        shipped: Sequence[str] = SHIPPED,
    ) -> "Reward":
        """The reward that a text such as `rewards.py:brightness` or `procedural` names.

        Args:
            text: FILE.py:NAME, or a name of `shipped`.
            name: name for results; by default the function's.
            settings: arguments of a shipped reward.
            shipped: names of the shipped rewards that suit: `SHIPPED` or `FOR_ANSWERS`.

        Raises:
            Emu3Error: the text has another form, the file does not exist, or a name is no Python identifier.
        """
        legal = f"FILE.py:NAME, or {' or '.join(shipped)}"
        file, colon, function = text.rpartition(":")
        if not colon and text not in shipped:
            raise Emu3Error(f"reward is {shown(text)}: it must be {legal}")
        name = function if name is None else name
        for what, value in (("function", function), ("name", name)):
            if not (value.isascii() and value.isidentifier() and len(value) <= 100):
                raise Emu3Error(f"reward {shown(text)}: the {what} {shown(value)} is no Python name; give {legal}")
        if not colon:
            return cls(name, function, None, settings or {})
        path = local_path(file)
        if path.suffix != ".py":
            raise Emu3Error(f"reward {shown(text)}: {file} is no Python file (.py); give {legal}")
        read_bytes(path, _MAX_FILE, "give a Python file")
        return cls(name, function, str(path.resolve()))

    def digest(self) -> str:
        """SHA-256 of what computes the reward: the file's contents, or the shipped reward and its settings."""
        settings = dict(self.settings)
        if "file" in settings:
            settings["file"] = Path(settings["file"]).name  # of the judge: its name is a hash of all that made it
        source = _VERSION if self.file is None else hashlib.sha256(Path(self.file).read_bytes()).hexdigest()
        parts = [source, self.function, settings]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """The pictures of one prompt, uint8 [H, W, 3] each, or its clips, uint8 [T, H, W, 3] each."""

    prompt: str
    pictures: Sequence[np.ndarray]

    def __len__(self) -> int:
        return len(self.pictures)


@dataclasses.dataclass(frozen=True, eq=False)
class AnswerGroup:
    """The answers to one question, and its reference answer, if there is one. A pool gets one kind of groups."""

    prompt: str
    answers: Sequence[str]
    reference: str | None

    def __len__(self) -> int:
        return len(self.answers)


AnyGroup = Group | AnswerGroup


@dataclasses.dataclass(frozen=True, eq=False)
class Scored:
    """The result of a group.

    Attributes:
        rewards: float64 [number of pictures or answers], all finite; None if the group was skipped.
        reason: why the group was skipped; empty if it was not.
    """

    rewards: np.ndarray | None
    reason: str = ""


class RewardFailure(Exception):
    """A call of a reward failed. The message is the reason."""


class RewardPool:
    """Worker processes that compute one reward. Use it as a context manager, or call `close`.

    A group whose reward raises an error, returns NaN, infinity or the wrong number of numbers, or takes too long, is
    skipped with a reason. The worker of a call that took too long is killed, and a new one takes its place.
    """

    def __init__(
        self,
        reward: Reward,
        *,
        workers: int = 1,
        timeout: float = TIMEOUT,
        batch_size: int = BATCH_SIZE,
        start_timeout: float = START_TIMEOUT,
    ):
        """Starts no process yet.

        Args:
            reward: the reward.
            workers: number of worker processes.
            timeout: seconds that a call of the reward may take.
            batch_size: most pictures or answers of a call. A group is never split, so a large one makes a larger call.
            start_timeout: seconds that loading the reward may take.

        Raises:
            Emu3Error: a value is not legal.
        """
        if not is_count(workers) or workers > MOST_WORKERS:
            raise Emu3Error(f"workers is {shown(workers)}: it must be a whole number from 1 to {MOST_WORKERS}")
        if not is_count(batch_size):
            raise Emu3Error(f"batch_size is {shown(batch_size)}: it must be a whole number >= 1")
        for name, seconds in (("timeout", timeout), ("start_timeout", start_timeout)):
            if not is_number(seconds) or not 0 < seconds <= MOST_SECONDS:
                raise Emu3Error(f"{name} is {shown(seconds)}: it must be above 0 and at most {MOST_SECONDS:,} seconds")
        self._batch_size = batch_size
        self._workers = [_Worker(reward, timeout, start_timeout) for _ in range(workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="rewards")

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers, also while they compute."""
        for worker in self._workers:
            worker.end()
        self._executor.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.release()

    def start(self) -> None:
        """Starts all workers now and waits until they have loaded the reward. Without it, the first calls do this.

        Raises:
            Emu3Error: the reward cannot be loaded.
        """
        list(self._executor.map(_Worker.ready, self._workers))

    def score(self, groups: Iterable[AnyGroup]) -> Iterator[Scored]:
        """Yields a result for each group, in order. Takes few groups in advance.

        Raises:
            Emu3Error: the reward cannot be loaded.
        """
        pending: collections.deque[Future[list[Scored]]] = collections.deque()
        for batch in _batches(groups, self._batch_size):
            pending.append(self._executor.submit(self._score, batch))
            if len(pending) > 2 * len(self._workers):
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()

    def _score(self, batch: Sequence[AnyGroup]) -> list[Scored]:
        worker = self._idle.get()
        try:
            return _score(worker, batch)
        finally:
            self._idle.put(worker)


def _batches(groups: Iterable[AnyGroup], size: int) -> Iterator[list[AnyGroup]]:
    """Whole groups with at most `size` pictures or answers, or single larger groups."""
    batch: list[AnyGroup] = []
    for group in groups:
        if batch and sum(len(one) for one in [*batch, group]) > size:
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def _score(worker: "_Worker", batch: Sequence[AnyGroup]) -> list[Scored]:
    """The results of a batch. If the call fails, each group is tried alone, so a bad one spoils no other."""
    try:
        rewards = worker.call(batch)
    except RewardFailure as failure:
        if len(batch) == 1:
            return [Scored(None, str(failure))]
        return [one for group in batch for one in _score(worker, [group])]
    ends = np.cumsum([len(group) for group in batch])[:-1]
    what = "answer" if isinstance(batch[0], AnswerGroup) else "picture"
    return [_finite(part, what) for part in np.split(np.asarray(rewards, np.float64), ends)]


def _finite(rewards: np.ndarray, what: str) -> Scored:
    wrong = np.flatnonzero(~np.isfinite(rewards))
    if wrong.size:
        return Scored(None, f"it returned {rewards[wrong[0]]} for {what} {wrong[0]} of the prompt")
    return Scored(rewards)


def _request(batch: Sequence[AnyGroup]) -> tuple[dict[str, Any], list[memoryview]]:
    """The header and the body of a request, see `reward_worker`."""
    header: dict[str, Any] = {"prompts": [group.prompt for group in batch for _ in range(len(group))]}
    arrays: list[np.ndarray] = []
    answers: list[str] = []
    references: list[str | None] = []
    for group in batch:
        if isinstance(group, AnswerGroup):
            answers += group.answers
            references += [group.reference] * len(group)
        else:
            arrays += [np.ascontiguousarray(picture, np.uint8) for picture in group.pictures]
    if answers:
        return header | {"answers": answers, "references": references}, []
    return header | {"shapes": [array.shape for array in arrays]}, [array.data.cast("B") for array in arrays]


# ------------------------------------------------------------------------------------------------ one worker


class _Worker:
    """One worker process. It starts at the first call, and again after it was killed."""

    def __init__(self, reward: Reward, timeout: float, start_timeout: float):
        self._reward, self._timeout, self._start_timeout = reward, timeout, start_timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._lock = threading.Lock()  # between `close` and a start

    def call(self, batch: Sequence[AnyGroup]) -> list[float]:
        """The rewards of a whole batch. Raises `RewardFailure`, or `Emu3Error` if the worker cannot start."""
        header, body = _request(batch)
        self.ready()
        answer = self._exchange(header, body, self._timeout)
        if "error" in answer:
            raise RewardFailure(answer["error"])
        return answer["rewards"]

    def ready(self) -> None:
        """Starts the process if there is none. Raises as `call`."""
        if self._process is None:
            self._start()

    def _start(self) -> None:
        root = str(Path(__file__).parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
        with self._lock:
            if self._closed:
                raise RewardFailure(_ENDED)
            # -P: no module of the working directory may stand in for a library. The new session gives the worker and
            # its children one process group to kill, and keeps Ctrl-C from them.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "emu3_jax.preference.reward_worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True,
            )  # fmt: skip
        spec = {"file": self._reward.file, "function": self._reward.function, "settings": dict(self._reward.settings)}
        try:
            answer = self._exchange(spec, [], self._start_timeout)
        except RewardFailure as failure:
            answer = {"error": str(failure)}
        if "error" in answer:
            self.release()
            if self._closed:
                raise RewardFailure(_ENDED)
            where = self._reward.function if self._reward.file is None else self._reward.file
            raise Emu3Error(f"reward {self._reward.name} cannot be loaded from {where}: {answer['error']}; correct it")

    def _exchange(self, header: Any, body: Sequence[memoryview], seconds: float) -> dict[str, Any]:
        """Sends a request and waits for the answer. Kills the process after `seconds`. Raises `RewardFailure`."""
        process = self._process
        assert process is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            _kill_group(process)

        timer = threading.Timer(seconds, stop)
        timer.daemon = True
        timer.start()
        try:
            with contextlib.suppress(OSError):  # a process that died says so when its answer is read
                write_frame(cast(BinaryIO, process.stdin), header, body)
            frame = read_frame(cast(BinaryIO, process.stdout))
        finally:
            timer.cancel()
        if frame is not None and not late.is_set():
            return frame[0]
        self.release()
        if late.is_set():
            raise RewardFailure(f"it took longer than {seconds:g} s")
        raise RewardFailure(f"its process ended with code {process.returncode}")

    def release(self) -> None:
        """Kills the process, if there is one, and closes its streams. Not while another thread calls."""
        process, self._process = self._process, None
        if process is None:
            return
        _kill_group(process)
        process.wait()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # unsent bytes for a process that is gone
                cast(BinaryIO, stream).close()

    def end(self) -> None:
        """Kills the process for good. A call that waits for it then fails."""
        with self._lock:
            self._closed = True
            process = self._process
        if process is not None:
            _kill_group(process)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)

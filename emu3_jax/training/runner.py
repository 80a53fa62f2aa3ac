"""The runner of every training run: steps, stop signals, reports, checkpoints, evaluations, pictures and the export.

What is trained is a `Job`: `training.loop` has the decoder's, `training.vision` the vision tokenizer's.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from emu3_jax import distributed, files, storage
from emu3_jax.errors import Emu3Error
from emu3_jax.files import files_into
from emu3_jax.media.images import save_png
from emu3_jax.training.metrics import Metrics
from emu3_jax.training.run_directory import Checkpoints, Identity, locked, write_identity

_STOPPING = b"\nemu3-jax: stopping after this step; Ctrl-C again ends at once\n"
_ONE_PRESS = 0.3  # seconds; a terminal and a launcher may both pass on the same Ctrl-C

State = Any  # a pytree of arrays: all that a step changes
Batch = Mapping[str, np.ndarray]  # this process' rows


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        step: the steps taken in all.
        model: the bundle with the trained weights, or the directory of the adapter alone; None where the run was asked
            to stop before its last step.
        skipped: how often a record was too long for a row and was left out.
        signal: that asked it to stop, SIGINT or SIGTERM; None where it went to its last step.
    """

    step: int
    model: pathlib.Path | None
    skipped: int = 0
    signal: int | None = None


class Due(NamedTuple):
    """What is to be done after a step."""

    evaluate: bool
    sample: bool
    save: bool


@dataclasses.dataclass(frozen=True)
class Cadence:
    """When a run does what. All is counted in steps; after the last one everything is done.

    Attributes:
        steps: of the run.
        watch_every: steps between those whose figures the host waits for, checks and shows.
        look_behind: how many further steps are started before the host waits for one, so that no device waits for the
            host.
        log_every: a watched step becomes a line of metrics if its number is a multiple of this, or it is the last.
        checkpoint_every: steps between checkpoints.
        keep: checkpoints that are kept, the newest.
        evaluate_every: steps between evaluations, or None.
        sample_every: steps between pictures, or None.
        profile: first step, counted from where the run begins or resumes, and number of steps to profile, or None.
    """

    steps: int
    watch_every: int
    look_behind: int
    log_every: int
    checkpoint_every: int
    keep: int
    evaluate_every: int | None = None
    sample_every: int | None = None
    profile: tuple[int, int] | None = None

    def due(self, step: int, stopping: bool) -> Due:
        """What is to be done after `step`; a run that is to stop is saved first."""
        last = step == self.steps

        def now(every: int | None) -> bool:
            return every is not None and (last or step % every == 0)

        return Due(now(self.evaluate_every), now(self.sample_every), stopping or now(self.checkpoint_every))


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The evaluation of one set of data.

    Attributes:
        name: its metrics are of the group `evaluation/NAME`.
        figures: the metrics.
        note: what the terminal says of it; empty for nothing.
        picture: is kept in `samples/`, or None.
    """

    name: str
    figures: Mapping[str, float]
    note: str = ""
    picture: Image.Image | None = None


class Job(Protocol):
    """What a run trains, and on what.

    A job is made before the run's directory is held, and its constructor refuses all bad input that can be told by
    then: it writes nothing. All processes of a run call the same methods in the same order.
    """

    @property
    def cadence(self) -> Cadence: ...

    @property
    def identity(self) -> Identity:
        """What `run.json` says."""

    @property
    def product(self) -> str:
        """What `export` writes: its name in the run's directory, "model" or "adapter"."""

    @property
    def share(self) -> tuple[int, int]:
        """Which share of the data this process reads, and how many shares there are."""

    def abstract_state(self) -> State:
        """Shapes, dtypes and shardings of a state."""

    def initial_state(self) -> State:
        """The state before the first step."""

    def start(self, step: int, position: Any | None) -> None:
        """Moves the data to after `step` steps. Called once, before `next_batch`.

        Args:
            step: 0 in a new run.
            position: what `position` returned when the checkpoint of `step` was written; None in a new run.

        Raises:
            Emu3Error: the position is of other data.
        """

    def position(self) -> Any:
        """Where this process' data stand after the last batch, JSON-able."""

    def next_batch(self) -> Batch:
        """The next batch."""

    def step(self, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        """Starts a step and does not wait for it. `state` is donated.

        Returns:
            The new state, and scalars, among them `loss` and `gradient_norm`, which must be finite.
        """

    def report(self, figures: dict[str, float], seconds: float) -> tuple[dict[str, float], str]:
        """The metrics of a step that took `seconds`, and what stands beside the bar."""

    def not_finite(self, step: int, batch: Batch, directory: pathlib.Path) -> tuple[str, str]:
        """Where a step whose loss is not finite is to be looked for, and what to do. May keep its batch."""

    def evaluate(self, state: State) -> Iterator[Evaluation]:
        """Evaluates every set of data there is."""

    def sample(self, state: State) -> Sequence[Image.Image]:
        """Pictures by the model as it is; their `info` is kept."""

    def skipped(self) -> int:
        """How often a record was left out so far, over all shares."""

    def export(self, directory: pathlib.Path, target: pathlib.Path, step: int) -> Any:
        """Writes the checkpoint of `step` in the run's directory as `target`: a bundle, or an adapter."""


def run(job: Job, directory: pathlib.Path, progress: bool | None) -> Outcome:
    """Trains from the last checkpoint in `directory`, or from the start, to the last step.

    Asked to stop by Ctrl-C, or by SIGTERM, as machines are before they are taken away, it writes a checkpoint and
    returns.

    Args:
        job: what is trained.
        directory: of the run.
        progress: a bar on stderr; by default if that is a terminal.

    Raises:
        Emu3Error: the directory is in use or of another run, a loss is not finite, or files cannot be written. The
            checkpoints that were written stay. Errors of the job pass through.
    """
    with locked(directory), contextlib.ExitStack() as stack:
        write_identity(directory, job.identity)
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(directory, job.cadence.keep)))
        state, step = _start(job, directory, checkpoints)
        metrics = None
        if distributed.first():
            metrics = stack.enter_context(contextlib.closing(Metrics(directory, step)))
        with _bar(job.cadence.steps, step, progress) as bar, stop_signal() as stop:
            loop = _Loop(job, directory, state, step, checkpoints=checkpoints, metrics=metrics, bar=bar)
            # A signal does not interrupt the export: it ends complete.
            model = _export(job, directory, loop.step) if loop.train(stop) else None
        return Outcome(loop.step, model, job.skipped(), None if model else next(iter(stop), signal.SIGTERM))


def _start(job: Job, directory: pathlib.Path, checkpoints: Checkpoints) -> tuple[State, int]:
    """The state that the run goes on from, and the steps that were taken; the job's data stand there too."""
    step, steps = checkpoints.latest(), job.cadence.steps
    if step is None:
        job.start(0, None)
        return job.initial_state(), 0
    if step > steps:
        raise Emu3Error(f"{directory} is at step {step}, the config ends at {steps}: raise steps")
    group, groups = job.share
    state, position = checkpoints.restore(step, job.abstract_state(), group, groups)
    job.start(step, position)
    return state, step


def _bar(steps: int, step: int, progress: bool | None) -> tqdm:
    disable = None if progress is None else not progress
    if not distributed.first():
        disable = True
    return tqdm(total=steps, initial=step, unit=" steps", disable=disable, leave=False)


def _export(job: Job, directory: pathlib.Path, step: int) -> pathlib.Path:
    """The trained model, or its adapter, in the run's directory, from the checkpoint on disk."""
    target, new = directory / job.product, directory / f"{job.product}.new"
    if storage.is_remote(directory):  # written here first, and uploaded: there is nothing to rename
        if distributed.first():
            storage.delete(target)
            job.export(directory, target, step)
    elif distributed.first():
        files.remove(new)
        job.export(directory, new, step)
        files.remove(target)
        new.rename(target)
    distributed.wait("the model is written")
    return target


class _Step(NamedTuple):
    """A step that was started."""

    number: int
    figures: dict[str, jax.Array]
    batch: Batch


class _Loop:
    """The steps of a run whose directory is held.

    Attributes:
        step: the steps taken.
        state: after them.
    """

    def __init__(
        self,
        job: Job,
        directory: pathlib.Path,
        state: State,
        step: int,
        *,
        checkpoints: Checkpoints,
        metrics: Metrics | None,
        bar: tqdm,
    ):
        """`metrics` is None in all processes but the first."""
        self.state, self.step = state, step
        self._job, self._directory = job, directory
        self._checkpoints, self._metrics, self._bar = checkpoints, metrics, bar
        self._clock, self._reported = time.perf_counter(), step

    def train(self, stop: Sequence[int]) -> bool:
        """Takes the steps that are left. Returns False where the run was asked to stop before the last one."""
        cadence, began = self._job.cadence, self.step
        pending: _Step | None = None
        stopping = False
        with self._profiler() as profile:
            while self.step < cadence.steps and not stopping:
                profile(self.step - began)
                taken = self._take()
                # The host looks at a step while later ones run.
                if pending and taken.number - pending.number >= cadence.look_behind:
                    self._report(pending)
                    pending = None
                stopping = self._stopping(stop)
                due = cadence.due(self.step, stopping)
                if any(due):
                    self._report(taken)  # a state that is not finite must not be kept
                    pending = None
                    self._do(due)
                elif pending is None and self.step % cadence.watch_every == 0:
                    pending = taken
            self._checkpoints.finish(self.step)
        return self.step == cadence.steps

    def _take(self) -> _Step:
        batch = self._job.next_batch()
        self.state, figures = self._job.step(self.state, batch)
        self.step += 1
        return _Step(self.step, figures, batch)

    def _stopping(self, stop: Sequence[int]) -> bool:
        if jax.process_count() > 1:
            return self._checkpoints.reached_preemption(self.step)
        return bool(stop)

    def _do(self, due: Due) -> None:
        """What is due between two steps; its time counts for neither."""
        if due.evaluate:
            for evaluation in self._job.evaluate(self.state):
                self._tell(evaluation)
        if due.sample:
            pictures = self._job.sample(self.state)
            self._show(f"{self.step:08d}", {f"{index:03d}.png": picture for index, picture in enumerate(pictures)})
        if due.save:
            group, _ = self._job.share
            self._checkpoints.save(self.step, self.state, self._job.position(), group)
            if self._metrics:
                self._metrics.keep()
        self._clock = time.perf_counter()

    # -------------------------------------------------------------------------------------------- what users see

    def _report(self, taken: _Step) -> None:
        """Waits for a step's figures, checks them and shows them."""
        figures = {name: float(value) for name, value in taken.figures.items()}
        now = time.perf_counter()
        if not (math.isfinite(figures["loss"]) and math.isfinite(figures["gradient_norm"])):
            self._stop_not_finite(taken, figures)
        seconds = (now - self._clock) / (taken.number - self._reported)
        self._clock, self._reported = now, taken.number
        line, note = self._job.report(figures, seconds)
        cadence = self._job.cadence
        if self._metrics and (taken.number % cadence.log_every == 0 or taken.number == cadence.steps):
            self._metrics.write(taken.number, line)
        self._bar.update(taken.number - self._bar.n)
        self._bar.set_postfix_str(note)

    def _stop_not_finite(self, taken: _Step, figures: Mapping[str, float]) -> None:
        where, remedy = self._job.not_finite(taken.number, taken.batch, self._directory)
        self._checkpoints.finish(taken.number)
        last = self._checkpoints.latest()
        kept = "there is no checkpoint yet" if last is None else f"the checkpoint of step {last} is kept"
        raise Emu3Error(
            f"the loss is {figures['loss']} and the gradient's norm {figures['gradient_norm']} at {where}; {kept}; "
            f"{remedy}, then run again"
        )

    def _tell(self, evaluation: Evaluation) -> None:
        if self._metrics:
            self._metrics.write(self.step, evaluation.figures, f"evaluation/{evaluation.name}")
        if evaluation.picture:
            self._show("", {f"{self.step:08d}.png": evaluation.picture})
        if evaluation.note and not self._bar.disable:
            self._bar.write(f"step {self.step}, {evaluation.name}: {evaluation.note}", file=sys.stderr)

    def _show(self, folder: str, pictures: Mapping[str, Image.Image]) -> None:
        """Writes pictures to a folder of `samples/`, by their names."""
        if distributed.first():
            with files_into(self._directory / "samples" / folder) as directory:
                for name, picture in pictures.items():
                    save_png(picture, directory / name, {str(key): str(text) for key, text in picture.info.items()})

    # -------------------------------------------------------------------------------------------- profiles

    @contextlib.contextmanager
    def _profiler(self) -> Iterator[Callable[[int], None]]:
        """A function of the steps taken since the start, which records those that the cadence names."""
        window, place = self._job.cadence.profile, self._directory / "profile"
        running = False
        with contextlib.ExitStack() as stack:
            remote = window is not None and storage.is_remote(place)
            folder = stack.enter_context(files.local_directory()) if remote else place

            def stop() -> None:
                nonlocal running
                running = False
                jax.profiler.stop_trace()
                if remote:
                    storage.upload(folder, place, progress=False)

            def profile(taken: int) -> None:
                nonlocal running
                if window and taken == window[0]:
                    jax.block_until_ready(self.state)
                    jax.profiler.start_trace(str(folder))
                    running = True
                elif window and running and taken == sum(window):
                    jax.block_until_ready(self.state)
                    stop()

            try:
                yield profile
            finally:
                if running:
                    stop()


class _Interrupt:
    """The handler of Ctrl-C while a run trains: the first one asks it to stop, a second one interrupts it."""

    def __init__(self, received: list[int]):
        self._received, self._several = received, jax.process_count() > 1
        self._came = math.inf
        self._told = False

    def tell(self) -> None:
        """Says once what will happen. Where a program compiles for minutes, the handler itself waits for its end: who
        hears of the signal before calls this."""
        if not self._told:
            self._told = True
            with contextlib.suppress(OSError):
                os.write(2, _STOPPING)  # the signal may come in the middle of `sys.stderr.write`

    def __call__(self, number: int, frame: types.FrameType | None) -> None:
        now = time.monotonic()
        if now - self._came > _ONE_PRESS:
            raise KeyboardInterrupt
        if self._came < math.inf:
            return  # a terminal and a launcher both passed on the first
        self._came = now
        self.tell()
        self._received.append(number)
        if self._several:  # JAX waits for this one, to agree with the other processes on the last step
            signal.raise_signal(signal.SIGTERM)


@contextlib.contextmanager
def stop_signal() -> Iterator[list[int]]:
    """A list that SIGTERM and Ctrl-C put their numbers into; elsewhere than in the main thread it stays empty.

    Where there are several processes JAX itself waits for SIGTERM, to tell them all (`reached_preemption`).
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    handlers: dict[int, Any] = {signal.SIGINT: _Interrupt(received)}
    if jax.process_count() == 1:
        handlers[signal.SIGTERM] = lambda number, _: received.append(number)
    old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield received
    finally:
        for number, handler in old.items():
            if handler is not None:  # one that was not installed from Python
                signal.signal(number, handler)

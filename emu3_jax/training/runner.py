"""The training loop of every run: steps, stop signals, reports, checkpoints, evaluations, sample pictures, export.

A `Job` says what is trained. `training.decoder_job` defines the decoder's job, `training.vision` that of the vision
tokenizer.
"""

import contextlib
import dataclasses
import math
import pathlib
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from PIL import Image

from emu3_jax import distributed, files, storage
from emu3_jax.errors import Emu3Error
from emu3_jax.files import files_into
from emu3_jax.media.images import save_png
from emu3_jax.printable import printable
from emu3_jax.progress import Progress, duration
from emu3_jax.training.metrics import Metrics, read_metrics
from emu3_jax.training.run_directory import Checkpoints, Identity, locked, write_identity
from emu3_jax.training.stopping import stop_signal
from emu3_jax.training.summary import counted

_EARLIER = 20  # lines of metrics from which a resumed run estimates its remaining time

State = Any  # a pytree of arrays: everything that a step changes
Batch = Mapping[str, np.ndarray]  # this process' rows


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        step: number of the last step that was taken.
        model: path of the bundle with the trained weights, or of the exported adapter. None if the run was stopped
            before its last step.
        skipped: number of times that a record was skipped because it was longer than a row.
        signal: number of the signal that stopped the run (SIGINT or SIGTERM). None if it reached its last step.
    """

    step: int
    model: pathlib.Path | None
    skipped: int = 0
    signal: int | None = None


class Due(NamedTuple):
    """What the loop must do after a step."""

    evaluate: bool
    sample: bool
    save: bool


@dataclasses.dataclass(frozen=True)
class Cadence:
    """How often a run reports, saves, evaluates and samples, in steps. After the last step it does all of these.

    Attributes:
        steps: total number of steps.
        watch_every: number of steps between two steps whose figures the host waits for, checks and shows.
        look_behind: number of later steps that are started before the host waits for a step's figures, so that the
            devices never wait for the host.
        log_every: a watched step is written to the metrics and the log if its number is a multiple of this, or if it
            is the last step.
        checkpoint_every: number of steps between two checkpoints.
        keep: number of checkpoints to keep. Older ones are deleted.
        evaluate_every: number of steps between two evaluations, or None for no evaluation.
        sample_every: number of steps between two sets of sample pictures, or None for no pictures.
        profile: (steps to skip, steps to record) of a profile, counted from where the run starts or resumes, or None.
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
        """What the loop must do after `step`. A run that is about to stop (`stopping`) always saves."""
        last = step == self.steps

        def now(every: int | None) -> bool:
            return every is not None and (last or step % every == 0)

        return Due(now(self.evaluate_every), now(self.sample_every), stopping or now(self.checkpoint_every))


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of evaluating one data set.

    Attributes:
        name: name of the data set. Its metrics get the group `evaluation/NAME`.
        figures: the metrics.
        note: text of its line on standard error.
        picture: picture to save in `samples/`, or None.
    """

    name: str
    figures: Mapping[str, float]
    note: str
    picture: Image.Image | None = None


class Job(Protocol):
    """What a run trains, and on which data.

    A job is constructed before the run's directory is locked. Its constructor raises on all bad input that can be
    found by then, and writes nothing. All processes of a run call the same methods in the same order.
    """

    @property
    def cadence(self) -> Cadence: ...

    @property
    def identity(self) -> Identity:
        """The contents of `run.json`."""

    @property
    def product(self) -> str:
        """Name of the exported directory inside the run's directory: "model" or "adapter"."""

    @property
    def share(self) -> tuple[int, int]:
        """Index of the share of the data that this process reads, and the number of shares."""

    def describe(self) -> list[str]:
        """Lines for the user: what is trained, data, devices, and memory as far as it is known before compilation."""

    def step_memory(self) -> str:
        """Device memory of a compiled step, as text for the user. Empty before the first step, or if unknown."""

    def usage(self, model: pathlib.Path) -> str:
        """A command line that uses the exported model or adapter at `model`."""

    def abstract_state(self) -> State:
        """Shapes, dtypes and shardings of a state."""

    def initial_state(self) -> State:
        """The state before the first step."""

    def start(self, step: int, positions: Sequence[Any] | None) -> None:
        """Moves the data iterator to its position after `step` steps. Called once, before `next_batch`.

        Args:
            step: number of steps already taken; 0 in a new run.
            positions: the values of `position()` of all shares when the checkpoint of `step` was written, perhaps by
                another number of processes; None in a new run.

        Raises:
            Emu3Error: the position belongs to other data.
        """

    def position(self) -> Any:
        """Position of this process' data iterator after the last batch, as a value that fits into JSON."""

    def next_batch(self) -> Batch:
        """The next batch."""

    def step(self, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        """Starts a step without waiting for its result. `state` is donated.

        Returns:
            The new state, and a dict of scalars. It contains `loss` and `gradient_norm`, which must be finite.
        """

    def report(self, figures: dict[str, float], seconds: float) -> tuple[dict[str, float], str]:
        """The metrics of a step that took `seconds`, and its text in the progress bar and the log."""

    def not_finite(self, step: int, batch: Batch, directory: pathlib.Path) -> tuple[str, str]:
        """Two parts of the error line for a loss that is not finite: where it happened, and what to do.

        May save the batch in the run's directory.
        """

    def evaluate(self, state: State) -> Iterator[Evaluation]:
        """Evaluates every evaluation set."""

    def sample(self, state: State) -> Sequence[Image.Image]:
        """Sample pictures of the current model. Their `info` is saved with them."""

    def skipped(self) -> int:
        """Number of times that a record was skipped so far, summed over all shares."""

    def export(self, directory: pathlib.Path, target: pathlib.Path, step: int) -> Any:
        """Exports the checkpoint of `step` in the run's `directory` to `target`, as a bundle or an adapter."""


def run(job: Job, directory: pathlib.Path, progress: bool | None) -> Outcome:
    """Runs a job to its last step and exports the model.

    If `directory` holds checkpoints, the run resumes from the newest one. On Ctrl-C or SIGTERM, the run writes a
    checkpoint and returns.

    Args:
        job: what to train.
        directory: directory of the run.
        progress: True shows a progress bar on a terminal and lines in a log, None shows only the bar, False nothing.

    Returns:
        How the run ended.

    Raises:
        Emu3Error: the directory is in use or belongs to another run, a loss is not finite, or files cannot be
            written. Checkpoints that were written before are kept. Errors of the job pass through.
    """
    with locked(directory), contextlib.ExitStack() as stack:
        write_identity(directory, job.identity)
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(directory, job.cadence.keep)))
        last, steps = checkpoints.latest(), job.cadence.steps
        if last is not None and last > steps:
            raise Emu3Error(
                f"{directory} is already at step {last}, but the config has steps={steps}: raise steps, or choose "
                "another directory"
            )
        shown = stack.enter_context(Progress(progress, steps, "steps", name="train", initial=last or 0, every=None))
        if shown.shown:
            for line in _beginning(job, directory, last or 0):
                shown.say(line)
        state, step = _start(job, last, checkpoints)
        metrics = None
        if distributed.first():
            metrics = stack.enter_context(contextlib.closing(Metrics(directory, step)))
        with stop_signal() as stop:
            began = time.perf_counter()
            loop = _Loop(job, directory, state, step, checkpoints=checkpoints, metrics=metrics, shown=shown)
            # A stop signal only fills `stop`, so it does not interrupt the export.
            model = _export(job, directory, loop.step) if loop.train(stop) else None
        shown.close()
        if shown.shown:
            for line in _ending(job, directory, loop.step, model, time.perf_counter() - began):
                shown.say(line)
        return Outcome(loop.step, model, job.skipped(), None if model else next(iter(stop), signal.SIGTERM))


def _start(job: Job, step: int | None, checkpoints: Checkpoints) -> tuple[State, int]:
    """Returns the starting state and its step, and moves the job's data iterator to the same step."""
    if step is None:
        job.start(0, None)
        return job.initial_state(), 0
    state, positions = checkpoints.restore(step, job.abstract_state())
    job.start(step, positions)
    return state, step


def _beginning(job: Job, directory: pathlib.Path, step: int) -> Iterator[str]:
    """Yields the lines that a run prints at its start."""
    steps, where = job.cadence.steps, printable(str(directory))
    left = counted(steps - step, "step")
    if step == 0:
        yield f"train: {left}, in {where}"
    else:
        yield f"train: {where} resumes from step {step:,}, {left} left{_estimated_time(directory, step, steps)}"
    yield from job.describe()


def _estimated_time(directory: pathlib.Path, step: int, steps: int) -> str:
    """Estimated time of the remaining steps, from the median of the latest steps in the metrics. Empty if unknown."""
    if storage.is_remote(directory):  # the metrics are not downloaded yet
        return ""
    lines = [line for line in read_metrics(directory) if line["group"] == "train" and line["step"] <= step]
    seconds = [line["seconds"] for line in lines[-_EARLIER:] if isinstance(line.get("seconds"), float)]
    if not seconds or step == steps:
        return ""
    return f", about {duration(statistics.median(seconds) * (steps - step))} at the earlier pace"


def _ending(job: Job, directory: pathlib.Path, step: int, model: pathlib.Path | None, seconds: float) -> Iterator[str]:
    """Yields the last lines of a run: the model's path and how to use it, or how to resume."""
    if model is None:
        where = printable(str(directory))
        yield f"train: stopped after {duration(seconds)} with a checkpoint of step {step:,} in {where}"
        yield "to resume: run the same command again"
    else:
        yield f"train: done in {duration(seconds)}, the {job.product} is {printable(str(model))}"
        yield f"to use it: {job.usage(model)}"


def _export(job: Job, directory: pathlib.Path, step: int) -> pathlib.Path:
    """Exports the checkpoint of `step` into the run's directory, and returns the exported path."""
    target, new = directory / job.product, directory / f"{job.product}.new"
    if storage.is_remote(directory):  # a bucket has no rename; the export is written locally first, then uploaded
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
    """A step that was started and may not be finished."""

    number: int
    figures: dict[str, jax.Array]
    batch: Batch


class _Loop:
    """The training loop. The caller must hold the lock of the run's directory.

    Attributes:
        step: number of steps taken.
        state: the state after these steps.
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
        shown: Progress,
    ):
        """`metrics` is None on every process except the first."""
        self.state, self.step = state, step
        self._job, self._directory = job, directory
        self._checkpoints, self._metrics, self._shown = checkpoints, metrics, shown
        self._clock, self._reported = time.perf_counter(), step
        self._began = step

    def train(self, stop: Sequence[int]) -> bool:
        """Takes the remaining steps. Returns False if the run was stopped before the last one."""
        cadence, began = self._job.cadence, self.step
        pending: _Step | None = None
        stopping = False
        with self._profiler() as profile:
            while self.step < cadence.steps and not stopping:
                profile(self.step - began)
                taken = self._take()
                # The host reads a step's figures while the devices run later steps.
                if pending and taken.number - pending.number >= cadence.look_behind:
                    self._report(pending)
                    pending = None
                stopping = self._stopping(stop)
                due = cadence.due(self.step, stopping)
                if any(due):
                    self._report(taken)  # raises if the loss is not finite: such a state must not be saved
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
        """Does what is due between two steps. Its time is not counted as time of a step."""
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
        if self._reported == self._began:
            self._tell_first(taken.number - self._began, now - self._clock)
        self._clock, self._reported = now, taken.number
        line, note = self._job.report(figures, seconds)
        self._shown.update(taken.number - self._shown.done, note)
        steps = self._job.cadence.steps
        if taken.number % self._job.cadence.log_every == 0 or taken.number == steps:
            if self._metrics:
                self._metrics.write(taken.number, line)
            left = self._shown.time_left()
            self._shown.line(f"step {taken.number:,} of {steps:,}: {note}{left and ', '}{left}")

    def _tell_first(self, steps: int, seconds: float) -> None:
        """Prints the time of the first steps and the memory of the compiled step."""
        if not self._shown.shown:
            return
        which = "the first step" if steps == 1 else f"the first {steps} steps"
        needed = self._job.step_memory()
        needed = needed and f"; a step takes {needed}"
        self._shown.say(f"{which} took {duration(seconds)}, compilation included{needed}")

    def _stop_not_finite(self, taken: _Step, figures: Mapping[str, float]) -> None:
        where, remedy = self._job.not_finite(taken.number, taken.batch, self._directory)
        self._checkpoints.finish(taken.number)
        last = self._checkpoints.latest()
        kept = "there is no checkpoint yet" if last is None else f"the checkpoint of step {last} is kept"
        raise Emu3Error(
            f"the loss is {figures['loss']} and the gradient norm {figures['gradient_norm']} at {where}; {kept}; "
            f"{remedy}, then run again"
        )

    def _tell(self, evaluation: Evaluation) -> None:
        if self._metrics:
            self._metrics.write(self.step, evaluation.figures, f"evaluation/{evaluation.name}")
        if evaluation.picture:
            self._show("", {f"{self.step:08d}.png": evaluation.picture})
        self._shown.say(f"step {self.step:,}, {printable(evaluation.name)}: {evaluation.note}")

    def _show(self, folder: str, pictures: Mapping[str, Image.Image]) -> None:
        """Writes pictures, keyed by file name, to a folder in `samples/`."""
        if distributed.first():
            with files_into(self._directory / "samples" / folder) as directory:
                for name, picture in pictures.items():
                    save_png(picture, directory / name, {str(key): str(text) for key, text in picture.info.items()})

    # -------------------------------------------------------------------------------------------- profiles

    @contextlib.contextmanager
    def _profiler(self) -> Iterator[Callable[[int], None]]:
        """Yields a function that starts and stops the profile. Call it before each step with the steps taken so far."""
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

"""The runner of every training run: steps, stop signals, reports, checkpoints, evaluations, pictures and the export.

What is trained is a `Job`: `training.loop` has the decoder's, `training.vision` the vision tokenizer's.
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

_EARLIER = 20  # lines of metrics by which a run that resumes tells how long it will take

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
        log_every: a watched step becomes a line of metrics, and of the log, if its number is a multiple of this, or it
            is the last.
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
        note: its line on standard error.
        picture: is kept in `samples/`, or None.
    """

    name: str
    figures: Mapping[str, float]
    note: str
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

    def describe(self) -> list[str]:
        """Lines for people: what is trained, on what data and devices, and the memory that is known by now."""

    def step_memory(self) -> str:
        """What a step takes of the memory, for people; empty before the first step, and where that is not known."""

    def usage(self, model: pathlib.Path) -> str:
        """The command that uses what `export` wrote."""

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
        """The metrics of a step that took `seconds`, and what the bar and the log say of it."""

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
        progress: True shows a bar on a terminal and lines in a log, None only the bar, False nothing.

    Raises:
        Emu3Error: the directory is in use or of another run, a loss is not finite, or files cannot be written. The
            checkpoints that were written stay. Errors of the job pass through.
    """
    with locked(directory), contextlib.ExitStack() as stack:
        write_identity(directory, job.identity)
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(directory, job.cadence.keep)))
        last, steps = checkpoints.latest(), job.cadence.steps
        if last is not None and last > steps:
            raise Emu3Error(f"{directory} is at step {last}, the config ends at {steps}: raise steps")
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
            # A signal does not interrupt the export: it ends complete.
            model = _export(job, directory, loop.step) if loop.train(stop) else None
        shown.close()
        if shown.shown:
            for line in _ending(job, directory, loop.step, model, time.perf_counter() - began):
                shown.say(line)
        return Outcome(loop.step, model, job.skipped(), None if model else next(iter(stop), signal.SIGTERM))


def _start(job: Job, step: int | None, checkpoints: Checkpoints) -> tuple[State, int]:
    """The state that the run goes on from, and the steps that were taken; the job's data stand there too."""
    if step is None:
        job.start(0, None)
        return job.initial_state(), 0
    group, groups = job.share
    state, position = checkpoints.restore(step, job.abstract_state(), group, groups)
    job.start(step, position)
    return state, step


def _beginning(job: Job, directory: pathlib.Path, step: int) -> Iterator[str]:
    """What the run will do and needs."""
    steps, where = job.cadence.steps, printable(str(directory))
    left = counted(steps - step, "step")
    if step == 0:
        yield f"train: {left}, in {where}"
    else:
        yield f"train: {where} goes on from step {step:,}, {left} left{_as_before(directory, step, steps)}"
    yield from job.describe()


def _as_before(directory: pathlib.Path, step: int, steps: int) -> str:
    """How long the steps that are left will take if they take as long as those before."""
    if storage.is_remote(directory):  # what is there must be fetched first
        return ""
    lines = [line for line in read_metrics(directory) if line["group"] == "train" and line["step"] <= step]
    seconds = [line["seconds"] for line in lines[-_EARLIER:] if isinstance(line.get("seconds"), float)]
    if not seconds or step == steps:
        return ""
    return f", about {duration(statistics.median(seconds) * (steps - step))} at the earlier pace"


def _ending(job: Job, directory: pathlib.Path, step: int, model: pathlib.Path | None, seconds: float) -> Iterator[str]:
    """Where the model is and how it is used, or how the run goes on."""
    if model is None:
        where = printable(str(directory))
        yield f"train: stopped after {duration(seconds)} with a checkpoint of step {step:,} in {where}"
        yield "to go on: run the same command again"
    else:
        yield f"train: done in {duration(seconds)}, the {job.product} is {printable(str(model))}"
        yield f"to use it: {job.usage(model)}"


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
        shown: Progress,
    ):
        """`metrics` is None in all processes but the first."""
        self.state, self.step = state, step
        self._job, self._directory = job, directory
        self._checkpoints, self._metrics, self._shown = checkpoints, metrics, shown
        self._clock, self._reported = time.perf_counter(), step
        self._began = step

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
        """What is known when the step is compiled."""
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
            f"the loss is {figures['loss']} and the gradient's norm {figures['gradient_norm']} at {where}; {kept}; "
            f"{remedy}, then run again"
        )

    def _tell(self, evaluation: Evaluation) -> None:
        if self._metrics:
            self._metrics.write(self.step, evaluation.figures, f"evaluation/{evaluation.name}")
        if evaluation.picture:
            self._show("", {f"{self.step:08d}.png": evaluation.picture})
        self._shown.say(f"step {self.step:,}, {printable(evaluation.name)}: {evaluation.note}")

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

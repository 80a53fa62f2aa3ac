"""The batcher: one thread owns the device, and does the jobs of all clients in the rows of decode sessions.

A job joins in a free row while the others are where they are. The device is asked for a bounded number of passes at a
time. Between two calls, rows that are done are given to the next jobs.
"""

import concurrent.futures
import functools
import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from emu3_jax.errors import Emu3Error
from emu3_jax.fields import is_count
from emu3_jax.generation import defaults
from emu3_jax.generation.pipeline import Emu3
from emu3_jax.generation.session_rows import Row
from emu3_jax.media.sizes import generate_size
from emu3_jax.printable import shown
from emu3_jax.serving.documents import Lane, document_bytes
from emu3_jax.serving.fair_queue import FairQueue, Full
from emu3_jax.serving.jobs import Busy, Closing, Event, Failed, Finished, Job, PictureRows, TooLarge
from emu3_jax.serving.pool import Options, Pool, pool_slots, rows_that_fit, smallest
from emu3_jax.serving.rows import Later, Work
from emu3_jax.serving.tickets import QueuedTicket
from emu3_jax.serving.warm_ups import decode_clip_of_zeros, decode_zeros
from emu3_jax.serving.works import make_work

_log = logging.getLogger("emu3_jax")

QUEUE = 64  # jobs that may wait
# A call of the device takes about so many seconds: a new job waits so long if a row is free. If none is free, only
# events and cancellations wait. Longer calls cost less, because each call prepares the weights.
CALL_SECONDS, FULL_CALL_SECONDS = 0.15, 0.5
LEAST_PASSES, MOST_PASSES = 16, 256
LANE_PASSES = 16  # most passes of a document between two calls of the pools
# Looks at pictures that are being generated: least seconds between two looks at a picture, and the share of the
# device's time that all looks together may take.
ROWS_EVERY, LOOKS = 0.5, 0.1
BROKEN = "the server failed to compute this: try again"
CLOSING = "the server shuts down: try again later"


class Batcher:
    """Implements `jobs.Jobs` over a model.

    In float32 the result of a job is that of `Emu3.generate` or `Emu3.chat` with the same seed, whatever the other jobs
    are and whenever they join.

    Attributes:
        rows: number of rows of each pool. It is less than what was asked for if `memory` has no room for more.
    """

    def __init__(
        self,
        model: Emu3,
        *,
        rows: int = defaults.BATCH_SIZE,
        queue: int = QUEUE,
        passes: int | None = None,
        memory: int | None = None,
        slots: Sequence[int] | None = None,
        options: Options | None = None,
        documents: bool = False,
        rows_every: float | None = None,
    ):
        """Starts the thread.

        Args:
            model: the model, of Emu3's family.
            rows: largest number of rows of each pool.
            queue: largest number of jobs that wait.
            passes: largest number of passes of a call of the device, or None: as many as take `CALL_SECONDS`.
            memory: largest number of bytes of all caches together, or None. It may make the rows fewer.
            slots: sizes of the caches of the pools, in slots, in rising order; see `pool.pool_slots`, the default.
            options: options of the sessions.
            documents: whether the model was trained on documents. `DocumentJob` is refused otherwise.
            rows_every: seconds between two `PictureRows` of a job, or None: at least `ROWS_EVERY`, and so many that
                they take `LOOKS` of the time at most.

        Raises:
            Emu3Error: the model is of another family, a number is not legal, or no row fits into `memory`.
        """
        for name, number in {"rows": rows, "queue": queue, "passes": 1 if passes is None else passes}.items():
            if not is_count(number):
                raise Emu3Error(f"{name} is {shown(number)}: it must be a whole number >= 1")
        language = model.language
        language.require_emu3()
        if slots is None:
            slots = pool_slots(language.config, model.vision.config.spatial_factor)
        if memory is not None:
            memory -= document_bytes(language) if documents else 0
            rows = min(rows, rows_that_fit(language, slots, memory))
        self.rows = rows
        self._model, self._passes, self._rows_every = model, passes, rows_every
        self._pools: list[Pool[QueuedTicket]] = [
            Pool(language, rows, count, options or Options()) for count in sorted(slots)
        ]
        self._documents, self._lane = documents, Lane(options or Options(), passes or LANE_PASSES)
        self._changed = threading.Condition()
        # Below: guarded by `_changed`.
        self._queue: FairQueue[QueuedTicket] = FairQueue(queue)
        self._commands: list[tuple[Callable[[], None], concurrent.futures.Future[None]]] = []
        self._warm_ups: deque[Callable[[], None]] = deque()  # what to compile while there are no jobs
        self._closing = self._hurried = False
        self._seconds = 1.0  # a job's time in its row, as a running mean
        self._counts = dict.fromkeys(
            ("taken", "refused", "finished", "failed", "cancelled", "passes", "row_passes", "row_passes_used", "tokens",
             "pictures"), 0,
        )  # fmt: skip
        self._finished_kinds: Counter[str] = Counter()
        self._device_seconds: Counter[str] = Counter()  # by kind; fractions of seconds
        # Below: of the device's thread.
        self._later: list[tuple[QueuedTicket, Later]] = []
        self._again: list[QueuedTicket] = []  # jobs that need another row; they go before the queue
        self._look_seconds = 0.0  # the time of a look at a picture, as a running mean
        self._pass_seconds = CALL_SECONDS / LEAST_PASSES  # the time of a pass, as a running mean
        self._thread = threading.Thread(target=self._run, name="emu3-jax-batcher", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------------------ any thread

    def submit(self, job: Job) -> QueuedTicket:
        """See `jobs.Jobs`."""
        work = make_work(self._model, job, self._documents)
        for prompt, steps in work.lengths:
            if smallest(self._pools, prompt, steps) is None:
                raise TooLarge(
                    f"a prompt of {prompt} tokens and {steps} tokens to generate exceed the server's "
                    f"{self._pools[-1].slots}: shorten the prompt, or ask for a smaller picture, clip or answer"
                )
        ticket = QueuedTicket(job, work, self._cancelled)
        with self._changed:
            try:
                if self._closing:
                    raise Closing
                self._queue.put(job.client, ticket)
            except Closing:
                self._counts["refused"] += 1
                raise
            except Full as full:
                self._counts["refused"] += 1
                raise Busy(self._retry_after(), str(full)) from None
            self._counts["taken"] += 1
            self._changed.notify_all()
        return ticket

    def figures(self) -> Mapping[str, Any]:
        """See `jobs.Jobs`. Counters end with `_total`; the others are levels.

        `row_passes_used_total / row_passes_total` is the share of the computed rows that jobs had. The time of a call
        of the device is shared among the rows in use, by their passes.
        """
        with self._changed:
            used, rows = sum(len(pool.used) for pool in self._pools), sum(pool.rows for pool in self._pools)
            counts = {f"{name}_total": count for name, count in self._counts.items()}
            for name in ("taken", "refused", "finished", "failed", "cancelled"):
                counts[f"jobs_{name}_total"] = counts.pop(f"{name}_total")
            kinds: dict[str, Any] = {
                "jobs_finished_by_kind_total": dict(self._finished_kinds),
                "device_seconds_by_kind_total": {kind: round(s, 3) for kind, s in self._device_seconds.items()},
                "device_seconds_total": round(self._device_seconds.total(), 3),
            }
            levels = {"queue_length": len(self._queue), "rows": rows, "rows_used": used, "closing": self._closing,
                      "warm_ups_left": len(self._warm_ups)}  # fmt: skip
            return {**counts, **kinds, **levels}

    def close(self, finish: bool) -> None:
        """See `jobs.Jobs`."""
        with self._changed:
            self._closing = True
            self._hurried = self._hurried or not finish
            self._changed.notify_all()
        self._thread.join()

    def warm_up(self, sizes: Sequence[tuple[str, int | None]] = (("1:1", None),), *, idle: bool = False) -> None:
        """Compiles what jobs need, and waits for it. Later jobs compile nothing, apart from what is named here.

        Each further size of a generated picture needs a program of its own that decodes it, and each size of a picture
        to answer about one that encodes it. Clips need programs for the pixels of each size, and documents for each
        length of their prompts.

        Args:
            sizes: (ratio, area) of pictures that will be asked for; None is the model's area.
            idle: whether to wait only for what jobs cannot do without, and to compile the rest while there are no jobs:
                smaller sessions, all but the first of `sizes`, and clips and documents of the first one. Until then,
                small loads take longer. `figures()["warm_ups_left"]` is 0 when all is compiled.
        """
        config, factor = self._model.language.config, self._model.vision.config.spatial_factor
        grids = [generate_size(ratio, area or config.image_area, factor) for ratio, area in sizes]
        vision = self._model.vision
        pixels: list[Callable[[], None]] = [functools.partial(decode_zeros, vision, grid) for grid in grids]
        rest: list[Callable[[], None]] = [functools.partial(decode_clip_of_zeros, vision, grid) for grid in grids[:1]]
        if self._documents:
            rest += [functools.partial(self._lane.warm_up, self._model, grid) for grid in grids[:1]]

        def compile_all() -> None:
            if idle:
                sessions = [one for pool in self._pools for one in pool.warm_up_least()]
                now, later = pixels[:1], [*sessions, *pixels[1:], *rest]
            else:
                for pool in self._pools:
                    pool.warm_up()
                now, later = [*pixels, *rest], []
            for compile_one in now:
                compile_one()
            with self._changed:
                self._warm_ups.extend(later)

        done: concurrent.futures.Future[None] = concurrent.futures.Future()
        with self._changed:
            if self._closing:
                raise RuntimeError("the batcher is closed")
            self._commands.append((compile_all, done))
            self._changed.notify_all()
        done.result()

    def _cancelled(self, ticket: QueuedTicket) -> None:
        with self._changed:
            self._counts["cancelled"] += 1
            self._queue.remove(ticket.job.client, ticket)

    def _retry_after(self) -> int:
        rows = sum(pool.rows for pool in self._pools)
        return max(1, math.ceil(self._seconds * len(self._queue) / rows))

    # ------------------------------------------------------------------------------------------------ the device's

    def _run(self) -> None:
        while self._wait():
            self._step_lane()
            for pool in self._pools:
                try:
                    self._step(pool)
                except Exception:  # whatever it is, the server goes on
                    _log.exception("the device failed; the jobs in its rows are given up")
                    for ticket in pool.forget():
                        self._fail(ticket, BROKEN)
            self._deliver()
            self._warm_up_one()

    def _warm_up_one(self) -> None:
        """Compiles some more programs if there is nothing else to do."""
        with self._changed:
            if not self._warm_ups or self._closing or self._commands or len(self._queue) or self._busy():
                return
            compile_one = self._warm_ups[0]
        try:
            compile_one()
        except Exception:  # jobs will say what is wrong, if they need it
            _log.exception("a program for later could not be compiled")
            for pool in self._pools:
                pool.forget()
        with self._changed:
            self._warm_ups.popleft()

    def _wait(self) -> bool:
        """Waits for something to do, and runs commands. Returns False when all is done after `close`."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._commands or self._closing or len(self._queue) or self._busy() or self._warm_ups
            )
            commands, self._commands = self._commands, []
            left = self._queue.clear() if self._hurried else []
            if self._hurried:
                left += [ticket for pool in self._pools for ticket in pool.forget()]
                left += self._again + self._lane.forget()
                self._again = []
            more = bool(len(self._queue)) or self._busy() or not self._closing
        for ticket in left:
            self._fail(ticket, CLOSING)
        for command, done in commands:
            try:
                command()
                done.set_result(None)
            except Exception as error:  # the caller of `warm_up` gets it
                done.set_exception(error)
        return more

    def _busy(self) -> bool:
        return bool(self._again) or self._lane.owner is not None or any(pool.used for pool in self._pools)

    def _step(self, pool: Pool[QueuedTicket]) -> None:
        """Gives free rows to jobs, and takes some passes."""
        for index in pool.used:
            owner = pool.owners[index]
            if owner is not None and owner.cancelled:
                pool.owners[index] = None  # its row goes on until a job needs it, and nobody reads it
        self._admit(pool)
        if not pool.used:
            return
        began = time.perf_counter()
        pool.advance(self._next_passes(pool))
        self._deliver()  # while the device goes on
        reading, passes = pool.read()
        seconds = time.perf_counter() - began
        self._pass_seconds += (seconds / max(1, *passes) - self._pass_seconds) / 4
        self._count(pool, passes, seconds)
        for index in pool.used:
            ticket, ids, done = pool.owners[index], reading.tokens[index], bool(reading.done[index])
            if ticket is None:
                continue
            if done:
                pool.owners[index] = None
            try:
                if done:
                    events = ticket.work.finish(ids, bool(reading.ended[index]), int(reading.passes[index]))
                else:
                    events = ticket.work.more(ids, functools.partial(ticket.wants_rows, self._look_interval(pool)))
            except Emu3Error as error:
                pool.owners[index] = None
                self._fail(ticket, str(error))
                continue
            self._later += [(ticket, event) for event in events]
            if done and ticket.work.again:
                self._again.append(ticket)

    def _step_lane(self) -> None:
        """Takes some passes of the document that is being written, or begins the next one."""
        if self._lane.owner is not None and self._lane.owner.over:
            self._lane.forget()
        ticket = self._lane.owner
        try:
            if ticket is None:
                with self._changed:
                    ticket = self._queue.take(lambda one: not isinstance(one.work, Work))
                if ticket is None:
                    return
                self._lane.begin(ticket)
                ticket.begin()
            events, seconds = self._lane.step()
        except Exception:  # also of pictures of this job
            _log.exception("a document failed")
            self._lane.forget()
            if ticket is not None:
                self._fail(ticket, BROKEN)
            return
        with self._changed:
            self._device_seconds[ticket.kind] += seconds  # type: ignore[assignment]
        self._later += [(ticket, functools.partial(_itself, event)) for event in events]

    def _next(self, pool: Pool[QueuedTicket]) -> QueuedTicket | None:
        """The next job for a free row of a pool, or None."""

        def wanted(ticket: QueuedTicket) -> bool:
            work = ticket.work
            return isinstance(work, Work) and smallest(self._pools, work.prompt, work.steps) is pool

        self._again = [ticket for ticket in self._again if not ticket.over]
        for ticket in filter(wanted, self._again):
            self._again.remove(ticket)
            return ticket
        with self._changed:
            return self._queue.take(wanted)

    def _next_passes(self, pool: Pool[QueuedTicket]) -> int:
        """The number of passes of the next call."""
        if self._passes is not None:
            return self._passes
        seconds = CALL_SECONDS if pool.room else FULL_CALL_SECONDS
        return min(max(LEAST_PASSES, round(seconds / self._pass_seconds)), MOST_PASSES)

    def _admit(self, pool: Pool[QueuedTicket]) -> None:
        """Begins jobs in the pool's free rows."""
        joining: list[tuple[QueuedTicket, Row]] = []
        while len(joining) < pool.room and (ticket := self._next(pool)) is not None:
            try:
                joining.append((ticket, ticket.work.row()))
            except Exception:  # a picture of this job, but not the session
                _log.exception("a job cannot begin")
                self._fail(ticket, BROKEN)
        try:
            pool.resize(len(joining), any(row.negative is not None for _, row in joining))
            for ticket, row in joining:
                pool.begin(ticket, row, ticket.work.settings)
                ticket.begin()
        except Exception:
            owners = [owner for owner in pool.owners if owner is not None]
            for ticket, _ in joining:
                if ticket not in owners:
                    self._fail(ticket, BROKEN)
            raise

    def _look_interval(self, pool: Pool[QueuedTicket]) -> float:
        """Seconds between two looks at a picture."""
        if self._rows_every is not None:
            return self._rows_every
        return max(ROWS_EVERY, len(pool.used) * self._look_seconds / LOOKS)

    def _deliver(self) -> None:
        """Waits for the events that the device was asked for, and tells them."""
        later, self._later = self._later, []
        for ticket, event in later:
            if ticket.cancelled:
                continue
            try:
                began = time.perf_counter()
                told = event()
            except Exception:
                _log.exception("a picture cannot be decoded")
                self._fail(ticket, BROKEN)
                continue
            if isinstance(told, PictureRows):
                self._look_seconds += (time.perf_counter() - began - self._look_seconds) / 4
            if isinstance(told, Finished):
                self._finished(ticket, told)
            ticket.tell(told)

    def _finished(self, ticket: QueuedTicket, told: Finished) -> None:
        with self._changed:
            self._seconds += (ticket.seconds - self._seconds) / 8
            self._counts["finished"] += 1
            self._finished_kinds[ticket.kind] += 1
            self._counts["tokens"] += told.tokens
            self._counts["pictures"] += len(told.pictures) or told.picture is not None

    def _fail(self, ticket: QueuedTicket, message: str) -> None:
        if not ticket.cancelled:
            with self._changed:
                self._counts["failed"] += 1
            ticket.tell(Failed(message))

    def _count(self, pool: Pool[QueuedTicket], passes: list[int], seconds: float) -> None:
        """Counts a call of the device, given the number of passes of each row, with 0 for rows that are free."""
        with self._changed:
            for owner, own in zip(pool.owners, passes, strict=True):
                if owner is not None and own:
                    self._device_seconds[owner.kind] += seconds * own / sum(passes)  # type: ignore[assignment]
            self._counts["passes"] += max(passes)
            self._counts["row_passes"] += max(passes) * len(passes)
            self._counts["row_passes_used"] += sum(passes)


def _itself(event: Event) -> Event:
    return event

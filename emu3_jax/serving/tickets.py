"""A job that was taken, and its events on their way from the thread of the device to the thread that reads."""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from emu3_jax.serving.jobs import (
    AnswerJob,
    AnswerText,
    ClipJob,
    DocumentJob,
    Event,
    Failed,
    Finished,
    Job,
    PictureRows,
    Started,
)


class QueuedTicket:
    """Implements `jobs.Ticket`.

    Attributes:
        job: the job, without pictures.
        work: the job as a row, `rows.Work`; or `documents.DocumentWork`, which needs no row.
        kind: what the job makes, a word for figures: "picture", "answer".
        cancelled: whether the job was given up.
    """

    def __init__(self, job: Job, work: Any, on_cancel: Callable[["QueuedTicket"], None]):
        if isinstance(job, AnswerJob | DocumentJob):
            job = dataclasses.replace(job, pictures=())
        elif isinstance(job, ClipJob):
            job = dataclasses.replace(job, picture=None)
        self.job = job
        self.work, self.cancelled = work, False
        self.kind = type(job).__name__.removesuffix("Job").lower()
        self._on_cancel = on_cancel
        self._changed = threading.Condition()
        self._events: collections.deque[Event] = collections.deque()
        self._closed = self._reading = False
        self._taken, self._begun, self._shown = time.monotonic(), 0.0, 0.0

    # ------------------------------------------------------------------------------------------------ for readers

    def events(self) -> Iterator[Event]:
        """See `jobs.Ticket`."""
        while True:
            with self._changed:
                self._reading = True
                self._changed.wait_for(lambda: self._events or self._closed)
                self._reading = False
                if not self._events:
                    return
                event = self._events.popleft()
            yield event

    def cancel(self) -> None:
        """See `jobs.Ticket`."""
        with self._changed:
            if self._closed:
                return
            self.cancelled = self._closed = True
            self._events.clear()
            self._changed.notify_all()
        self._on_cancel(self)

    # ------------------------------------------------------------------------------------------------ for the batcher

    def begin(self) -> None:
        """The job has got a row. A clip may need several: only the first one is told."""
        if self._begun:
            return
        self._begun = time.monotonic()
        self.tell(Started(self._begun - self._taken))

    @property
    def over(self) -> bool:
        """Whether the job has its last event, or was given up."""
        return self._closed

    @property
    def seconds(self) -> float:
        """How long the job has had a row."""
        return time.monotonic() - self._begun

    def wants_rows(self, interval: float) -> bool:
        """Whether someone waits for more of a picture, and last saw more of it `interval` seconds ago or earlier.

        A reader that does not keep up with the events, or is not there, gets no pictures decoded.
        """
        with self._changed:
            if not self._reading or self._events or (self._shown and time.monotonic() - self._shown < interval):
                return False
            self._shown = time.monotonic()
            return True

    def tell(self, event: Event) -> None:
        """Adds an event. Those that wait do not grow without bound: more of a picture or of a text is merged."""
        with self._changed:
            if self._closed:
                return
            last = self._events[-1] if self._events else None
            if isinstance(event, AnswerText) and isinstance(last, AnswerText):
                self._events[-1] = AnswerText(last.text + event.text)
            elif isinstance(event, PictureRows) and isinstance(last, PictureRows):
                self._events[-1] = event
            else:
                self._events.append(event)
            self._closed = isinstance(event, Finished | Failed)
            self._changed.notify_all()

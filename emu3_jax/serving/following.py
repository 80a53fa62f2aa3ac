"""From the threads of `Jobs` to the event loop of the server, and back: a client that leaves cancels its jobs."""

import asyncio
import contextlib
import threading
import unicodedata
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from emu3_jax.serving.jobs import Event, Failed, Finished, Job, Jobs, PictureRows, Ticket
from emu3_jax.serving.refusals import Refused, refusing

Result = TypeVar("Result")
_waiting: set[asyncio.Future[None]] = set()  # the event loop itself holds tasks weakly
_MOST_WAITING = 4  # states of a growing picture that wait for a slow client
_LOST = Failed("the job was stopped: try again")


class Followed:
    """Several tickets, whose events come in one order. It must be used within `following`."""

    def __init__(self, tickets: Sequence[Ticket]):
        self._tickets = tickets
        self._loop = asyncio.get_running_loop()
        self._events: deque[tuple[int, Event]] = deque()
        self._came = asyncio.Event()
        self._open = len(tickets)
        for index, ticket in enumerate(tickets):
            # A thread per job: `Ticket.events` waits. The queue of `Jobs` bounds their number.
            threading.Thread(target=self._read, args=(index, ticket), daemon=True).start()

    def _read(self, index: int, ticket: Ticket) -> None:
        last: Event | None = None
        try:
            for event in ticket.events():
                last = event
                self._tell(index, event)
        finally:
            if not isinstance(last, Finished | Failed):
                self._tell(index, _LOST)

    def _tell(self, index: int, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._put, index, event)

    def _put(self, index: int, event: Event) -> None:
        # A client that reads slowly misses the oldest of these rows: all of them would fill the memory.
        if isinstance(event, PictureRows):
            waiting = [pair for pair in self._events if pair[0] == index and isinstance(pair[1], PictureRows)]
            if len(waiting) >= _MOST_WAITING:
                self._events = deque(pair for pair in self._events if pair is not waiting[0])
        self._events.append((index, event))
        self._came.set()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yields (index of the ticket, event) until all tickets have ended."""
        while self._open:
            while not self._events:
                self._came.clear()
                await self._came.wait()
            index, event = self._events.popleft()
            self._open -= isinstance(event, Finished | Failed)
            yield index, event

    async def results(self) -> list[Finished]:
        """Waits for all tickets.

        Raises:
            Refused: one failed, with status 500.
        """
        found: dict[int, Finished] = {}
        async for index, event in self.events():
            found |= {index: event} if isinstance(event, Finished) else {}
            check(event)
        return [found[index] for index in range(len(self._tickets))]

    def cancel(self) -> None:
        """Gives up what is not finished."""
        for ticket in self._tickets:
            ticket.cancel()


def check(event: Event) -> None:
    """Raises `Refused` if a job failed."""
    if isinstance(event, Failed):
        raise Refused(500, event.message, code="job_failed")


@contextlib.asynccontextmanager
async def following(jobs: Jobs, asked: Sequence[Job], *, chat: bool = False) -> AsyncIterator[Followed]:
    """Submits jobs, all or none, and cancels them when the block ends, also by a client that left.

    `chat` says whether prompts and pictures come from the request's field `messages`.

    Raises:
        Refused: a job is illegal (400), or the queue is full (429).
    """
    tickets: list[Ticket] = []

    def submit() -> None:
        for job in asked:
            tickets.append(jobs.submit(job))

    # It may encode pictures, which takes time. It goes on to its end if the client leaves meanwhile.
    submitted = asyncio.ensure_future(asyncio.to_thread(submit))
    try:
        otherwise = "messages" if chat else None
        with refusing(text=lambda token: otherwise or _field_with(token, asked), otherwise=otherwise):
            await asyncio.shield(submitted)
    except asyncio.CancelledError:
        later = asyncio.ensure_future(_cancel_later(tickets, submitted))
        _waiting.add(later)
        later.add_done_callback(_waiting.discard)
        raise
    except BaseException:
        for ticket in tickets:
            ticket.cancel()
        raise
    asked = ()  # their pictures would stay in memory
    followed = Followed(tickets)
    try:
        yield followed
    finally:
        followed.cancel()


def _field_with(token: str, asked: Sequence[Job]) -> str:
    """The request's field whose text contains a control token."""
    return "prompt" if token in unicodedata.normalize("NFC", asked[0].prompt) else "negative_prompt"


async def _cancel_later(tickets: Sequence[Ticket], submitted: Awaitable[None]) -> None:
    with contextlib.suppress(Exception):
        await submitted
    for ticket in tickets:
        ticket.cancel()


async def until_left(receive: Callable[[], Awaitable[Any]], work: Awaitable[Result]) -> Result | None:
    """Waits for `work`; if the client leaves first, cancels it and returns None."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        return None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)

"""Server-sent events."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from emu3_jax.serving.following import until_left
from emu3_jax.serving.refusals import Refused

_PING = 15.0  # seconds without an event after which a comment is sent: proxies close silent connections


def event(data: Any, name: str | None = None) -> bytes:
    """One event with JSON data. JSON has no raw line ends, which would end the event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data)}\n\n".encode()


class EventStream:
    """An ASGI response that sends events while they come. If the client leaves, the generator is closed.

    A refusal before the first event is an ordinary answer with its status; later, it is an event `error`.
    """

    def __init__(self, events: AsyncGenerator[bytes, None]):
        self._events = events

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with contextlib.aclosing(self._events):
            await until_left(receive, self._send(send))

    async def _send(self, send: Any) -> None:
        started = False
        try:
            async for part in _with_pings(self._events):
                if not started:
                    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                    started = True
                await send({"type": "http.response.body", "body": part, "more_body": True})
        except Refused as refused:
            if not started:
                raise
            await send({"type": "http.response.body", "body": event(refused.body(), "error"), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _with_pings(events: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    waiting: asyncio.Future[bytes] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait((waiting,), timeout=_PING)
            if not done:
                yield b": still working\n\n"
                continue
            try:
                part = waiting.result()
            except StopAsyncIteration:
                return
            waiting = None
            yield part
    finally:
        if waiting is not None and not waiting.done():
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

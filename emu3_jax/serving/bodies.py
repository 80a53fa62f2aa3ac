"""Bodies of requests: read whole, within a time, a length, and a memory that all bodies share."""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

from emu3_jax.serving.limits import Limits
from emu3_jax.serving.refusals import Refused

_SMALL = 64 << 10  # bytes of a body that does not count: 512 connections with such bodies take 32 MiB
_CLOSE = {"Connection": "close"}  # the rest of the body is not read


class Left(Exception):
    """The client has left."""


class Claim:
    """The bytes that one body takes."""

    def __init__(self, bodies: "Bodies"):
        self._bodies, self._bytes = bodies, 0

    def grow(self, length: int) -> None:
        """The body has `length` bytes now. Raises `Refused` if all bodies together have too many."""
        if length <= _SMALL:
            return
        more = length - self._bytes
        if self._bodies.held + more > self._bodies.limits.held_bytes:
            raise Refused(
                503, "the server holds too many large requests: try again in 5 seconds", code="overloaded",
                headers={"Retry-After": "5", **_CLOSE},
            )  # fmt: skip
        self._bytes = length
        self._bodies.held += more

    def free(self) -> None:
        """The body is gone."""
        self._bodies.held -= self._bytes
        self._bytes = 0


class Bodies:
    """The bodies that are in memory. It belongs to one event loop.

    Attributes:
        limits: limits of bodies.
        held: bytes of all bodies, without small ones.
    """

    def __init__(self, limits: Limits):
        self.limits, self.held = limits, 0

    @contextlib.contextmanager
    def claim(self) -> Iterator[Claim]:
        """The claim of one body, which ends with the block."""
        claim = Claim(self)
        try:
            yield claim
        finally:
            claim.free()

    async def read(self, scope: Any, receive: Any, claim: Claim) -> bytes:
        """Reads a body.

        Raises:
            Refused: it is too long or too slow, or there is no memory for it.
            Left: the client has left.
        """
        most, seconds = self.limits.body_bytes, self.limits.body_seconds
        too_long = Refused(413, f"the body has more than {most:,} bytes: send less", code="too_large", headers=_CLOSE)
        parts, length = [], 0
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or len(declared) > 18 or int(declared) > most:
            raise too_long
        try:
            async with asyncio.timeout(seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Left
                    length += len(message.get("body", b""))
                    if length > most:
                        raise too_long
                    claim.grow(length)
                    parts.append(message.get("body", b""))
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError as error:
            raise Refused(
                408, f"the body did not arrive within {seconds:g} seconds: send it again", code="timeout",
                headers=_CLOSE,
            ) from error  # fmt: skip


def replay(body: bytes, receive: Any) -> Any:
    """A `receive` that gives the whole body first."""
    given = False

    async def replaying() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replaying

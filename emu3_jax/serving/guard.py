"""What stands before every endpoint: the host, the key, the origin, bounded bodies, timeouts, headers of security."""

import asyncio
import hashlib
import hmac
import json
import logging
import urllib.parse
from collections import Counter
from collections.abc import Collection
from typing import Any

from emu3_jax.printable import shown
from emu3_jax.serving.bodies import Bodies, Left, replay
from emu3_jax.serving.limits import Limits
from emu3_jax.serving.refusals import Refused
from emu3_jax.serving.streams import event

_log = logging.getLogger("emu3_jax")
FAULT = Refused(500, "the server failed: see its log", code="internal_error")
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}


class Guard:
    """An ASGI application around another one, which gets whole bodies and requests that may be made."""

    def __init__(
        self,
        app: Any,
        limits: Limits,
        *,
        key: str | None = None,
        hosts: Collection[str] | None = None,
        answered: Counter[int] | None = None,
    ):
        """Makes the application.

        Args:
            app: the application behind it.
            limits: limits of bodies and times.
            key: what clients of `/v1` and `/metrics` must send, or None.
            hosts: legal names in the header `Host`, or None for all.
            answered: counts the answers by their status.
        """
        self._app, self._limits, self._hosts = app, limits, hosts
        self._key = None if key is None else _digest(key.encode())
        self._answered = Counter() if answered is None else answered
        self._bodies = Bodies(limits)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # websockets
            await send({"type": "websocket.close", "code": 1008})
            return
        started = streams = False

        async def guarded(message: Any) -> None:
            nonlocal started, streams
            if message["type"] == "http.response.start":
                started = True
                self._answered[message["status"]] += 1
                headers = list(message.get("headers", []))
                streams = any(value.startswith(b"text/event-stream") for _, value in headers)
                given = {name.lower() for name, _ in headers}
                extra = [(n.encode(), v.encode()) for n, v in _HEADERS.items() if n.encode() not in given]
                message = {**message, "headers": headers + extra}
            async with asyncio.timeout(self._limits.send_seconds):  # else a client that reads nothing stays for ever
                await send(message)

        limit = asyncio.timeout(self._limits.answer_seconds)
        try:
            self._check(scope)
            with self._bodies.claim() as claim:
                body = await self._bodies.read(scope, receive, claim)
                async with limit:
                    await self._app(scope, replay(body, receive), guarded)
        except Refused as refused:
            if not started:
                await answer(guarded, refused)
        except TimeoutError:
            if limit.expired() and (streams or not started):
                await self._late(guarded, started)
                return
            if started:
                return  # the client takes no bytes any more; the server closes the connection
            _log.exception("a request failed")
            await answer(guarded, FAULT)
        except Left:
            return
        except Exception:
            _log.exception("a request failed")
            if not started:
                await answer(guarded, FAULT)

    async def _late(self, send: Any, started: bool) -> None:
        """Ends an answer that takes too long: a stream gets one more event, which says so."""
        seconds = self._limits.answer_seconds
        refused = Refused(504, f"the answer took more than {seconds:g} seconds: ask for less, or later", code="timeout")
        if started:
            await send({"type": "http.response.body", "body": event(refused.body(), "error")})
        else:
            await answer(send, refused)

    def _check(self, scope: Any) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self._hosts is not None and _name(host) not in self._hosts:
            raise Refused(
                403, f"Host {shown(host)} is not this server: use http://localhost", code="wrong_host"
            )  # a web site whose name points to this machine would pass for one of the server's own pages
        path = scope["path"]
        if self._key is not None and (path == "/metrics" or path.startswith("/v1")):
            word, _, given = headers.get(b"authorization", b"").partition(b" ")
            if word.lower() != b"bearer" or not hmac.compare_digest(_digest(given.strip()), self._key):
                raise Refused(
                    401, "the API key is missing or wrong: send the header Authorization: Bearer KEY",
                    code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if self._key is None and origin and urllib.parse.urlsplit(origin).netloc != host:
            raise Refused(403, f"pages of {shown(origin)} may not use this server", code="wrong_origin")


def _name(host: str) -> str:
    """The name in a `Host` header, without the port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def _digest(key: bytes) -> bytes:
    """Digests have one length, so comparing them takes one time."""
    return hashlib.sha256(key).digest()


async def answer(send: Any, refused: Refused) -> None:
    """Sends a refusal."""
    body = json.dumps(refused.body()).encode()
    headers = {**refused.headers, "Content-Type": "application/json", "Content-Length": str(len(body))}
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})

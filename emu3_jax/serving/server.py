"""The server around the application: its socket, its start, and an end that finishes what was begun."""

import asyncio
import ipaddress
import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from emu3_jax.errors import Emu3Error
from emu3_jax.printable import shown
from emu3_jax.serving.jobs import Jobs
from emu3_jax.serving.refusals import Refused

_HEAD_SECONDS = 20.0  # in which the head of a request must arrive
_UNREAD_SECONDS = 60.0  # after which a connection is dropped whose client takes no bytes
_MOST_CONNECTIONS = 512
_LEAST_KEY = 8  # characters


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`.

    Raises:
        Emu3Error: the name has no address.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise Emu3Error(f"--host {shown(host)} has no address: give one of this machine, or 127.0.0.1") from error
    return all(ipaddress.ip_address(str(address[4][0]).partition("%")[0]).is_loopback for address in found)


def check_key(key: str | None, host: str, insecure: bool) -> bool:
    """Checks the key, and that another interface than loopback has one.

    Returns:
        Whether `host` is loopback.

    Raises:
        Emu3Error: the key is too short or cannot stand in a header, or it is missing.
    """
    if key is not None and (len(key) < _LEAST_KEY or not key.isascii() or not key.isprintable() or " " in key):
        raise Emu3Error(f"the API key must have at least {_LEAST_KEY} printable ASCII characters and no space")
    loopback = is_loopback(host)
    if not loopback and key is None and not insecure:
        raise Emu3Error(
            f"--host {host} is open to other machines: set EMU3_JAX_API_KEY or give --api-key, or --insecure to let "
            "everybody in"
        )
    return loopback


def bind(host: str, port: int) -> socket.socket:
    """Takes an address before anything else is loaded; connections wait until `serve`. Port 0 takes a free one.

    Raises:
        Emu3Error: the port is in use or not allowed, or the host is not this machine's.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise Emu3Error(f"cannot serve at {host} port {port}: {reason}; choose another --port or --host") from error
    return bound


def address(bound: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Protocol(H11Protocol):
    """Uvicorn's protocol, with time limits for heads of requests and for unread answers, and errors in JSON."""

    _head: asyncio.TimerHandle | None = None  # while a head is awaited
    _unread: asyncio.TimerHandle | None = None  # while the client takes no bytes

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > _MOST_CONNECTIONS:
            transport.close()
            return
        self._head = self.loop.call_later(_HEAD_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        # Uvicorn's own limit, for silent connections between requests, ends with the first byte of a head.
        if self._head is None and self._awaits_head():
            self._head = self.loop.call_later(_HEAD_SECONDS, self.transport.close)
        super().data_received(data)
        if not self._awaits_head():
            _cancel(self._head)
            self._head = None

    def _awaits_head(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def pause_writing(self) -> None:
        # `close` would wait for ever until the client has taken the rest.
        self._unread = self.loop.call_later(_UNREAD_SECONDS, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        _cancel(self._unread)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._head)
        _cancel(self._unread)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        body = json.dumps(Refused(400, "this is no HTTP request", code="invalid_http").body()).encode()
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        self.transport.close()


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class _Server(uvicorn.Server):
    """Uvicorn's server. At its end, `Jobs` takes no more jobs and finishes the others, within a time.

    While they finish, connections are still taken: new jobs get 503, and so does `/health`. So a proxy learns that this
    server ends before its address is gone.
    """

    def __init__(self, config: uvicorn.Config, jobs: Jobs, ready: Callable[[], None]):
        super().__init__(config)
        self._jobs, self._ready = jobs, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # A thread of its own: it may wait longer than the grace time.
        finishing = threading.Thread(target=self._jobs.close, args=(True,), daemon=True)
        finishing.start()
        until = time.monotonic() + (self.config.timeout_graceful_shutdown or 1)
        while finishing.is_alive() and not self.force_exit and time.monotonic() < until:
            await asyncio.sleep(0.02)
        self.config.timeout_graceful_shutdown = max(1, round(until - time.monotonic()))
        await super().shutdown(sockets)
        await asyncio.to_thread(self._jobs.close, False)


def make_server(
    app: Any, jobs: Jobs, *, grace: float = 60.0, ready: Callable[[], None] = lambda: None
) -> uvicorn.Server:
    """A server, whose `run(sockets=[...])` blocks until a signal, or until its `should_exit` is set.

    Args:
        app: see `app.make_app`.
        jobs: are closed at the end.
        grace: seconds that requests get to finish after SIGTERM or Ctrl-C.
        ready: is called when requests are taken.
    """
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # `Guard` writes about errors
    config = uvicorn.Config(
        app, http=_Protocol, ws="none", lifespan="off", log_config=None, access_log=False, proxy_headers=False,
        server_header=False, timeout_graceful_shutdown=max(1, round(grace)), h11_max_incomplete_event_size=32 << 10,
    )  # fmt: skip
    return _Server(config, jobs, ready)

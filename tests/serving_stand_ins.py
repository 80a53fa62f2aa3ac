"""Stand-ins for the parts of a server: `Jobs` that draw grey pictures by themselves, and clients in process."""

import asyncio
import base64
import contextlib
import io
import json
import subprocess
import sys
import threading
import time
import urllib.parse
from typing import Any

import numpy as np
from PIL import Image

from emu3_jax.errors import Emu3Error
from emu3_jax.serving.jobs import (
    NO_DOCUMENTS,
    AnswerJob,
    AnswerText,
    Busy,
    ClipFrames,
    ClipJob,
    Closing,
    DocumentJob,
    DocumentPicture,
    Failed,
    Finished,
    PictureRows,
    Started,
    Unsupported,
)
from emu3_jax.text.tokenizer import SpecialTokenError

PICTURES, CHAT = "/v1/images/generations", "/v1/chat/completions"
SIDE = 16
MOST = 40  # jobs in a queue


def data_url(side=8, form="PNG") -> str:
    """A red square."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(file, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def picture(encoded: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def question(text="what?", url=None):
    shown = [{"type": "image_url", "image_url": {"url": url or data_url()}}]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


class FakeTicket:
    def __init__(self, jobs, job):
        self.jobs, self.job, self._stop, self._over = jobs, job, threading.Event(), False

    def events(self):
        try:
            yield Started(0.0)
            if self.job.prompt == "fail":
                yield Failed("the device failed")
                return
            for step in range(4):
                if self.job.prompt == "wait" and step == 2:
                    self.jobs.release.wait(30)
                if self.jobs.closed or self._stop.is_set():
                    return
                if isinstance(self.job, ClipJob):
                    yield ClipFrames(step, np.full((1, SIDE, SIDE, 3), step, np.uint8))
                elif isinstance(self.job, AnswerJob | DocumentJob):
                    yield AnswerText("abcd"[step])
                else:
                    yield PictureRows(np.full((4 * (step + 1), SIDE, 3), step, np.uint8), (SIDE, SIDE))
                if self.job.prompt == "for ever":
                    while not self._stop.wait(0.002):
                        yield PictureRows(np.full((8, SIDE, 3), step, np.uint8), (SIDE, SIDE))
                    return
            if isinstance(self.job, AnswerJob):
                yield Finished(text="abcd", ended=self.job.max_new_tokens > 4, prompt_tokens=3, tokens=4, passes=4)
                return
            if isinstance(self.job, DocumentJob):
                yield from self._document()
                return
            if isinstance(self.job, ClipJob):
                yield Finished(clip=np.zeros((self.job.frames, SIDE, SIDE, 3), np.uint8), tokens=6)
                return
            picture = Image.new("RGB", (SIDE, SIDE), "gray")
            picture.info = {"prompt": self.job.prompt, "seed": str(self.job.seed), "guidance": str(self.job.guidance)}
            yield Finished(picture=picture, prompt_tokens=5, tokens=6, passes=6)
        finally:
            self._end()

    def _document(self):
        picture = Image.new("RGB", (SIDE, SIDE), "gray")
        picture.info = {"prompt": self.job.prompt, "seed": str(self.job.seed)}
        found = () if self.job.prompt == "text alone" else (picture,)
        yield from map(DocumentPicture, found)
        first = found[0] if found and self.job.most_pictures == 1 else None
        yield Finished(picture=first, pictures=found, text="abcd", prompt_tokens=9, picture_tokens=4, tokens=6)

    def cancel(self):
        self._stop.set()
        self._end()

    def _end(self):
        with self.jobs.lock:
            if not self._over:
                self._over = True
                self.jobs.open -= 1


class FakeJobs:
    """Counts tickets that are neither finished nor cancelled in `open`; keeps all jobs in `jobs`."""

    def __init__(self, documents=False):
        self.documents = documents
        self.lock, self.open, self.jobs, self.closed, self.ending = threading.Lock(), 0, [], [], False
        self.release = threading.Event()  # lets jobs with the prompt "wait" finish

    def submit(self, job):
        if isinstance(job, DocumentJob) and not self.documents:
            raise Unsupported(NO_DOCUMENTS)
        if self.ending:
            raise Closing
        if not 0 <= job.temperature <= 1e9:
            raise Emu3Error(f"temperature is {job.temperature}: it must be 0, or a number from 1e-9 to 1e9")
        if getattr(job, "guidance", 0) < 0:
            raise Emu3Error(f"guidance is {job.guidance}: it must be a number from 0 to 1e9")
        if any(min(picture.size) < 2 for picture in getattr(job, "pictures", ())):
            raise Emu3Error("a picture of 1x1 pixels is too small: each side must have at least 2 pixels; enlarge it")
        if "<|image start|>" in job.prompt + getattr(job, "negative", ""):
            raise SpecialTokenError("<|image start|>")
        with self.lock:
            if self.open >= MOST or job.prompt == "busy":
                raise Busy(7)
            self.open += 1
            self.jobs.append(job)
        return FakeTicket(self, job)

    def figures(self):
        kinds = {"picture": 2, "answer": 0.5}
        return {"rows_in_use": self.open, "jobs_total": len(self.jobs), "kind": "fake", "closing": self.ending,
                "seconds_by_kind_total": kinds}  # fmt: skip

    def close(self, finish):
        self.ending = True
        if not finish:
            self.closed.append(finish)


class FakeModel:
    name = "tiny"

    def tokenize(self, media):
        return [np.arange(4, dtype=np.int32).reshape(2, 2) for _ in media]

    def detokenize(self, codes):
        return [Image.new("RGB", (SIDE, SIDE), "red") for _ in codes]


class Answer:
    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def refusal(self) -> dict:
        """The error object, after a look at its shape."""
        assert 400 <= self.status < 500, (self.status, self.body)
        assert self.headers["content-type"] == "application/json"
        found = self.json
        assert found.keys() == {"error"} and found["error"].keys() == {"message", "type", "param", "code"}
        line = found["error"]["message"]
        assert 0 < len(line) <= 300 and "\n" not in line and "Traceback" not in line and "/work" not in line
        return found["error"]

    @property
    def events(self) -> list:
        parts = [part for part in self.body.decode().split("\n\n") if part and not part.startswith(":")]
        return [part.rpartition("data: ")[2] for part in parts]


async def ask(app, method, path, body=b"", headers=None, *, leave_after=None):
    """One request to an ASGI application. `leave_after`: the client leaves after this number of parts."""
    if not isinstance(body, bytes | list):
        body = json.dumps(body).encode()
    given = {"host": "localhost:8000", "content-type": "application/json", **(headers or {})}
    pairs = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in given.items()]
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": method,
        "scheme": "http", "path": path.partition("?")[0], "raw_path": path.encode(), "root_path": "",
        "query_string": path.partition("?")[2].encode(), "headers": pairs, "client": ("127.0.0.1", 5),
        "server": ("127.0.0.1", 8000),
    }  # fmt: skip
    pieces = list(body) if isinstance(body, list) else [body]
    left = asyncio.Event()
    parts, start = [], {}

    async def receive():
        if pieces:
            piece = pieces.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(pieces)}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if message["type"] == "http.response.start":
            start.update(message)
        else:
            parts.append(message.get("body", b""))
        if leave_after is not None and len(parts) >= leave_after:
            left.set()

    await app(scope, receive, send)
    found = {k.decode().lower(): v.decode() for k, v in start.get("headers", [])}
    return Answer(start.get("status"), found, b"".join(parts))


@contextlib.contextmanager
def served(app, jobs, *, grace=5.0):
    """A server on a free port of loopback, in a thread. Yields its URL."""
    from emu3_jax.serving.server import address, bind, make_server

    ready = threading.Event()
    server = make_server(app, jobs, grace=grace, ready=ready.set)
    bound = bind("127.0.0.1", 0)
    url = address(bound)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        assert ready.wait(30)
        yield url
    finally:
        server.should_exit = True
        thread.join()
        bound.close()


KILLED = """
import socket, sys
port, path, body = sys.argv[1:]
head = f"POST {path} HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Type: application/json\\r\\n"
with socket.create_connection(("127.0.0.1", int(port))) as asking:
    asking.sendall(f"{head}Content-Length: {len(body)}\\r\\n\\r\\n{body}".encode())
    found = b""
    while b"data: {" not in found:
        found += asking.recv(65536)
    print("streams", flush=True)
    while asking.recv(65536):
        pass
"""


def kill_in_mid_stream(url, path, body, count, streaming=lambda: None):
    """Starts `count` clients in processes of their own, and kills them when the first event has come to all of them."""
    port = str(urllib.parse.urlsplit(url).port)
    command = [sys.executable, "-I", "-S", "-c", KILLED, port, path, json.dumps({**body, "stream": True})]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(count)]
    for process in started:
        assert process.stdout.readline() == b"streams\n"
    streaming()
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def wait_until(true, seconds=20):
    """Waits until `true()`."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)

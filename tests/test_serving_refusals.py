"""Wrong requests by the thousand, and bounds of memory and time: what the server refuses, and with what words."""

import asyncio
import dataclasses
import gc
import http.client
import json
import pathlib
import random
import resource
import socket
import time
import urllib.parse
import weakref

import pytest
from serving_stand_ins import CHAT, PICTURES, Answer, FakeJobs, FakeModel, ask, data_url, question, served

from emu3_jax.media.sizes import generate_size
from emu3_jax.serving.app import make_app
from emu3_jax.serving.guard import LOOPBACK
from emu3_jax.serving.limits import Limits


@pytest.fixture
def jobs():
    found = FakeJobs()
    yield found
    found.release.set()


@pytest.fixture
def app(jobs):
    return make_app(jobs, FakeModel(), hosts=LOOPBACK)


def run(work):
    return asyncio.run(work)


def wrong_bodies(draw: random.Random):
    """Bodies that no endpoint accepts."""
    odd = [
        None, True, -1, 1.5, 10**400, "", "x" * 40_000, [], [[]], {}, {"a": {}}, "\ud800", "\0", "<|image start|>",
        1e308, "data:image/png;base64,AAAA", "http://169.254.169.254/", "file:///etc/passwd", "../../etc/passwd",
    ]  # fmt: skip
    raw = [
        b"", b"null", b"[]", b"{", b"\xff\xfe", b'{"prompt":NaN}', b'{"prompt":"a","seed":Infinity}', b"[" * 100_000,
        b'{"a":' * 50_000, b'{"prompt":"a","seed":' + b"9" * 5000 + b"}", b"[" + b"0," * 300_000 + b"0]",
        b'{"prompt": "a", "top_p": 1e999}', b"--x\r\nContent-Disposition: form-data\r\n\r\n",
    ]  # fmt: skip
    for path, fields in (
        (PICTURES, ("prompt", "n", "size", "quality", "response_format", "output_format", "output_compression",
                    "stream", "partial_images", "negative_prompt", "guidance_scale", "seed", "top_k", "temperature",
                    "ratio", "area", "model", "style", "backgroun")),
        (CHAT, ("messages", "n", "max_tokens", "stream", "stream_options", "temperature", "tools", "logprobs", "model",
                "frequency_penalty", "stop", "nonsense")),
        ("/v1/reconstructions", ("image", "prompt")),
        ("/v1/videos", ("prompt", "seconds", "size", "frames", "area", "input_reference", "model")),
    ):  # fmt: skip
        for body in raw:
            yield path, body
        for _ in range(2200):
            body = {name: draw.choice(odd) for name in draw.sample(fields, min(len(fields), draw.randint(1, 3)))}
            unknown = draw.choice(["no such field", "\ud800", "a\nb\0", "", "x" * 9000])
            body[unknown] = draw.choice([value for value in odd if value is not None])
            if draw.random() < 0.5:
                body |= {"prompt": "a"} if path == PICTURES else {"messages": question()}
            yield path, json.dumps(body).encode()
    for _ in range(300):
        body = bytearray(b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--x--\r\n')
        for _ in range(draw.randint(1, 30)):
            body[draw.randrange(len(body))] = draw.randrange(256)
        yield "/v1/videos", bytes(body[: draw.randrange(len(body))])
    parts = [{"type": "image_url", "image_url": value} for value in odd] + [{"type": t} for t in odd if t != ""]
    for _ in range(1000):
        content = draw.choice([[draw.choice(parts)], *[value for value in odd if not isinstance(value, str)]])
        messages = [{"role": draw.choice(["user", "tool", None, "assistant"]), "content": content}]
        yield CHAT, json.dumps({"messages": messages * draw.randint(1, 70)}).encode()


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_ten_thousand_wrong_requests(app, jobs):
    """Each gets a 4xx in OpenAI's shape, a request that is under way goes on, and no body stays in memory."""
    pad = b" " * 20_000  # legal after a JSON object; 7,500 bodies that stay would take 150 MB
    with served(app, jobs) as url:
        place = urllib.parse.urlsplit(url)
        flying = http.client.HTTPConnection(place.hostname, place.port, timeout=60)
        head = {"Content-Type": "application/json"}
        flying.request("POST", PICTURES, json.dumps({"prompt": "wait", "stream": True}), head)
        while not jobs.open:
            time.sleep(0.01)
        sender = http.client.HTTPConnection(place.hostname, place.port, timeout=60)
        warm = count = 0
        for count, (path, body) in enumerate(wrong_bodies(random.Random(0)), 1):
            form = path == "/v1/videos" and not body.startswith(b"{")
            kind = "multipart/form-data; boundary=x" if form else "application/json"
            sender.request("POST", path, body if form else body + pad, {"Content-Type": kind})
            found = sender.getresponse()
            answer = Answer(found.status, {k.lower(): v for k, v in found.headers.items()}, found.read())
            assert answer.refusal["type"] in ("invalid_request_error", "not_found_error"), (path, body[:200])
            if count == 2500:
                warm = resident()
        grown = resident() - warm
        sender.close()
        assert count > 10_000 and grown < 48 << 20
        assert jobs.open == 1 and len(jobs.jobs) == 1
        jobs.release.set()
        assert b"image_generation.completed" in flying.getresponse().read()
        flying.close()
    assert jobs.open == 0


def test_wrong_methods_and_paths(app, jobs):
    for method, path in (("GET", PICTURES), ("PUT", "/v1/models"), ("GET", "/../etc/passwd"), ("POST", "/\0"),
                         ("POST", PICTURES + "/"), ("GET", "/health/"),
                         ("GET", "/v1/models/" + "x" * 9000), ("DELETE", "/v1/videos/%00")):  # fmt: skip
        assert run(ask(app, method, path)).refusal
    assert jobs.jobs == []


def test_servers_behind_one_address_refuse_clips(jobs):
    app = make_app(jobs, FakeModel(), clips=False)
    assert "several replicas make no clips" in run(ask(app, "POST", "/v1/videos", {"prompt": "a"})).refusal["message"]
    assert jobs.jobs == []


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_empty_prompts_are_refused(app, jobs, text):
    empty = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": text}]
    for path, body, param in (
        (PICTURES, {"prompt": text}, "prompt"),
        ("/v1/videos", {"prompt": text}, "prompt"),
        (CHAT, {"messages": [{"role": "user", "content": text}]}, "messages"),
        (CHAT, {"messages": empty}, "messages"),
    ):
        refusal = run(ask(app, "POST", path, body)).refusal
        assert refusal["param"] == param and "is empty" in refusal["message"]
    assert jobs.jobs == []
    assert run(ask(app, "POST", CHAT, {"messages": question("")})).status == 200  # a picture alone is a question


@pytest.mark.parametrize(
    ("size", "ratio"),
    [("1024x1024", "1:1"), ("auto", "1:1"), ("1536x1024", "3:2"), ("1000x1001", "1000:1001"), ("99999x1", "5:1"),
     ("100x900", "1:5")],
)  # fmt: skip
def test_sizes_become_legal_ratios(app, jobs, size, ratio):
    assert run(ask(app, "POST", PICTURES, {"prompt": "a", "size": size})).json["ratio"] == ratio
    assert jobs.jobs[0].ratio == ratio and generate_size(ratio, 720 * 720)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        (PICTURES, {"prompt": "a <|image start|>"}, "prompt", "control_token"),
        (PICTURES, {"prompt": "a", "negative_prompt": "<|image start|>", "n": 2}, "negative_prompt", "control_token"),
        (CHAT, {"messages": question("<|image start|>")}, "messages", "control_token"),
        (PICTURES, {"prompt": "a", "temperature": 1e10}, "temperature", "invalid_value"),
        (PICTURES, {"prompt": "a", "guidance_scale": -1}, "guidance_scale", "invalid_value"),
        (CHAT, {"messages": question(), "temperature": -1}, "temperature", "invalid_value"),
    ],
)
def test_what_jobs_refuse_names_the_field(app, jobs, path, body, param, code, stream):
    refusal = run(ask(app, "POST", path, {**body, "stream": stream})).refusal
    assert (refusal["param"], refusal["code"]) == (param, code) and refusal["message"].startswith(param)
    assert "--" not in refusal["message"] and jobs.open == 0  # no remedy of the command line


def test_a_picture_that_jobs_refuse_is_in_the_messages(app, jobs):
    refusal = run(ask(app, "POST", CHAT, {"messages": question(url=data_url(1))})).refusal
    assert refusal["param"] == "messages" and "too small" in refusal["message"]


POST = f"POST {PICTURES} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
RAW = {
    b"\x16\x03\x01 no HTTP\r\n\r\n": 400,
    b"GET /health HTTP/1.1\r\n\r\n": 400,
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n": 400,
    b"GET /health HTTP/1.1\r\nHost: \xff\r\n\r\n": 403,
    b"GET http://evil.example/health HTTP/1.1\r\nHost: localhost\r\n\r\n": 404,
    b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n": 400,
    b"GET /%00%ff%ed%a0%80 HTTP/1.1\r\nHost: localhost\r\n\r\n": 404,
    b"GET /v1/models/%ed%a0%80%0d%0a HTTP/1.1\r\nHost: localhost\r\n\r\n": 404,
    b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n": 404,
    b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n": 404,
    b"A" * 5000 + b" /health HTTP/1.1\r\nHost: localhost\r\n\r\n": 405,
    POST + b"Content-Length: -5\r\n\r\n": 400,
    POST + b"Content-Length: 99999999999999\r\n\r\n": 413,
    POST + b"Content-Length: 999999999\r\nExpect: 100-continue\r\n\r\n": 413,
    POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n": 400,
    POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n": 400,
}


def test_requests_that_no_library_sends(app, jobs):
    """Each gets a whole answer in the shape of errors, and none disturbs the next."""
    with served(app, jobs) as url:
        place = urllib.parse.urlsplit(url)
        for sent, status in RAW.items():
            with socket.create_connection((place.hostname, place.port), timeout=30) as asking:
                asking.sendall(sent)
                found = http.client.HTTPResponse(asking)
                found.begin()
                answer = Answer(found.status, {k.lower(): v for k, v in found.headers.items()}, found.read())
                assert answer.refusal and answer.status == status, sent[:80]
    assert jobs.jobs == []


def test_large_pictures_and_bodies(jobs):
    async def look():
        app = make_app(jobs, FakeModel(), Limits(body_bytes=1 << 20, body_seconds=0.2, picture_pixels=10_000))
        found = await ask(app, "POST", CHAT, {"messages": question(url=data_url(101))})
        assert found.status == 400 and "101x101 pixels; the limit is 10,000" in found.refusal["message"]
        assert (await ask(app, "POST", CHAT, {"messages": question(url=data_url()[:-60])})).refusal
        found = await ask(app, "POST", PICTURES, b"{}", {"content-length": str(1 << 30)})
        assert (found.status, found.headers["connection"]) == (413, "close")
        found = await ask(app, "POST", PICTURES, [b" " * 65536] * 17)  # without a length
        assert found.status == 413
        for length in ("-1", "x", "9" * 50):
            assert (await ask(app, "POST", PICTURES, b"{}", {"content-length": length})).status == 413

        async def endless():
            await asyncio.sleep(10)

        scope = {"type": "http", "method": "POST", "path": PICTURES, "headers": [], "client": None}
        sent = []

        async def send(message):
            sent.append(message)

        await app(scope, endless, send)
        assert sent[0]["status"] == 408

    run(look())
    assert jobs.jobs == []


def test_pictures_are_forgotten_when_their_jobs_are_taken():
    """While an answer is awaited, no uploaded pixels stay in memory. Those of one request are bounded together."""
    kept = []

    class Forgetting(FakeJobs):
        def submit(self, job):
            kept.extend(weakref.ref(picture) for picture in job.pictures)
            return super().submit(dataclasses.replace(job, pictures=()))

    jobs = Forgetting()
    app = make_app(jobs, FakeModel(), Limits(picture_pixels=150))

    async def look():
        for stream in (False, True):
            jobs.release.clear()
            body = {"messages": question("wait"), "n": 2, "stream": stream}
            asking = asyncio.ensure_future(ask(app, "POST", CHAT, body))
            while jobs.open < 2:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            gc.collect()
            assert len(kept) == 2 * (1 + stream) and not any(one() for one in kept)
            jobs.release.set()
            assert (await asking).status == 200
        content = question()[0]["content"]
        messages = [{"role": "user", "content": [content[0], content[0], content[0], content[1]]}]
        found = await ask(app, "POST", CHAT, {"messages": messages})
        assert "[2].image_url" in found.refusal["message"] and "8x8 pixels; the limit is 22" in found.refusal["message"]

    run(look())


def test_large_bodies_at_the_same_time(jobs):
    """What all clients send together is bounded. A small request gets through, and so does the next large one."""
    limits = Limits(body_bytes=1 << 20, held_bytes=3 << 20, body_seconds=30)
    app = make_app(jobs, FakeModel(), limits)
    go, sent = asyncio.Event(), [b" " * (1 << 18)] * 4

    async def slow(scope_sent):
        scope = {
            "type": "http", "method": "POST", "path": PICTURES, "headers": [(b"content-type", b"application/json")],
            "client": None, "query_string": b"",
        }  # fmt: skip
        parts = list(sent)

        async def receive():
            if len(parts) == 1:
                await go.wait()
            if not parts:
                return {"type": "http.disconnect"}
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

        async def send(message):
            scope_sent.append(message)

        await app(scope, receive, send)

    async def look():
        answers = [[] for _ in range(20)]
        clients = [asyncio.ensure_future(slow(answer)) for answer in answers]
        await asyncio.sleep(0.1)
        assert app._bodies.held == 3 << 20
        assert (await ask(app, "POST", PICTURES, {"prompt": "a"})).status == 200
        found = await ask(app, "POST", PICTURES, sent)
        assert found.status == 503 and found.json["error"]["code"] == "overloaded"
        assert (found.headers["retry-after"], found.headers["connection"]) == ("5", "close")
        go.set()
        await asyncio.gather(*clients)
        statuses = [answer[0]["status"] for answer in answers]
        assert set(statuses) == {400, 503} and statuses.count(503) >= 16  # 400: white space is no JSON
        assert app._bodies.held == 0
        assert (await ask(app, "POST", PICTURES, sent)).status == 400

    run(look())


def test_an_answer_that_takes_too_long(jobs):
    app = make_app(jobs, FakeModel(), Limits(answer_seconds=0.2))
    found = run(ask(app, "POST", PICTURES, {"prompt": "wait"}))
    assert found.status == 504 and found.json["error"]["message"].startswith("the answer took more than 0.2 seconds: ")
    found = run(ask(app, "POST", PICTURES, {"prompt": "for ever", "stream": True, "partial_images": 3}))
    assert found.status == 200 and json.loads(found.events[-1])["error"]["code"] == "timeout"
    for _ in range(500):
        if not jobs.open:
            break
        time.sleep(0.01)
    assert jobs.open == 0

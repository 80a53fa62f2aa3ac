"""The endpoint over jobs that draw nothing: OpenAI's client, wrong requests by the thousand, clients that leave."""

import asyncio
import base64
import gc
import http.client
import io
import json
import pathlib
import random
import resource
import socket
import subprocess
import sys
import threading
import time
import urllib.parse

import numpy as np
import openai
import pytest
from PIL import Image
from serving_stand_ins import SIDE, Answer, FakeJobs, FakeModel, ask, served

from emu3_jax.media.sizes import generate_size
from emu3_jax.serving import server
from emu3_jax.serving.app import make_app
from emu3_jax.serving.guard import LOOPBACK, Guard
from emu3_jax.serving.limits import Limits
from emu3_jax.serving.streams import EventStream

KEY = "a key of nobody".replace(" ", "-")
PICTURES, CHAT = "/v1/images/generations", "/v1/chat/completions"


def data_url(side=8, form="PNG") -> str:
    file = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(file, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def picture(encoded: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def question(text="what?", url=None):
    shown = [{"type": "image_url", "image_url": {"url": url or data_url()}}]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


@pytest.fixture
def jobs():
    found = FakeJobs()
    yield found
    found.release.set()


@pytest.fixture
def app(jobs):
    return make_app(jobs, FakeModel(), hosts=LOOPBACK)


@pytest.fixture
def client(jobs):
    with (
        served(make_app(jobs, FakeModel(), key=KEY, hosts=LOOPBACK), jobs) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=30) as found,
    ):
        yield found


def run(work):
    return asyncio.run(work)


# ------------------------------------------------------------------------------------------------ OpenAI's client


def test_the_client_draws(client, jobs):
    found = client.images.generate(
        prompt="a red heart", n=2, size="1792x1024", output_format="webp", quality="auto", model="tiny",
        extra_body={"negative_prompt": "blue", "guidance_scale": 2, "seed": 7, "top_k": 5, "temperature": 0.5},
    )  # fmt: skip
    assert [picture(one.b64_json).format for one in found.data] == ["WEBP"] * 2
    assert (found.size, found.output_format, found.usage.total_tokens) == (f"{SIDE}x{SIDE}", "webp", 22)
    assert [job.seed for job in jobs.jobs] == [7, 8] and [one.metadata["seed"] for one in found.data] == ["7", "8"]
    job = jobs.jobs[0]
    assert (job.negative, job.guidance, job.top_k, job.temperature, job.ratio) == ("blue", 2.0, 5, 0.5, "7:4")
    assert found.ratio == "7:4"
    png = picture(client.images.generate(prompt="a").data[0].b64_json)
    assert png.format == "PNG" and png.info["prompt"] == "a"


def test_the_client_streams_a_picture(client, jobs):
    events = list(client.images.generate(prompt="a", stream=True, partial_images=3))
    kinds = ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.type for event in events] == kinds
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    assert all(picture(event.b64_json).size == (SIDE, SIDE) for event in events)
    assert events[-1].usage.total_tokens == 11 and jobs.open == 0


def test_the_client_asks(client, jobs):
    found = client.chat.completions.create(model="tiny", messages=question("what is it?"))
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == ("abcd", "stop")
    assert found.usage.total_tokens == 7 and jobs.jobs[0].pictures[0].size == (8, 8)
    messages = [
        {"role": "system", "content": "be brief"}, *question("first"), {"role": "assistant", "content": "one"},
        {"role": "user", "content": "second"},
    ]  # fmt: skip
    found = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4)
    assert found.choices[0].finish_reason == "length"
    assert (jobs.jobs[1].prompt, jobs.jobs[1].history) == ("second", (("be brief\nfirst", "one"),))


def test_the_client_streams_an_answer(client):
    stream = client.chat.completions.create(
        model="tiny", messages=question(), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "abcd"
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.total_tokens == 7


@pytest.mark.filterwarnings("ignore:The Sora API")  # the client says so of OpenAI's own service
def test_the_client_makes_a_video(client, jobs):
    video = client.videos.create_and_poll(prompt="a", model="tiny", seconds="2", size="1280x720", poll_interval_ms=20)
    assert (video.status, video.progress, video.seconds, video.size) == ("completed", 100, "2", f"{SIDE}x{SIDE}")
    assert (jobs.jobs[0].frames, jobs.jobs[0].ratio) == (16, "16:9")
    assert client.videos.download_content(video.id).content[4:8] == b"ftyp"
    options = {"extra_body": {"fps": 4, "negative_prompt": "blue", "guidance_scale": 2, "seed": 7}}
    red = base64.b64decode(data_url().partition(",")[2])
    other = client.videos.create_and_poll(prompt="b", seconds="3", input_reference=red, poll_interval_ms=20, **options)
    job = jobs.jobs[1]
    assert (other.seconds, job.frames, job.fps, job.picture.size, job.ratio) == ("3", 12, 4.0, (8, 8), None)
    assert (job.negative, job.guidance, job.seed) == ("blue", 2.0, 7) and client.videos.delete(other.id).deleted
    waiting = client.videos.create(prompt="wait")
    with pytest.raises(openai.ConflictError):
        client.videos.download_content(waiting.id)
    assert [one.id for one in client.videos.list()] == [waiting.id, video.id]
    assert client.videos.delete(waiting.id).deleted and jobs.open == 0
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(waiting.id)
    for wrong in ({"seconds": "x"}, {"prompt": "<|image start|>"}, {"size": "big"}, {"input_reference": b"x"},
                  {"extra_body": {"fps": 0}}):  # fmt: skip
        with pytest.raises(openai.BadRequestError):
            client.videos.create(**{"prompt": "a", **wrong})
    assert len(list(client.videos.list())) == 1


def test_a_first_frame_in_json(app, jobs):
    for given in (data_url(), {"image_url": data_url()}):
        assert run(ask(app, "POST", "/v1/videos", {"prompt": "a", "input_reference": given})).status == 200
        assert jobs.jobs[-1].picture.size == (8, 8)
    for given in ("http://localhost/x.png", {"file_id": "x"}, 3):
        refused = run(ask(app, "POST", "/v1/videos", {"prompt": "a", "input_reference": given})).refusal
        assert refused["param"] == "input_reference"


def test_a_clip_without_the_extra_video_is_webp(monkeypatch):
    from emu3_jax.serving import videos_api

    monkeypatch.setattr(videos_api.importlib.util, "find_spec", lambda name: None)
    data, kind = videos_api.encode_clip(np.arange(2, dtype=np.uint8).repeat(768).reshape(2, 16, 16, 3))
    assert kind == "image/webp" and Image.open(io.BytesIO(data)).n_frames == 2


def test_the_client_lists_models_and_reads_errors(client):
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.images.generate(prompt="a", model="gpt-image-2")
    assert (unknown.value.param, unknown.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.RateLimitError) as busy:
        client.images.generate(prompt="busy")
    assert busy.value.response.headers["retry-after"] == "7"
    for options in ({"quality": "hd"}, {"response_format": "url"}):
        with pytest.raises(openai.BadRequestError) as refused:
            client.images.generate(prompt="a", **options)
        assert refused.value.param in options
    with pytest.raises(openai.BadRequestError, match="cannot edit"):
        client.images.edit(image=b"x", prompt="a")
    with pytest.raises(openai.BadRequestError, match="PNG is lossless") as refused:
        client.images.generate(prompt="a", output_compression=50)
    assert refused.value.param == "output_compression"
    with pytest.raises(openai.InternalServerError, match="the device failed"):
        client.images.generate(prompt="fail")
    with pytest.raises(openai.APIError, match="the device failed"):
        list(client.chat.completions.create(model="tiny", stream=True, messages=[{"role": "user", "content": "fail"}]))
    with client.with_options(api_key="wrong") as other, pytest.raises(openai.AuthenticationError):
        other.models.list()


# ------------------------------------------------------------------------------------------------ who may ask


def test_key_host_and_origin(jobs):
    async def look():
        app = make_app(jobs, FakeModel(), key=KEY, hosts=LOOPBACK)
        for path in ("/v1/models", "/metrics", "/v1", "/v1/nothing"):
            for headers in (
                {},
                {"authorization": KEY},
                {"authorization": f"Bearer {KEY}x"},
                {"authorization": "Bearer"},
            ):
                found = await ask(app, "GET", path, headers=headers)
                assert found.status == 401 and found.refusal["code"] == "invalid_api_key"
        assert (await ask(app, "GET", "/health")).json == {"status": "ok"}
        found = await ask(app, "GET", "/metrics", headers={"authorization": f"Bearer {KEY}"})
        assert "# TYPE emu3_jax_jobs_total counter\nemu3_jax_jobs_total 0\n" in found.body.decode()
        assert 'emu3_jax_http_answers_total{status="200"} 1' in found.body.decode()
        label = "# TYPE emu3_jax_seconds_by_kind_total counter\nemu3_jax_seconds_by_kind_total"
        assert f'{label}{{kind="answer"}} 0.5\n' in found.body.decode() and "closing" not in found.body.decode()
        assert found.headers["x-content-type-options"] == "nosniff"
        open_ = make_app(jobs, FakeModel(), hosts=LOOPBACK)
        for host in ("evil.example", "localhost.evil.example", "", "127.0.0.1.evil.example:8000", "[::2]"):
            assert (await ask(open_, "GET", "/health", headers={"host": host})).status == 403
        for host in ("LOCALHOST", "127.0.0.1:1", "[::1]:8000"):
            assert (await ask(open_, "GET", "/health", headers={"host": host})).status == 200
        found = await ask(open_, "POST", PICTURES, {"prompt": "a"}, {"origin": "http://evil.example"})
        assert found.status == 403 and jobs.jobs == []
        found = await ask(open_, "POST", PICTURES, {"prompt": "a"}, {"origin": "http://localhost:8000"})
        assert found.status == 200 and "access-control-allow-origin" not in found.headers
        assert (await ask(open_, "POST", PICTURES, {"prompt": "a"}, {"content-type": "text/plain"})).status == 415

    run(look())


# ------------------------------------------------------------------------------------------------ wrong requests


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


def test_a_picture_as_codes_and_back(app):
    found = run(ask(app, "POST", "/v1/reconstructions", {"image": data_url(form="JPEG")})).json
    assert found["codes"] == [[0, 1], [2, 3]] and picture(found["b64_json"]).size == (SIDE, SIDE)


# ------------------------------------------------------------------------------------------------ clients that leave


def test_a_client_that_leaves_cancels(app, jobs):
    async def leave():
        for number in range(100):
            body = {"prompt": "for ever", "stream": bool(number % 2), "partial_images": 3, "n": 1 + number % 3}
            if number % 2:
                await ask(app, "POST", PICTURES, body, leave_after=1)
            else:
                with pytest.raises(TimeoutError):  # a handler that is cancelled, as by a server that stops
                    await asyncio.wait_for(ask(app, "POST", PICTURES, body), 0.01)
        for _ in range(500):
            if not jobs.open:
                return
            await asyncio.sleep(0.01)

    run(leave())
    assert (len(jobs.jobs), jobs.open) == (sum(1 + number % 3 for number in range(100)), 0)


KILLED = """
import socket, sys
body = b'{"prompt": "for ever", "stream": true, "partial_images": 3}'
head = "POST /v1/images/generations HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Type: application/json\\r\\n"
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as asking:
    asking.sendall(f"{head}Content-Length: {len(body)}\\r\\n\\r\\n".encode() + body)
    found = b""
    while b"partial_image" not in found:
        found += asking.recv(65536)
    print("streams", flush=True)
    while asking.recv(65536):
        pass
"""


def test_killed_clients_leave_no_job(app, jobs):
    """A hundred clients, killed in mid-stream."""
    with served(app, jobs) as url:
        for _ in range(20):
            command = [sys.executable, "-I", "-S", "-c", KILLED, str(urllib.parse.urlsplit(url).port)]
            started = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(5)]
            for process in started:
                assert process.stdout.readline() == b"streams\n"
            assert jobs.open == 5
            for process in started:
                process.kill()
                process.wait()
                process.stdout.close()
            for _ in range(500):
                if not jobs.open:
                    break
                time.sleep(0.01)
            assert jobs.open == 0
        assert len(jobs.jobs) == 100


def test_clients_that_neither_read_nor_write_are_dropped(app, jobs, monkeypatch):
    """A client that takes no bytes, and one that sends half a head on a connection that was in use."""
    monkeypatch.setattr(server, "_UNREAD_SECONDS", 0.2)
    monkeypatch.setattr(server, "_HEAD_SECONDS", 0.2)
    lost, ended = threading.Event(), server._Protocol.connection_lost

    def connection_lost(protocol, error):
        ended(protocol, error)
        lost.set()

    async def flood():
        while True:
            yield b"x" * (1 << 20)

    async def flooded(scope, receive, send):
        await EventStream(flood())(scope, receive, send)

    monkeypatch.setattr(server._Protocol, "connection_lost", connection_lost)
    with served(Guard(flooded, Limits()), FakeJobs()) as url:
        place = urllib.parse.urlsplit(url)
        with socket.create_connection((place.hostname, place.port), timeout=30) as deaf:
            deaf.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert lost.wait(30)
    with served(app, jobs) as url:
        place = urllib.parse.urlsplit(url)
        with socket.create_connection((place.hostname, place.port), timeout=30) as slow:
            slow.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert slow.recv(20).startswith(b"HTTP/1.1 200")
            slow.sendall(b"GET /heal")
            while slow.recv(1000):
                pass


def test_the_server_finishes_what_it_began(app, jobs):
    with served(app, jobs, grace=30) as url:
        place = urllib.parse.urlsplit(url)
        body = json.dumps({"prompt": "wait"}).encode()
        head = f"POST {PICTURES} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        asking = socket.create_connection((place.hostname, place.port), timeout=30)
        asking.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        with socket.create_connection((place.hostname, place.port), timeout=30) as garbage:
            garbage.sendall(b"\x16\x03\x01 no HTTP\r\n\r\n")
            assert b"HTTP/1.1 400" in garbage.recv(1000)
        while not jobs.open:
            time.sleep(0.01)
        threading.Timer(0.5, jobs.release.set).start()  # after the server was told to end
    with asking:
        assert asking.recv(20).startswith(b"HTTP/1.1 200")
    assert jobs.closed == [False]


def test_while_jobs_finish_the_server_says_that_it_ends():
    """Connections are taken until the last job is done: `/health` and new jobs get 503."""
    done = threading.Event()

    class Finishing(FakeJobs):
        def close(self, finish):
            super().close(finish)
            assert done.wait(30)

    jobs, found = Finishing(), []

    def look(url):
        place = urllib.parse.urlsplit(url)
        while not jobs.ending:
            time.sleep(0.01)
        for method, path, body in (("GET", "/health", b""), ("POST", PICTURES, b'{"prompt": "a"}')):
            asking = http.client.HTTPConnection(place.hostname, place.port, timeout=30)
            asking.request(method, path, body, {"Content-Type": "application/json"})
            answer = asking.getresponse()
            found.append((answer.status, answer.headers["retry-after"], json.load(answer)["error"]["code"]))
            asking.close()
        done.set()

    with served(make_app(jobs, FakeModel(), hosts=LOOPBACK), jobs, grace=30) as url:
        looking = threading.Thread(target=look, args=(url,))
        looking.start()
    looking.join()
    assert found == [(503, "5", "shutting_down")] * 2


def test_rows_become_a_whole_picture():
    from emu3_jax.serving.pixels import partial_picture

    image = np.asarray(partial_picture(np.full((2, 4, 3), 9, np.uint8), (4, 6)))
    assert image.shape == (6, 4, 3) and (image[:2] == 9).all() and (image[2:] == 118).all()

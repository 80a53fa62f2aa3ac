"""The endpoint over jobs that draw nothing: OpenAI's client, who may ask, clients that leave."""

import asyncio
import base64
import http.client
import io
import json
import socket
import threading
import time
import urllib.parse

import numpy as np
import openai
import pytest
from PIL import Image
from serving_stand_ins import (
    PICTURES,
    SIDE,
    FakeJobs,
    FakeModel,
    ask,
    data_url,
    kill_in_mid_stream,
    picture,
    question,
    served,
    wait_until,
)

from emu3_jax.serving import server
from emu3_jax.serving.app import make_app
from emu3_jax.serving.guard import LOOPBACK, Guard
from emu3_jax.serving.limits import Limits
from emu3_jax.serving.streams import EventStream

KEY = "a key of nobody".replace(" ", "-")


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
                wanted = len(jobs.jobs) + body["n"]
                request = asyncio.ensure_future(ask(app, "POST", PICTURES, body))
                while len(jobs.jobs) < wanted:
                    await asyncio.sleep(0.001)
                request.cancel()  # a handler that is cancelled, as by a server that stops
                with pytest.raises(asyncio.CancelledError):
                    await request
        for _ in range(500):
            if not jobs.open:
                return
            await asyncio.sleep(0.01)

    run(leave())
    assert (len(jobs.jobs), jobs.open) == (sum(1 + number % 3 for number in range(100)), 0)


def test_killed_clients_leave_no_job(app, jobs):
    """A hundred clients, killed in mid-stream."""

    def all_stream():
        assert jobs.open == 5

    with served(app, jobs) as url:
        for _ in range(20):
            kill_in_mid_stream(url, PICTURES, {"prompt": "for ever", "partial_images": 3}, 5, all_stream)
            wait_until(lambda: not jobs.open)
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

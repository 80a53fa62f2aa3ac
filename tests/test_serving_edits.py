"""Edits and answers with pictures over HTTP: OpenAI's client, forms and JSON, wrong requests, a server without them."""

import asyncio
import base64
import io
import json
import random

import openai
import pytest
from PIL import Image
from serving_stand_ins import SIDE, FakeJobs, FakeModel, ask, served

from emu3_jax.serving.app import make_app
from emu3_jax.serving.guard import LOOPBACK
from emu3_jax.serving.limits import Limits

EDITS, CHAT = "/v1/images/edits", "/v1/chat/completions"


def png(side: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(file, "PNG")
    return file.getvalue()


def data_url(side: int = 8) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(side)).decode()}"


def picture(encoded: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded.rpartition(",")[2])))


def question(text="Tell a story", url=None):
    shown = [{"type": "image_url", "image_url": {"url": url or data_url()}}]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


@pytest.fixture
def jobs():
    found = FakeJobs(documents=True)
    yield found
    found.release.set()


@pytest.fixture
def app(jobs):
    return make_app(jobs, FakeModel(), hosts=LOOPBACK)


@pytest.fixture
def client(app, jobs):
    with served(app, jobs) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_the_client_edits(client, jobs):
    found = client.images.edit(
        image=png(), prompt="Make it green", n=2, size="1024x1024", output_format="webp", output_compression=90,
        extra_body={"seed": 7, "guidance_scale": 2, "text_temperature": 0},
    )  # fmt: skip
    assert [picture(one.b64_json).format for one in found.data] == ["WEBP"] * 2
    assert [job.seed for job in jobs.jobs] == [7, 8] and found.data[1].metadata["seed"] == "8"
    job = jobs.jobs[0]
    assert (job.prompt, job.guidance, job.text_temperature, job.ratio) == ("Make it green", 2.0, 0.0, "1:1")
    assert job.pictures[0].size == (8, 8) and job.most_pictures == 1
    assert found.usage.input_tokens_details.image_tokens == 8 and found.usage.total_tokens == 30
    client.images.edit(image=[png(), png(9)], prompt="a")
    assert [one.size for one in jobs.jobs[2].pictures] == [(8, 8), (9, 9)] and jobs.jobs[2].ratio is None
    events = list(client.images.edit(image=png(), prompt="a", stream=True, partial_images=2))
    assert [event.type for event in events] == ["image_edit.completed"]
    assert picture(events[0].b64_json).size == (SIDE, SIDE) and jobs.open == 0


def test_an_edit_without_a_picture(client):
    with pytest.raises(openai.UnprocessableEntityError, match="the model wrote no picture: try again with another"):
        client.images.edit(image=png(), prompt="text alone")


def test_the_client_gets_an_answer_with_pictures(client, jobs):
    options = {"model": "tiny", "messages": question(), "extra_body": {"modalities": ["text", "image"], "seed": 3}}
    found = client.chat.completions.create(**options)
    message = found.choices[0].message
    assert message.content == "abcd" and picture(message.images[0]["image_url"]["url"]).info["seed"] == "3"
    assert jobs.jobs[0].temperature == jobs.jobs[0].text_temperature == 1.0 and jobs.jobs[0].most_pictures is None
    chunks = [chunk.choices[0].delta for chunk in client.chat.completions.create(**options, stream=True)]
    assert "".join(delta.content or "" for delta in chunks) == "abcd"
    (shown,) = [delta.images for delta in chunks if getattr(delta, "images", None)]
    assert picture(shown[0]["image_url"]["url"]).size == (SIDE, SIDE)


def run(work):
    return asyncio.run(work)


def test_edits_in_json(app, jobs):
    assert run(ask(app, "POST", EDITS, {"prompt": "a", "image": data_url()})).status == 200
    assert run(ask(app, "POST", EDITS, {"prompt": "a", "image": [data_url(), data_url(9)]})).status == 200
    assert [len(job.pictures) for job in jobs.jobs] == [1, 2]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (EDITS, {"prompt": "a"}, "image"),
        (EDITS, {"prompt": "a", "image": []}, "image"),
        (EDITS, {"prompt": "a", "image": [3]}, "image"),
        (EDITS, {"prompt": "a", "image": "http://169.254.169.254/"}, "image"),
        (EDITS, {"prompt": "a", "image": [data_url()] * 9}, "image"),
        (EDITS, {"prompt": "a", "image": data_url(101)}, "image"),
        (EDITS, {"prompt": "a", "image": data_url(1)}, None),
        (EDITS, {"prompt": "a", "image": data_url(), "mask": data_url()}, "mask"),
        (EDITS, {"prompt": " ", "image": data_url()}, "prompt"),
        (EDITS, {"prompt": "<|image start|>", "image": data_url()}, "prompt"),
        (EDITS, {"prompt": "a", "image": data_url(), "nonsense": 1}, "nonsense"),
        (EDITS, {"prompt": "a", "image": data_url(), "guidance_scale": -1}, "guidance_scale"),
        (CHAT, {"messages": question(), "modalities": ["audio"]}, "modalities"),
        (CHAT, {"messages": question("<|image start|>"), "modalities": ["text", "image"]}, "messages"),
        (CHAT, {"messages": [*question(), {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
                "modalities": ["image", "text"]}, "messages"),
    ],
)  # fmt: skip
def test_wrong_requests_name_the_field(jobs, path, body, param):
    app = make_app(jobs, FakeModel(), Limits(picture_pixels=10_000), hosts=LOOPBACK)
    assert run(ask(app, "POST", path, body)).refusal["param"] == param and jobs.jobs == []


@pytest.mark.parametrize("path", [EDITS, CHAT])
def test_a_server_without_documents(path):
    jobs = FakeJobs()
    body = {"prompt": "a", "image": data_url()} if path == EDITS else {"messages": question()}
    body |= {"modalities": ["text", "image"]} if path == CHAT else {}
    refused = run(ask(make_app(jobs, FakeModel(), hosts=LOOPBACK), "POST", path, body)).refusal
    assert refused["code"] == "unsupported_model" and "emu3-jax serve --documents" in refused["message"]


def test_damaged_forms(app, jobs):
    draw = random.Random(0)
    head = b'--x\r\nContent-Disposition: form-data; name="'
    whole = head + b'prompt"\r\n\r\na\r\n' + head + b'image"; filename="a.png"\r\n\r\n' + png() + b"\r\n--x--\r\n"
    kind = {"content-type": "multipart/form-data; boundary=x"}

    async def attack():
        assert (await ask(app, "POST", EDITS, whole, kind)).status == 200
        refused = 0
        for _ in range(300):
            body = bytearray(whole)
            for _ in range(draw.randint(1, 30)):
                body[draw.randrange(len(body))] = draw.randrange(256)
            found = await ask(app, "POST", EDITS, bytes(body[: draw.randrange(1, len(body))]), kind)
            refused += found.status != 200 and bool(found.refusal)
        nine = whole.replace(b"--x--\r\n", b"") + (head + b'image[]"; filename="b"\r\n\r\nx\r\n') * 9 + b"--x--\r\n"
        assert "Too many files" in (await ask(app, "POST", EDITS, nine, kind)).refusal["message"]
        return refused

    assert run(attack()) == 300
    assert json.dumps(len(jobs.jobs)) == "1" and jobs.open == 0

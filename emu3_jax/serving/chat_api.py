"""`POST /v1/chat/completions`: questions about pictures, and answers of texts and pictures in turn."""

import asyncio
import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from PIL import Image

from emu3_jax.generation import defaults
from emu3_jax.printable import shown
from emu3_jax.serving.fields import Fields, check_model
from emu3_jax.serving.following import check, following
from emu3_jax.serving.jobs import AnswerJob, AnswerText, DocumentJob, DocumentPicture, Finished, Jobs
from emu3_jax.serving.limits import Limits
from emu3_jax.serving.pictures_api import about_picture, read_ratio, read_sampling
from emu3_jax.serving.pixels import encode_picture, read_picture
from emu3_jax.serving.refusals import bad
from emu3_jax.serving.streams import event


@dataclasses.dataclass
class ChatRequest:
    """A request for answers, one job each. Answers with pictures are documents."""

    jobs: tuple[AnswerJob | DocumentJob, ...]
    model: str
    stream: bool
    include_usage: bool

    def take(self) -> tuple[AnswerJob | DocumentJob, ...]:
        """The jobs. The request forgets their pictures, whose pixels would fill the memory while answers are made."""
        jobs = self.jobs
        self.jobs = tuple(dataclasses.replace(job, pictures=()) for job in jobs)
        return jobs


def read_request(fields: Fields, limits: Limits, model: str, client: str) -> ChatRequest:
    """Reads the fields, and decodes the pictures.

    Raises:
        Refused: a field is wrong or unknown, or a picture cannot be read.
    """
    check_model(fields, model)
    n = fields.whole("n", 1, 1, limits.n)
    drawing = _wants_pictures(fields)
    settings, seeds = read_sampling(fields, n, defaults.TEMPERATURE if drawing else 0.0)
    most = limits.max_new_tokens
    tokens = fields.whole("max_tokens", min(defaults.MAX_NEW_TOKENS, most), 1, most)
    tokens = fields.whole("max_completion_tokens", tokens, 1, most)
    stream = fields.flag("stream")
    options = fields.raw("stream_options") or {}
    if not isinstance(options, dict) or (options and not stream):
        raise bad("stream_options", f"stream_options is {shown(options)}: give an object, together with stream")
    prompt, history, pictures = _conversation(fields, limits)
    fields.only(
        frequency_penalty=(0, 0.0), presence_penalty=(0, 0.0), logprobs=(False,), stop=(), tools=([],),
        logit_bias=({},), response_format=({"type": "text"},), tool_choice=("none", "auto"), audio=(),
        top_logprobs=(0,), functions=([],), prediction=(),
    )  # fmt: skip
    fields.ignore(
        "user", "safety_identifier", "metadata", "store", "service_tier", "parallel_tool_calls", "prompt_cache_key",
        "prompt_cache_retention", "reasoning_effort", "verbosity",
    )  # fmt: skip
    common = {"prompt": prompt, "pictures": tuple(pictures), "max_new_tokens": tokens, "client": client, **settings}
    usage = options.get("include_usage") is True
    if not drawing:
        fields.close()
        job = AnswerJob(history=tuple(history), **common)
        return ChatRequest(tuple(dataclasses.replace(job, seed=seed) for seed in seeds), model, stream, usage)
    if history:
        raise bad("messages", "answers with pictures have no earlier turns here: send one message of the user")
    document = DocumentJob(
        guidance=fields.number("guidance_scale", defaults.GUIDANCE),
        text_temperature=fields.number("text_temperature", settings["temperature"]),
        ratio=read_ratio(fields) if fields.raw("ratio") is not None else None,
        **common,
    )
    fields.close()
    return ChatRequest(tuple(dataclasses.replace(document, seed=seed) for seed in seeds), model, stream, usage)


def _wants_pictures(fields: Fields) -> bool:
    """Whether `modalities` asks for pictures in the answer."""
    name = "modalities"
    given = fields.raw(name)
    if given is None or given == ["text"]:
        return False
    if given in (["text", "image"], ["image", "text"]):
        return True
    raise bad(name, f'{name} is {shown(given)}: give ["text"], or ["text", "image"] for an answer with pictures',
              "unsupported_value")  # fmt: skip


def _conversation(fields: Fields, limits: Limits) -> tuple[str, list[tuple[str, str]], list[Image.Image]]:
    """The last question, the turns before it, and the pictures, which belong to the first turn."""
    messages = fields.raw("messages")
    if not isinstance(messages, list) or not messages:
        raise bad("messages", f"messages is {shown(messages)}: it must be a list of one message or more")
    if len(messages) > limits.messages:
        raise bad("messages", f"there are {len(messages)} messages; the limit is {limits.messages}: send fewer")
    pictures: list[Image.Image] = []
    spoken: list[tuple[bool, str]] = []  # (whether by the model, text)
    before: list[str] = []
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "developer", "user", "assistant"):
            raise bad(name, f"{name} has the role {shown(role)}: it must be system, user or assistant")
        first = not any(by_model for by_model, _ in spoken)
        text = _content(message, name, fields, limits, pictures if role == "user" and first else None)
        if role in ("system", "developer"):
            if spoken:
                raise bad(name, f"{name}: system messages must come first: move it to the front")
            before.append(text)
        elif spoken and spoken[-1][0] == (role == "assistant"):
            spoken[-1] = (spoken[-1][0], f"{spoken[-1][1]}\n{text}")
        else:
            spoken.append((role == "assistant", text))
    if not spoken or spoken[0][0] or spoken[-1][0]:
        raise bad("messages", "messages must begin, after system messages, and end with a message of the user")
    texts = [text for _, text in spoken]
    if not texts[-1].strip() and not (len(texts) == 1 and pictures):
        raise bad("messages", "the last message is empty: ask a question")
    texts[0] = "\n".join([*before, texts[0]])  # the model's template has no place of its own for it
    return texts[-1], list(zip(texts[:-1:2], texts[1:-1:2], strict=True)), pictures


def _content(
    message: dict[str, Any], name: str, fields: Fields, limits: Limits, pictures: list[Image.Image] | None
) -> str:
    """The text of a message. Appends its pictures to `pictures`; None refuses pictures."""
    content = message.get("content")
    if isinstance(content, str):
        return fields.check_text(f"{name}.content", content)
    if not isinstance(content, list) or not content:
        raise bad(f"{name}.content", f"{name}.content is {shown(content)}: it must be a text or a list of parts")
    texts = []
    for index, part in enumerate(content):
        where = f"{name}.content[{index}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(fields.check_text(f"{where}.text", part.get("text")))
        elif kind == "image_url":
            if pictures is None:
                raise bad(where, f"{where}: pictures must be in the first message of the user")
            if len(pictures) >= limits.pictures:
                raise bad(where, f"there are more than {limits.pictures} pictures: send fewer", "too_large")
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, dict) else url
            left = limits.picture_pixels - sum(picture.width * picture.height for picture in pictures)
            rest = dataclasses.replace(limits, picture_pixels=left)
            pictures.append(read_picture(url, f"{where}.image_url", rest))
        else:
            raise bad(where, f"{where} has the type {shown(kind)}: it must be text or image_url")
    return "\n".join(texts)


def _reason(result: Finished) -> str:
    return "stop" if result.ended else "length"


def _usage(results: list[Finished]) -> dict[str, int]:
    given, made = sum(r.prompt_tokens for r in results), sum(r.tokens for r in results)
    return {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}


def _head(request: ChatRequest, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": request.model,
    }


def _images(pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """The field `images` of a message, as OpenRouter's API has it: OpenAI's has none. Without pictures, nothing."""
    encoded = [encode_picture(picture, "png", about=about_picture(picture)) for picture in pictures]
    urls = [f"data:image/png;base64,{data}" for data in encoded]
    return {"images": [{"type": "image_url", "image_url": {"url": url}} for url in urls]} if urls else {}


async def answer_chat(jobs: Jobs, request: ChatRequest) -> dict[str, Any]:
    """All answers at once."""
    async with following(jobs, request.take(), chat=True) as followed:
        results = await followed.results()
    images = [await asyncio.to_thread(_images, result.pictures) for result in results]
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": result.text, "refusal": None, **images[index]},
            "logprobs": None,
            "finish_reason": _reason(result),
        }
        for index, result in enumerate(results)
    ]
    return {**_head(request, "chat.completion"), "choices": choices, "usage": _usage(results)}


async def stream_chat(jobs: Jobs, request: ChatRequest) -> AsyncGenerator[bytes, None]:
    """Chunks with new text, and `[DONE]`."""
    head, results = _head(request, "chat.completion.chunk"), []

    def chunk(index: int, delta: dict[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        return event({**head, "choices": [choice], **({"usage": None} if request.include_usage else {})})

    async with following(jobs, request.take(), chat=True) as followed:
        for index in range(len(request.jobs)):
            yield chunk(index, {"role": "assistant", "content": ""})
        async for index, found in followed.events():
            check(found)
            if isinstance(found, AnswerText):
                yield chunk(index, {"content": found.text})
            elif isinstance(found, DocumentPicture) and found.whole:
                yield chunk(index, await asyncio.to_thread(_images, [found.picture]))
            elif isinstance(found, Finished):
                results.append(found)
                yield chunk(index, {}, _reason(found))
    if request.include_usage:
        yield event({**head, "choices": [], "usage": _usage(results)})
    yield b"data: [DONE]\n\n"


async def read_in_thread(
    slots: asyncio.Semaphore, fields: Fields, limits: Limits, model: str, client: str
) -> ChatRequest:
    """`read_request` beside the event loop, because decoding a picture takes time. `slots` bounds the memory."""
    async with slots:
        return await asyncio.to_thread(read_request, fields, limits, model, client)

"""The HTTP application: endpoints in the shape of OpenAI's API, over `Jobs`."""

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from emu3_jax.generation.pipeline import Emu3
from emu3_jax.printable import shown
from emu3_jax.serving import chat_api, edits_api, page, pictures_api, videos_api
from emu3_jax.serving.fields import Fields, parse_object
from emu3_jax.serving.following import until_left
from emu3_jax.serving.forms import is_form, read_form
from emu3_jax.serving.guard import FAULT, Guard
from emu3_jax.serving.jobs import Jobs
from emu3_jax.serving.limits import Limits
from emu3_jax.serving.pixels import encode_picture, read_picture
from emu3_jax.serving.refusals import Refused, bad, refusing, shutting_down
from emu3_jax.serving.streams import EventStream

_MOST_WAITING = 8  # reconstructions in line, with their pictures in memory


def make_app(
    jobs: Jobs,
    model: Emu3,
    limits: Limits | None = None,
    *,
    key: str | None = None,
    hosts: Collection[str] | None = None,
    clips: bool = True,
) -> Guard:
    """The application, for an ASGI server.

    Args:
        jobs: does the work.
        model: the model, for its name and its vision tokenizer.
        limits: limits of requests.
        key: what clients must send to use `/v1` and `/metrics`; None asks for nothing.
        hosts: legal names in the header `Host`, in lower case; None allows all.
        clips: whether clips are made. They stay in this process, so servers behind one address cannot offer them.
    """
    limits = limits or Limits()
    api = _Api(jobs, model, limits, clips)
    routes = [
        Route("/health", api.health),
        Route("/metrics", api.metrics),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.one_model),
        Route("/v1/images/generations", api.pictures, methods=["POST"]),
        Route("/v1/images/edits", api.edits, methods=["POST"]),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/reconstructions", api.reconstruct, methods=["POST"]),
        Route("/v1/videos", api.make_video, methods=["POST"]),
        Route("/v1/videos", api.videos.list),
        Route("/v1/videos/{id}", api.videos.one),
        Route("/v1/videos/{id}", api.videos.delete, methods=["DELETE"]),
        Route("/v1/videos/{id}/content", api.videos.content),
        *page.routes(),
    ]
    handlers: Mapping[Any, Any] = {HTTPException: _no_route, Refused: _refused, Exception: _failed}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False  # it would redirect to a URL made of the client's own Host header
    return Guard(app, limits, key=key, hosts=hosts, answered=api.answered)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path, method = shown(request.url.path), shown(request.method)
    if error.status_code == 400:  # a form that cannot be parsed
        refused = Refused(400, f"the body cannot be read: {shown(error.detail)}", code="invalid_body")
    elif error.status_code == 405:
        refused = Refused(405, f"{path} does not take {method}", code="method_not_allowed", headers=error.headers)
    else:
        refused = Refused(404, f"there is nothing at {path}: see the documentation of emu3-jax serve", code="not_found")
    return JSONResponse(refused.body(), refused.status, refused.headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return JSONResponse(error.body(), error.status, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    """A fault of the server. Starlette raises it again after the answer, and `Guard` writes it into the log."""
    return JSONResponse(FAULT.body(), FAULT.status)


def _client(request: Request) -> str:
    return request.client.host if request.client else ""


class _Api:
    """The endpoints."""

    def __init__(self, jobs: Jobs, model: Emu3, limits: Limits, clips: bool):
        self._jobs, self._model, self._limits, self._clips = jobs, model, limits, clips
        self._slots = asyncio.Semaphore(limits.decoders)
        self._vision = asyncio.Semaphore(1)
        self._waiting = 0
        self.videos = videos_api.Videos(jobs)
        self._started = int(time.time())
        self.answered: Counter[int] = Counter()

    async def _fields(self, request: Request) -> Fields:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(
                415, f"Content-Type is {shown(kind)}: send JSON with Content-Type: application/json",
                code="unsupported_media_type",
            )  # fmt: skip
        body = await request.body()
        return Fields(await asyncio.to_thread(parse_object, body, self._limits), self._limits)

    async def _form_or_fields(self, request: Request, files: int) -> Fields:
        """As `_fields`, but the body may be a form, too."""
        if is_form(request):
            return Fields(await read_form(request, files), self._limits)
        return await self._fields(request)

    async def health(self, request: Request) -> Response:
        if self._jobs.figures().get("closing"):
            raise shutting_down()
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(
            metrics_text(self._jobs.figures(), self.answered), media_type="text/plain; version=0.0.4"
        )

    def _about(self) -> dict[str, Any]:
        return {"id": self._model.name, "object": "model", "created": self._started, "owned_by": "emu3-jax"}

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._about()]})

    async def one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._model.name:
            raise Refused(404, f"model {shown(name)} is not here: this server has {self._model.name}",
                          param="model", code="model_not_found")  # fmt: skip
        return JSONResponse(self._about())

    async def pictures(self, request: Request) -> Any:
        fields = await self._fields(request)
        asked = pictures_api.read_request(fields, self._limits, self._model.name, _client(request))
        if asked.stream:
            return EventStream(pictures_api.stream_pictures(self._jobs, asked))
        return await _unless_left(request, pictures_api.answer_pictures(self._jobs, asked))

    async def make_video(self, request: Request) -> Response:
        if not self._clips:
            raise bad(None, "several replicas make no clips: ask a server of one replica", "unsupported")
        fields = await self._form_or_fields(request, files=1)
        async with self._slots:
            job = await asyncio.to_thread(
                videos_api.read_request, fields, self._limits, self._model.name, _client(request)
            )
        return JSONResponse(await self.videos.create(job, self._model.name))

    async def edits(self, request: Request) -> Any:
        fields = await self._form_or_fields(request, files=self._limits.pictures)
        async with self._slots:
            asked = await asyncio.to_thread(
                edits_api.read_request, fields, self._limits, self._model.name, _client(request)
            )
        if asked.stream:
            return EventStream(pictures_api.stream_pictures(self._jobs, asked))
        return await _unless_left(request, pictures_api.answer_pictures(self._jobs, asked))

    async def chat(self, request: Request) -> Any:
        fields = await self._fields(request)
        asked = await chat_api.read_in_thread(self._slots, fields, self._limits, self._model.name, _client(request))
        if asked.stream:
            return EventStream(chat_api.stream_chat(self._jobs, asked))
        return await _unless_left(request, chat_api.answer_chat(self._jobs, asked))

    async def reconstruct(self, request: Request) -> Response:
        """A picture as codes, and the codes as a picture: what the model sees of it."""
        fields = await self._fields(request)
        url = fields.raw("image")
        fields.close()
        if self._waiting >= _MOST_WAITING:
            raise Refused(429, "too many pictures wait: try again in 5 seconds", code="queue_full",
                          headers={"Retry-After": "5"})  # fmt: skip
        self._waiting += 1
        try:
            async with self._vision:
                return JSONResponse(await asyncio.to_thread(self._reconstructed, url))
        finally:
            self._waiting -= 1

    def _reconstructed(self, url: Any) -> dict[str, Any]:
        picture = read_picture(url, "image", self._limits)
        with refusing("image"):
            (codes,) = self._model.tokenize([picture])
            (again,) = self._model.detokenize([codes])
        assert isinstance(again, Image.Image)  # of codes [h, w]
        return {
            "object": "reconstruction",
            "codes": codes.tolist(),
            "output_format": "png",
            "size": f"{again.width}x{again.height}",
            "b64_json": encode_picture(again, "png"),
        }


async def _unless_left(request: Request, work: Any) -> Response:
    """The answer of `work`, which is cancelled if the client leaves."""
    found = await until_left(request.receive, work)
    return Response(status_code=499) if found is None else JSONResponse(found)


def metrics_text(figures: Mapping[str, Any], answered: Mapping[int, int]) -> str:
    """Figures in the text format of Prometheus. It is a few lines, so no library is needed.

    Names that end in `_total` are counters, others gauges. A mapping has a number for each kind of job, with
    the label `kind`. What is no number is left out.
    """
    lines = []
    for name, value in sorted(figures.items()):
        if not re.fullmatch(r"[a-z_][a-z0-9_]*", name) or isinstance(value, bool):
            continue
        if not isinstance(value, int | float | Mapping):
            continue
        lines += [f"# TYPE emu3_jax_{name} {'counter' if name.endswith('_total') else 'gauge'}"]
        labelled = {"": value}
        if isinstance(value, Mapping):
            labelled = {f'{{kind="{kind}"}}': number for kind, number in sorted(value.items())}
        lines += [f"emu3_jax_{name}{label} {json.dumps(number)}" for label, number in labelled.items()]
    lines += [
        "# HELP emu3_jax_http_answers_total Answers, by HTTP status.",
        "# TYPE emu3_jax_http_answers_total counter",
    ]
    lines += [f'emu3_jax_http_answers_total{{status="{status}"}} {count}' for status, count in sorted(answered.items())]
    return "\n".join(lines) + "\n"

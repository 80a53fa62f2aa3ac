"""`POST /v1/images/generations`, and the answers of edits."""

import asyncio
import dataclasses
import math
import re
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

from PIL import Image

from emu3_jax.generation import defaults
from emu3_jax.media.sizes import MAX_ELONGATION
from emu3_jax.printable import shown
from emu3_jax.serving.fields import Fields, check_model
from emu3_jax.serving.following import check, following
from emu3_jax.serving.jobs import DocumentJob, Finished, Jobs, PictureJob, PictureRows
from emu3_jax.serving.limits import Limits
from emu3_jax.serving.pixels import FORMATS, encode_picture, partial_picture
from emu3_jax.serving.refusals import Refused, bad
from emu3_jax.serving.streams import event


@dataclasses.dataclass
class PictureRequest:
    """A request for pictures: one job per picture, and how to encode them. Jobs of edits are documents."""

    jobs: tuple[PictureJob, ...] | tuple[DocumentJob, ...]
    form: str
    compression: int
    stream: bool
    partial_images: int

    def take(self) -> tuple[PictureJob, ...] | tuple[DocumentJob, ...]:
        """The jobs. The request forgets the pictures of edits, whose pixels would fill the memory meanwhile."""
        jobs = self.jobs
        if isinstance(jobs[0], DocumentJob):
            self.jobs = tuple(dataclasses.replace(job, pictures=()) for job in jobs if isinstance(job, DocumentJob))
        return jobs


def read_ratio(fields: Fields) -> str:
    """The ratio of `size` (WxH in pixels) or of the extension `ratio`; 1:1 by default.

    Only the ratio of `size` counts: a model draws well only at the area that it was trained for. A size that is more
    elongated than is legal becomes the nearest legal ratio. The answer has the ratio and the size that were drawn.
    """
    ratio, size = fields.raw("ratio"), fields.raw("size")
    if ratio is not None:
        if not isinstance(ratio, str):
            raise bad("ratio", f"ratio is {shown(ratio)}: give a text such as 16:9")
        return ratio
    if size in (None, "auto"):
        return "1:1"
    match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", size) if isinstance(size, str) else None
    if match is None:
        raise bad("size", f"size is {shown(size)}: it must be auto, or WIDTHxHEIGHT such as 1024x1024")
    width, height = int(match[1]), int(match[2])
    width, height = min(width, MAX_ELONGATION * height), min(height, MAX_ELONGATION * width)
    common = math.gcd(width, height)
    return f"{width // common}:{height // common}"


def read_sampling(fields: Fields, n: int, temperature: float) -> tuple[dict[str, Any], list[int]]:
    """The settings of sampling, and the seeds of `n` rows. Without `seed`, a random one."""
    settings = {
        "temperature": fields.number("temperature", temperature),
        "top_k": fields.whole("top_k", defaults.TOP_K, 1, 2**31 - 1),
        "top_p": fields.number("top_p", defaults.TOP_P),
    }
    seed = fields.whole("seed", secrets.randbelow(2**32 - n), 0, 2**32 - n)
    return settings, [seed + index for index in range(n)]


def read_request(fields: Fields, limits: Limits, model: str, client: str) -> PictureRequest:
    """Reads the fields.

    Raises:
        Refused: a field is wrong or unknown.
    """
    check_model(fields, model)
    n = fields.whole("n", 1, 1, limits.n)
    settings, seeds = read_sampling(fields, n, defaults.TEMPERATURE)
    area = fields.raw("area")
    job = PictureJob(
        prompt=fields.filled("prompt"),
        negative=fields.text("negative_prompt", ""),
        guidance=fields.number("guidance_scale", defaults.GUIDANCE),
        ratio=read_ratio(fields),
        area=None if area is None else fields.whole("area", 0, 1, 1 << 22),
        client=client,
        **settings,
    )
    output = read_output(fields, limits)
    fields.close()
    partial = output["stream"] and output["partial_images"] > 0
    return PictureRequest(jobs=tuple(dataclasses.replace(job, seed=seed, partial=partial) for seed in seeds), **output)


def read_output(fields: Fields, limits: Limits) -> dict[str, Any]:
    """The fields of a `PictureRequest` apart from its jobs: how pictures are encoded and sent."""
    form, compression = fields.choice("output_format", FORMATS, "png"), fields.whole("output_compression", 100, 0, 100)
    if form == "png" and compression != 100:
        raise bad("output_compression", f"output_compression is {compression}, but PNG is lossless: give "
                  "output_format jpeg or webp, or leave it out", "unsupported_value")  # fmt: skip
    fields.only(
        quality=("auto",), response_format=("b64_json",), background=("auto", "opaque"), moderation=("auto", "low"),
    )  # fmt: skip
    fields.ignore("user", "safety_identifier")
    return {
        "form": form,
        "compression": compression,
        "stream": fields.flag("stream"),
        "partial_images": fields.whole("partial_images", 0, 0, limits.partial_images),
    }


def about_picture(picture: Image.Image) -> dict[str, str]:
    """How a picture was made, for its text fields."""
    return {str(key): str(value) for key, value in picture.info.items()}


def _about(result: Finished) -> dict[str, str]:
    if result.picture is None:  # a document of texts alone
        raise Refused(422, "the model wrote no picture: try again with another seed or prompt", code="no_picture")
    return about_picture(result.picture)


def _encoded(request: PictureRequest, result: Finished) -> dict[str, Any]:
    about = _about(result)
    assert result.picture is not None  # `_about` would have refused
    data = encode_picture(result.picture, request.form, request.compression, about)
    return {"b64_json": data, "metadata": about}


def _usage(results: list[Finished]) -> dict[str, Any]:
    given, made = sum(r.prompt_tokens for r in results), sum(r.tokens for r in results)
    visual = sum(r.picture_tokens for r in results)
    return {
        "input_tokens": given,
        "input_tokens_details": {"text_tokens": given - visual, "image_tokens": visual},
        "output_tokens": made,
        "total_tokens": given + made,
    }


def _size(result: Finished) -> str:
    assert result.picture is not None
    return f"{result.picture.width}x{result.picture.height}"


async def answer_pictures(jobs: Jobs, request: PictureRequest) -> dict[str, Any]:
    """All pictures in one answer."""
    async with following(jobs, request.take()) as followed:
        results = await followed.results()
    data = [await asyncio.to_thread(_encoded, request, result) for result in results]
    return {
        "created": int(time.time()),
        "data": data,
        "output_format": request.form,
        "background": "opaque",
        "size": _size(results[0]),
        "ratio": request.jobs[0].ratio or "auto",
        "usage": _usage(results),
    }


async def stream_pictures(jobs: Jobs, request: PictureRequest) -> AsyncGenerator[bytes, None]:
    """Events with partial pictures, and one event per whole picture. `index` tells the pictures of a request apart."""
    sent = [0] * len(request.jobs)
    kind = "image_edit" if isinstance(request.jobs[0], DocumentJob) else "image_generation"
    base = {"created_at": int(time.time()), "background": "opaque", "output_format": request.form, "quality": "auto"}
    async with following(jobs, request.take()) as followed:
        async for index, found in followed.events():
            check(found)
            if isinstance(found, PictureRows):
                # With k partial pictures, the first one has 1 of k + 1 parts of the rows, and so on.
                due = len(found.pixels) * (request.partial_images + 1) // found.size[1]
                if not sent[index] < min(due, request.partial_images):
                    continue
                image = partial_picture(found.pixels, found.size)
                data = await asyncio.to_thread(encode_picture, image, request.form, request.compression)
                about = {"partial_image_index": sent[index], "index": index, "rows": len(found.pixels)}
                size = {"size": f"{found.size[0]}x{found.size[1]}"}
                name = f"{kind}.partial_image"
                yield event({"type": name, "b64_json": data, **base, **about, **size}, name)
                sent[index] += 1
            elif isinstance(found, Finished):
                encoded = await asyncio.to_thread(_encoded, request, found)
                whole = {"index": index, "ratio": request.jobs[index].ratio or "auto", "usage": _usage([found])}
                name = f"{kind}.completed"
                yield event({"type": name, **encoded, **base, **whole, "size": _size(found)}, name)

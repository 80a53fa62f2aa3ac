"""Fields of forms (multipart/form-data), such as OpenAI's client sends with files."""

import contextlib
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from emu3_jax.serving.refusals import bad

_NUMBERS = (
    "seconds", "frames", "fps", "n", "seed", "top_k", "top_p", "temperature", "text_temperature", "guidance_scale",
    "area", "output_compression", "partial_images",
)  # fmt: skip
_FLAGS = {"true": True, "false": False}


def is_form(request: Request) -> bool:
    """Whether the body is a form."""
    return request.headers.get("content-type", "").lower().startswith("multipart/form-data")


async def read_form(request: Request, files: int = 1) -> dict[str, Any]:
    """The fields of a form of at most `files` files. Texts that are numbers or truth values become these.

    A file becomes its bytes. Fields whose names end in [] become lists without these letters.

    Raises:
        Refused: the form has no end.
        HTTPException: it cannot be parsed.
    """
    await _check_end(request)
    found: dict[str, Any] = {}
    async with request.form(max_files=files, max_fields=32, max_part_size=256 << 10) as form:
        for name, value in form.multi_items():
            content = value if isinstance(value, str) else await value.read()
            if name.endswith("[]"):
                there = found.setdefault(name.removesuffix("[]"), [])
                found[name.removesuffix("[]")] = [*(there if isinstance(there, list) else [there]), content]
            else:
                found[name] = content
    for name in _NUMBERS:
        text = found.get(name)
        if not isinstance(text, str):  # absent, or a file
            continue
        with contextlib.suppress(ValueError, OverflowError):
            found[name] = int(text) if len(text) < 20 and text.isdecimal() else float(text[:40])
    if isinstance(found.get("stream"), str):
        found["stream"] = _FLAGS.get(found["stream"].lower(), found["stream"])
    return found


async def _check_end(request: Request) -> None:
    """Refuses a form that is cut off. Starlette's parser would lose the file of its last part, and not close it."""
    _, options = parse_options_header(request.headers["content-type"])
    end = b"\r\n--" + options.get(b"boundary", b"") + b"--"
    if not (await request.body()).rstrip(b"\r\n").endswith(end):
        raise bad(None, "the form has no end: send the whole form, with the boundary after it", "invalid_body")

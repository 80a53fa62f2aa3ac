"""What a request is refused with: a status, one line, and the fields of OpenAI's error objects."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from emu3_jax.errors import Emu3Error
from emu3_jax.printable import one_line
from emu3_jax.serving.jobs import Busy, Closing, TooLarge, Unsupported
from emu3_jax.text.tokenizer import SpecialTokenError

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refused(Exception):
    """An answer that is an error.

    Attributes:
        status: the HTTP status.
        message: one line for the client. It names the field, what was found, and what to do.
        param: the field of the request that is wrong, or None.
        code: a word for programs, or None.
        headers: more headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        self.status, self.message = status, one_line(message)
        self.param, self.code, self.headers = param, code, dict(headers or {})
        super().__init__(self.message)

    def body(self) -> dict[str, Any]:
        """The answer, as OpenAI's clients read it."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad(param: str | None, message: str, code: str = "invalid_value") -> Refused:
    """A wrong value: status 400."""
    return Refused(400, message, param=param, code=code)


def shutting_down() -> Refused:
    """What a server answers that takes no more jobs: status 503."""
    closing = Closing()
    return Refused(503, str(closing), code="shutting_down", headers={"Retry-After": str(closing.retry_after)})


_FIELDS = {  # a job's field, with which a message begins, and the request's name for it
    "guidance": "guidance_scale",
    "negative": "negative_prompt",
    "max_new_tokens": "max_completion_tokens",
    **{name: name for name in ("prompt", "temperature", "top_k", "top_p", "seed", "ratio", "area", "frames", "fps")},
}


def _refusal(error: Emu3Error, param: str | None, otherwise: str | None, code: str) -> Refused:
    """See `refusing`."""
    word, _, rest = str(error).partition(" ")
    if param is None and word in _FIELDS:
        return bad(_FIELDS[word], f"{_FIELDS[word]} {rest}", code)
    return bad(param or otherwise, str(error), code)


@contextlib.contextmanager
def refusing(
    param: str | None = None,
    *,
    text: Callable[[str], str | None] = lambda token: None,
    otherwise: str | None = None,
) -> Iterator[None]:
    """Turns what `Jobs.submit` and the readers of pictures raise into a refusal.

    Args:
        param: the field of the request that is read. Without it, the error's own words say which field is wrong.
        text: returns the field whose text contains a control token.
        otherwise: the field to name if the words do not say which is wrong.
    """
    try:
        yield
    except Closing as closing:
        raise shutting_down() from closing
    except Busy as busy:
        wait = str(busy.retry_after)
        raise Refused(429, str(busy), code="queue_full", headers={"Retry-After": wait}) from busy
    except Unsupported as error:
        raise bad(None, str(error), "unsupported_model") from error
    except TooLarge as error:
        raise _refusal(error, param, otherwise, "too_large") from error
    except SpecialTokenError as error:  # its own words name arguments of Python and of the command line
        name = text(error.token) or param
        message = f"{name or 'the text'} contains the control token {error.token}: remove it"
        raise bad(name, message, "control_token") from error
    except Emu3Error as error:
        raise _refusal(error, param, otherwise, "invalid_value") from error

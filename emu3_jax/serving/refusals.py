"""What a request is refused with: a status, one line, and the fields of OpenAI's error objects."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from emu3_jax.errors import Emu3Error
from emu3_jax.printable import one_line
from emu3_jax.serving.jobs import Busy, TooLarge

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


@contextlib.contextmanager
def refusing(param: str | None = None) -> Iterator[None]:
    """Turns what `Jobs.submit` and the readers of pictures raise into a refusal."""
    try:
        yield
    except Busy as busy:
        wait = str(busy.retry_after)
        raise Refused(429, str(busy), code="queue_full", headers={"Retry-After": wait}) from busy
    except TooLarge as error:
        raise bad(param, str(error), "too_large") from error
    except Emu3Error as error:
        raise bad(param, str(error)) from error

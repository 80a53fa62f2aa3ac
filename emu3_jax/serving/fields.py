"""Reads the fields of a request's JSON body. A wrong field is refused by its name."""

import difflib
import json
import math
import typing
from collections.abc import Collection, Mapping
from typing import Any

from emu3_jax.printable import printable, shown
from emu3_jax.serving.limits import Limits
from emu3_jax.serving.refusals import Refused, bad


def parse_object(body: bytes, limits: Limits) -> dict[str, Any]:
    """Parses a body that must be a JSON object.

    Raises:
        Refused: it is not one, is nested too deeply, has too many values, or has NaN or infinity.
    """
    if sum(body.count(mark) for mark in b",[{:") > limits.json_values:
        raise bad(None, f"the body has more than {limits.json_values:,} JSON values: send less", "too_large")
    try:
        found = json.loads(body.decode(), parse_constant=_no_constant)
    except RecursionError as error:
        raise bad(None, "the body is nested too deeply: send a flat JSON object", "invalid_json") from error
    except ValueError as error:  # includes UnicodeDecodeError, and whole numbers of more than 4,300 digits
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise bad(None, f"the body is not JSON ({reason}): send a JSON object in UTF-8", "invalid_json") from error
    if not isinstance(found, dict):
        raise bad(None, f"the body is {shown(found)}: send a JSON object", "invalid_json")
    return found


def _no_constant(name: str) -> typing.NoReturn:
    raise ValueError(f"{name} is no JSON value")


class Fields:
    """The fields of one request. A field with the value null counts as absent.

    Every field that an endpoint reads is taken by one of the methods. `close` then refuses the others.
    """

    def __init__(self, values: Mapping[str, Any], limits: Limits):
        self._values = {name: value for name, value in values.items() if value is not None}
        self._known: set[str] = set()
        self._limits = limits
        self._text = 0

    def raw(self, name: str) -> Any:
        """The value as it is, or None."""
        self._known.add(name)
        return self._values.get(name)

    def text(self, name: str, default: str | None = None) -> str:
        """A text. Without a default it must be given."""
        value = self.raw(name)
        if value is None:
            if default is None:
                raise bad(name, f"{name} is missing: give a text", "missing_field")
            return default
        return self.check_text(name, value)

    def filled(self, name: str) -> str:
        """A text that must be given and has more than white space."""
        value = self.text(name)
        if not value.strip():
            raise bad(name, f"{name} is empty: say what to make")
        return value

    def check_text(self, name: str, value: Any) -> str:
        """Checks a text for a prompt, and counts it."""
        if not isinstance(value, str):
            raise bad(name, f"{name} is {shown(value)}: it must be a text")
        self._text += len(value)
        if self._text > self._limits.text:
            raise bad(name, f"the texts have more than {self._limits.text:,} characters: shorten {name}", "too_large")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise bad(name, f"{name} has half a character (an unpaired surrogate): correct it") from error
        if any(ord(c) < 32 and c not in "\n\r\t" for c in value):
            raise bad(name, f"{name} has a control character: remove it")
        return value

    def number(self, name: str, default: float) -> float:
        """A finite number."""
        value = self.raw(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
            raise bad(name, f"{name} is {shown(value)}: it must be a finite number")
        return float(value)

    def whole(self, name: str, default: int, least: int, most: int) -> int:
        """A whole number from `least` to `most`."""
        value = self.raw(name)
        if value is None:
            return default
        exact = isinstance(value, int) and not isinstance(value, bool)
        if isinstance(value, float) and math.isfinite(value) and value == int(value):
            value, exact = int(value), True
        if not exact or not least <= value <= most:
            raise bad(name, f"{name} is {shown(value)}: it must be a whole number from {least} to {most}")
        return value

    def flag(self, name: str) -> bool:
        """True or false; false by default."""
        value = self.raw(name)
        if value is not None and not isinstance(value, bool):
            raise bad(name, f"{name} is {shown(value)}: it must be true or false")
        return bool(value)

    def choice(self, name: str, legal: Collection[str], default: str) -> str:
        """One of some words."""
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, str) or value not in legal:
            raise bad(name, f"{name} is {shown(value)}: it must be one of {', '.join(legal)}", "unsupported_value")
        return value

    def ignore(self, *names: str) -> None:
        """Fields that clients send, and that change nothing here."""
        self._known.update(names)

    def only(self, **legal: tuple[Any, ...]) -> None:
        """Fields with a few values that ask for nothing. Any other value is refused by the field's name."""
        for name, values in legal.items():
            value = self.raw(name)
            if value is not None and not any(type(value) is type(one) and value == one for one in values):
                allowed = ", ".join(json.dumps(one) for one in values)
                instead = f"give {allowed}, or leave it out" if values else "leave it out"
                raise bad(
                    name, f"{name} is {shown(value)}, which is not supported here: {instead}", "unsupported_value"
                )

    def close(self) -> None:
        """Refuses the first field that nothing has read: a misspelt field must not be lost."""
        for name in self._values:
            if name not in self._known:
                near = difflib.get_close_matches(name[:100], self._known, n=1)
                hint = f": did you mean {near[0]}?" if near else ": remove it"
                # The name may be any text, also one that UTF-8 cannot encode.
                raise bad(printable(name[:100]), f"unknown field {shown(name)}{hint}", "unknown_parameter")


def check_model(fields: Fields, name: str) -> None:
    """The field `model`: this server's model, or none.

    Raises:
        Refused: it is another one.
    """
    given = fields.raw("model")
    if given is None or given == name:
        return
    raise Refused(
        404, f"model {shown(given)} is not here: this server has {name}", param="model", code="model_not_found"
    )

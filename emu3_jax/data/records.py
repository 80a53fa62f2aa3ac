"""Prepared records: the codes of pictures or a clip with their texts, and their form as bytes in a shard.

Records hold codes because encoding is expensive. They hold plain text instead of token ids, for two reasons. Byte pairs
can merge across the boundary between a text and the template around it, so ids of the text alone would be wrong. And
templates, prompt dropout and loss can still be chosen for each training run.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from emu3_jax.errors import Emu3Error
from emu3_jax.fields import is_whole
from emu3_jax.foreign import limit, reading
from emu3_jax.printable import shown

ROLES = ("user", "assistant")
RECORDS, PAIRS, SAMPLES = "records", "pairs", "samples"
# What a directory of shards may hold, and what writes it.
KINDS = {RECORDS: "emu3-jax prepare", PAIRS: "emu3-jax pairs", SAMPLES: "emu3-jax sample"}
_MAX_BYTES = 1 << 30  # of a record; the codes of a picture take about 20 kB
_AGAIN = "prepare the data again"


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of a conversation; `role` is "user" or "assistant"."""

    role: str
    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A part of a document: a text, or a picture.

    Attributes:
        role: "user" or "assistant", or None in a document without roles.
        text: the text; empty for a picture.
        codes: int32 [h, w] for a picture, None for a text.
    """

    role: str | None
    text: str = ""
    codes: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """A training example before a template is applied.

    Attributes:
        name: name of the record in error messages.
        text: caption or plain text; may be empty if there is a conversation or document.
        codes: int32 [h, w] for a picture, [t, h, w] for a clip, None for plain text and documents.
        conversation: alternating turns of user and assistant; may be empty.
        document: texts and pictures in order; may be empty. See `check_roles`.
    """

    name: str
    text: str
    codes: np.ndarray | None = None
    conversation: tuple[Turn, ...] = ()
    document: tuple[Part, ...] = ()

    def to_bytes(self) -> bytes:
        """Serialises the record: a line of JSON, then all codes as little-endian words of 2 bytes, or 4 if needed."""
        header: dict[str, Any] = {"name": self.name, "text": self.text}
        body = b""

        def stored(codes: np.ndarray) -> dict[str, Any]:
            nonlocal body
            described, words = stored_codes(codes)
            body += words
            return described

        if self.conversation:
            header["conversation"] = [dataclasses.asdict(turn) for turn in self.conversation]
        if self.codes is not None:
            header["codes"] = stored(self.codes)
        if self.document:
            header["document"] = [
                {"role": part.role} | ({"text": part.text} if part.codes is None else {"codes": stored(part.codes)})
                for part in self.document
            ]
        return json.dumps(header, ensure_ascii=False).encode() + b"\n" + body

    @classmethod
    def from_bytes(cls, data: bytes) -> "Record":
        """Reads bytes that `to_bytes` wrote. Raises an `Emu3Error` if they are damaged."""
        with reading("the record", _AGAIN):
            header, stored = read_header("the record", data)
            turns = tuple(
                Turn(check_text("role", turn["role"]), check_text("text", turn["text"]))
                for turn in header.get("conversation", ())
            )
            codes = stored.read(header["codes"], (2, 3)) if "codes" in header else None
            document = tuple(
                Part(part["role"], codes=stored.read(part["codes"], (2,)))
                if "codes" in part
                else Part(part["role"], check_text("text", part["text"]))
                for part in header.get("document", ())
            )
            stored.end()
            check_roles([part.role for part in document])
            return cls(check_text("name", header["name"]), check_text("text", header["text"]), codes, turns, document)


def stored_codes(codes: np.ndarray) -> tuple[dict[str, Any], bytes]:
    """Serialises codes or ids (>= 0) as little-endian words of 2 bytes, or 4 if needed.

    Returns:
        The type and the shape as JSON values, for `StoredCodes.read`; and the bytes.
    """
    words = codes.astype("<u2" if codes.max() < 2**16 else "<u4")
    return {"dtype": words.dtype.str, "shape": list(words.shape)}, words.tobytes()


def read_header(what: str, data: bytes) -> tuple[Any, "StoredCodes"]:
    """Splits the bytes of a record into its header, any JSON value, and its codes. `what` names it in errors."""
    limit(what, "bytes", len(data), _MAX_BYTES)
    line, _, body = data.partition(b"\n")
    return json.loads(line), StoredCodes(body)


class StoredCodes:
    """The codes and numbers after a record's header, see `stored_codes`. They are read from the start to the end."""

    def __init__(self, data: bytes):
        self._data, self._place = data, 0

    def read(self, header: Any, axes: Sequence[int]) -> np.ndarray:
        """Reads the next codes, int32. Their header names their type and shape, which may have so many axes."""
        dtype, shape = header["dtype"], header["shape"]
        sides = isinstance(shape, list) and len(shape) in axes and all(is_whole(side, 1) for side in shape)
        if dtype not in ("<u2", "<u4") or not sides:
            raise Emu3Error(f"the record is damaged (codes of type {shown(dtype)}, shape {shown(shape)}); {_AGAIN}")
        count = math.prod(shape)
        codes = np.frombuffer(self._data, dtype, count, self._place).reshape(shape)
        if codes.max() >= 2**31:
            raise Emu3Error(f"the record is damaged (a code is {codes.max()}); {_AGAIN}")
        self._place += codes.nbytes
        return codes.astype(np.int32)

    def read_floats(self, shape: tuple[int, ...]) -> np.ndarray:
        """Reads the next numbers: little-endian float32 words, as an array of this shape."""
        numbers = np.frombuffer(self._data, "<f4", math.prod(shape), self._place).reshape(shape)
        self._place += numbers.nbytes
        return numbers.astype(np.float32)

    def end(self) -> None:
        """Raises an `Emu3Error` if bytes are left."""
        if self._place != len(self._data):
            raise Emu3Error(f"the record is damaged ({len(self._data) - self._place} bytes too many); {_AGAIN}")


def check_text(field: str, value: Any) -> str:
    """Returns `value` if it is a string of valid Unicode. Raises an `Emu3Error` that names `field` otherwise."""
    if not isinstance(value, str):
        raise Emu3Error(f"{field} is {shown(value)}: it must be text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Emu3Error(f"{field} has an unpaired surrogate at character {error.start}: write valid Unicode") from error
    return value


def check_roles(roles: Sequence[Any]) -> None:
    """Raises an `Emu3Error` unless a document's parts may have these roles.

    Either no part has a role; or the user begins, both take turns of one part or more, and the assistant ends.
    """
    legal = '"user" and "assistant" in turns, beginning with the user and ending with the assistant; or none'
    if all(role is None for role in roles):
        return
    for number, role in enumerate(roles):
        if role not in ROLES:
            raise Emu3Error(f"document part {number} has role {shown(role)}: the roles must be {legal}")
    if roles[0] != "user" or roles[-1] != "assistant":
        raise Emu3Error(f"the document goes from {roles[0]} to {roles[-1]}: the roles must be {legal}")


def check_conversation(value: Any) -> tuple[Turn, ...]:
    """Checks a conversation from JSON, and converts it to turns.

    Args:
        value: a list of {"role": ..., "text": ...}. User and assistant alternate; the user begins, the assistant ends.

    Raises:
        Emu3Error: `value` has another form.
    """
    legal = 'a list of {"role": "user" or "assistant", "text": ...}'
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise Emu3Error(f"conversation is {shown(value)}: it must be {legal}")
    turns = []
    for number, turn in enumerate(value):
        if not isinstance(turn, dict) or set(turn) != {"role", "text"}:
            raise Emu3Error(f"conversation turn {number} is {shown(turn)}: the conversation must be {legal}")
        expected = ROLES[number % 2]
        if turn["role"] != expected:
            raise Emu3Error(
                f"conversation turn {number} has role {shown(turn['role'])}: it must be {expected!r}, because "
                "user and assistant take turns and the user begins"
            )
        turns.append(Turn(expected, check_text(f"conversation turn {number}", turn["text"])))
    if len(turns) % 2 or not turns:
        raise Emu3Error(f"the conversation has {len(turns)} turns: it must end with an answer from the assistant")
    return tuple(turns)

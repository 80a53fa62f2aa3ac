"""Prepared records: the codes of a picture or clip with its texts, and their form as bytes in a shard.

Records hold codes because encoding is expensive. They hold plain text instead of token ids, for two reasons. Byte pairs
can merge across the boundary between a text and the template around it, so ids of the text alone would be wrong. And
templates, prompt dropout and loss can still be chosen for each training run.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from emu3_jax.errors import Emu3Error
from emu3_jax.fields import is_whole
from emu3_jax.foreign import limit, reading
from emu3_jax.printable import shown

ROLES = ("user", "assistant")
_MAX_BYTES = 1 << 30  # of a record; the codes of a picture take about 20 kB
_AGAIN = "prepare the data again"


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of a conversation; `role` is "user" or "assistant"."""

    role: str
    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """A training example before a template is applied.

    Attributes:
        name: name of the record in error messages.
        text: caption or document; may be empty if there is a conversation.
        codes: int32 [h, w] for a picture, [t, h, w] for a clip, None for plain text.
        conversation: alternating turns of user and assistant; may be empty.
    """

    name: str
    text: str
    codes: np.ndarray | None = None
    conversation: tuple[Turn, ...] = ()

    def to_bytes(self) -> bytes:
        """Serialises the record: a line of JSON, then the codes as little-endian words of 2 bytes, or 4 if needed."""
        header: dict[str, Any] = {"name": self.name, "text": self.text}
        if self.conversation:
            header["conversation"] = [dataclasses.asdict(turn) for turn in self.conversation]
        body = b""
        if self.codes is not None:
            words = self.codes.astype("<u2" if self.codes.max() < 2**16 else "<u4")
            header["codes"] = {"dtype": words.dtype.str, "shape": list(words.shape)}
            body = words.tobytes()
        return json.dumps(header, ensure_ascii=False).encode() + b"\n" + body

    @classmethod
    def from_bytes(cls, data: bytes) -> "Record":
        """Reads bytes that `to_bytes` wrote. Raises an `Emu3Error` if they are damaged."""
        with reading("the record", _AGAIN):
            limit("the record", "bytes", len(data), _MAX_BYTES)
            line, _, body = data.partition(b"\n")
            header = json.loads(line)
            codes = header.get("codes")
            if codes is not None:
                codes = _codes(body, codes["dtype"], codes["shape"])
            turns = tuple(
                Turn(check_text("role", turn["role"]), check_text("text", turn["text"]))
                for turn in header.get("conversation", ())
            )
            return cls(check_text("name", header["name"]), check_text("text", header["text"]), codes, turns)


def _codes(body: bytes, dtype: Any, shape: Any) -> np.ndarray:
    """Decodes the bytes after a record's header to int32 [h, w] or [t, h, w]."""
    sides = isinstance(shape, list) and len(shape) in (2, 3) and all(is_whole(side, 1) for side in shape)
    if dtype not in ("<u2", "<u4") or not sides:
        raise Emu3Error(f"the record is damaged (codes of type {shown(dtype)}, shape {shown(shape)}); {_AGAIN}")
    codes = np.frombuffer(body, dtype).reshape(shape)
    if codes.max() >= 2**31:
        raise Emu3Error(f"the record is damaged (a code is {codes.max()}); {_AGAIN}")
    return codes.astype(np.int32)


def check_text(field: str, value: Any) -> str:
    """Returns `value` if it is a string of valid Unicode. Raises an `Emu3Error` that names `field` otherwise."""
    if not isinstance(value, str):
        raise Emu3Error(f"{field} is {shown(value)}: it must be text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Emu3Error(f"{field} has an unpaired surrogate at character {error.start}: write valid Unicode") from error
    return value


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

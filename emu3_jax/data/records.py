"""One prepared record: the codes of a picture or clip and its texts, and how it lies in a shard as bytes.

Records hold codes and plain text, never token ids of text. Byte pairs merge across the seam of a text and the template
around it, so ids of the text alone would be wrong inside a template, and templates, dropout and loss stay choices of
training. Codes are kept because making them is the costly part.
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
_MAX_BYTES = 1 << 30  # of a record; the codes of a picture are some 20 kB
_AGAIN = "prepare the data again"


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of a conversation; `role` is "user" or "assistant"."""

    role: str
    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """A training example before any template.

    Attributes:
        name: what errors call it.
        text: caption or document; may be empty where there is a conversation.
        codes: int32 [h, w] of a picture, [t, h, w] of a clip, None of plain text.
        conversation: turns of user and assistant by turns, or none.
    """

    name: str
    text: str
    codes: np.ndarray | None = None
    conversation: tuple[Turn, ...] = ()

    def to_bytes(self) -> bytes:
        """A line of JSON, then the codes in little-endian words of 2 bytes (4 where a code needs them)."""
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
        """The reverse of `to_bytes`. Raises `Emu3Error` on anything else."""
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
    """int32 [h, w] or [t, h, w] of the bytes after a record's header."""
    sides = isinstance(shape, list) and len(shape) in (2, 3) and all(is_whole(side, 1) for side in shape)
    if dtype not in ("<u2", "<u4") or not sides:
        raise Emu3Error(f"the record is damaged (codes of type {shown(dtype)}, shape {shown(shape)}); {_AGAIN}")
    codes = np.frombuffer(body, dtype).reshape(shape)
    if codes.max() >= 2**31:
        raise Emu3Error(f"the record is damaged (a code is {codes.max()}); {_AGAIN}")
    return codes.astype(np.int32)


def check_text(field: str, value: Any) -> str:
    """`value` if it is text that can be stored; otherwise an `Emu3Error` that names `field`."""
    if not isinstance(value, str):
        raise Emu3Error(f"{field} is {shown(value)}: it must be text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Emu3Error(
            f"{field} holds half a surrogate pair at character {error.start}: write valid Unicode"
        ) from error
    return value


def check_conversation(value: Any) -> tuple[Turn, ...]:
    """Turns from their JSON form: user and assistant by turns, from the first question to the last answer.

    Raises:
        Emu3Error: on anything else.
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
                f"conversation turn {number} has role {shown(turn['role'])}, {expected!r} belongs there: "
                "user and assistant take turns, and the user begins"
            )
        turns.append(Turn(expected, check_text(f"conversation turn {number}", turn["text"])))
    if len(turns) % 2 or not turns:
        raise Emu3Error(f"the conversation has {len(turns)} turns: it must end with an answer of the assistant")
    return tuple(turns)

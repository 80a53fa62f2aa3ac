"""What the tests of hostile files share: how many inputs, how they are damaged, and what a reader may make of them."""

import copy
import json
from collections.abc import Callable, Sequence
from typing import TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from emu3_jax.errors import Emu3Error

Result = TypeVar("Result")

_deep: list = []
for _ in range(90):
    _deep = [_deep]
ODD = [
    None, True, False, 0, -1, 1, 2, 10**9, 2**31, 2**63, 10**30, 10**400, -(10**400), 0.5, -0.0, 1e308, 5e-324,
    float("nan"), float("inf"), "", " ", ".", "..", "../x", "../../x", "/etc/passwd", "a/b", "a\0b", "\n", "\x1b[2J",
    "\ud800", "\u202e", "²", "٣", "con", "gs://b/x", "x" * 300, "x" * 10_000, [], [[]], {}, {"": {}}, [None],
    ["a"],
    {"a": 1}, [10**9] * 3, [[[[[[[[1]]]]]]]], _deep,
]  # fmt: skip
odd = st.sampled_from(ODD).map(copy.deepcopy) | st.text(max_size=20) | st.integers() | st.floats()


def examples(count: int) -> settings:
    """So many inputs, the same each time."""
    return settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )


def gives_or_refuses(read: Callable[[], Result]) -> Result | None:
    """What `read` gives. An `Emu3Error` is fine, if its line is one; whatever else it raises fails the test."""
    try:
        return read()
    except Emu3Error as error:
        line = str(error)
        assert line.isprintable() and 0 < len(line) <= 300
        return None


@st.composite
def damaged(draw, whole: bytes, lines: Sequence[bytes] = ()) -> bytes:
    """`whole` with up to four parts changed, cut out, doubled or set to extremes, its end missing, or one of `lines`
    added; sometimes wholly other bytes."""
    if draw(st.integers(0, 11)) == 0:
        others = [b"", b"[" * 50_000, b'{"a":' * 50_000, b"\xff\xfe", b"\xef\xbb\xbf", b"1" * 5000]
        return draw(st.sampled_from(others) | st.binary(max_size=64))
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = min(int(draw(st.floats(0, 1, exclude_max=True)) * (len(data) + 1)), len(data))
        length = draw(st.integers(1, 40))
        match draw(st.sampled_from(["byte", "byte", "word", "cut", "insert", "double", "zero", "end", "line"])):
            case "byte" if data:
                data[min(at, len(data) - 1)] = draw(st.integers(0, 255))
            case "word":
                data[at : at + 4] = draw(st.sampled_from([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0"]))
            case "cut":
                del data[at : at + length]
            case "insert":
                data[at:at] = draw(
                    st.sampled_from([b"\0", b"\xff\xfe", b"{", b"[" * 5000, b"\n", b"9" * 5000]) | st.binary(max_size=4)
                )
            case "double":
                data[at:at] = data[at : at + length]
            case "zero":
                data[at : at + length] = bytes(length)
            case "end":
                del data[at:]
            case "line" if lines:
                data += draw(st.sampled_from(lines))
    return bytes(data)


@st.composite
def damaged_json(draw, whole, keep: Sequence[str] = (), names: Sequence[str] = ("colour", "")):
    """A JSON value with up to three places replaced, removed, renamed or added to.

    Args:
        whole: the value, which is not changed.
        keep: keys that are left alone.
        names: what keys are renamed to, or added.
    """
    value = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        found = [(holder, key) for holder, key in places(value) if key not in keep]
        if not found:
            return draw(odd)
        holder, key = draw(st.sampled_from(found))
        match draw(st.sampled_from(["replace", "replace", "remove", "rename", "add", "whole"])):
            case "replace":
                holder[key] = draw(odd)
            case "remove":
                del holder[key]
            case "rename" if isinstance(holder, dict):
                holder[draw(st.sampled_from(names))] = holder.pop(key)
            case "add" if isinstance(holder, dict):
                holder[draw(st.sampled_from(names))] = draw(odd)
            case "whole" if draw(st.integers(0, 9)) == 0:
                return draw(odd)
    return value


def places(value):
    """Every object and list in a JSON value that has entries, with each of its keys."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield value, key
        yield from places(inner)


@st.composite
def json_like(draw, value) -> bytes:
    """A JSON text near that of `value`, and sometimes no JSON at all."""
    text = json.dumps(draw(damaged_json(value))).encode()
    return draw(damaged(text)) if draw(st.integers(0, 3)) == 0 else text

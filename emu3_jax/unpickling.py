"""Reads the pickles of `torch.save` files without torch, and without running their code.

A `torch.save` file is a zip with one pickle (`data.pkl`) and one entry per storage. A pickle is a program, and Python's
unpickler calls any function that it names. This module executes only the few instructions that plain data need. A file
cannot import anything, cannot call anything but the functions of a `Vocabulary`, and cannot affect later files.
"""

import dataclasses
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import limit, plain_file
from emu3_jax.printable import shown

MAX_BYTES = 64 << 20  # of a pickle; the pickle of an 8 B model has about 100 kB
MAX_STEPS = 1_000_000  # instructions in a pickle; a tensor needs about 45
# Bytes of a zip's directory: about 100,000 entries. In memory, `zipfile` needs a hundred times as many bytes.
_MAX_DIRECTORY = 8 << 20
_END_BYTES = 22 + (1 << 16)  # length of a zip's last record with the longest possible comment


class BadPickle(ValueError):
    """The pickle is damaged, or holds other data than expected."""


@dataclasses.dataclass(frozen=True)
class Function:
    """A function that a pickle may call. It takes plain values, and must check them itself."""

    call: Callable[..., Any]


def ordered_dict(*items: Any) -> dict[Any, Any]:
    """Replaces `collections.OrderedDict`. A pickle creates it empty, then sets its items."""
    if items:
        raise BadPickle("an OrderedDict is created with items instead of empty")
    return {}


class Filled:
    """Base class for objects that a pickle creates empty, then fills once with a BUILD instruction."""

    def fill(self, state: Any) -> None:
        """Takes the state of the BUILD instruction, which may be any value."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The globals that one kind of pickle may use.

    Attributes:
        names: maps a global, (module, name), to the value that replaces it. Only `Function` values can be called.
        persistent: makes an object from a persistent id. The id may be any value.
        purpose: what the file holds, such as "plain tensors", for the error message "which plain tensors never need".
        remedy: what the user should do if the file is refused.
    """

    names: Mapping[tuple[str, str], Any]
    persistent: Callable[[Any], Any]
    purpose: str
    remedy: str


def open_archive(file: Path, remedy: str) -> tuple[zipfile.ZipFile, str]:
    """Opens a `torch.save` file.

    Compressed entries are refused, because torch never writes them. So no entry is larger than the file.

    Args:
        file: the file.
        remedy: what the user should do if the file is refused.

    Returns:
        The open archive, which the caller must close, and the folder of its entries, ending in "/".

    Raises:
        Emu3Error: the file does not hold exactly one pickle, has too many entries, or has compressed entries.
        OSError, zipfile.BadZipFile: the file cannot be read, or is not a zip.
    """
    plain_file(file)
    limit(file, "bytes of its directory", _directory_bytes(file), _MAX_DIRECTORY)
    archive = zipfile.ZipFile(file)
    try:
        pickles = [info.filename for info in archive.infolist() if info.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise Emu3Error(f"{file}: not a torch.save file (it holds {len(pickles)} data.pkl); {remedy}")
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise Emu3Error(
                    f"{file}: entry {shown(info.filename)} is compressed, which torch.save never does; {remedy}"
                )
    except BaseException:
        archive.close()
        raise
    return archive, pickles[0].removesuffix("data.pkl")


def _directory_bytes(file: Path) -> int:
    """Reads the size of a zip's directory from its last record. Returns 0 if there is none; `zipfile` reports that."""
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(0, size - _END_BYTES - 20))
        tail = stream.read()
        at = tail.rfind(b"PK\x05\x06")
        if at < 0 or len(tail) < at + 22:
            return 0
        found = int.from_bytes(tail[at + 12 : at + 16], "little")
        locator = tail[at - 20 : at] if at >= 20 else b""
        if locator.startswith(b"PK\x06\x07"):  # zip64 keeps the size in another record
            stream.seek(int.from_bytes(locator[8:16], "little"))
            found = max(found if found != 0xFFFFFFFF else 0, int.from_bytes(stream.read(56)[40:48], "little"))
        return found


def unpickle(data: bytes, file: Path, vocabulary: Vocabulary) -> Any:
    """Reads a pickle of plain data.

    Args:
        data: the pickle.
        file: path of the file, for error messages.
        vocabulary: the globals that the pickle may use.

    Returns:
        None, bools, ints of up to 64 bits, floats, strings, bytes, tuples, lists, dicts, and objects of `vocabulary`.

    Raises:
        BadPickle: the pickle is damaged, or has an instruction that plain data never need.
        Emu3Error: the pickle uses a global that is not in `vocabulary`, or is too large.
    """
    limit(file, "bytes of its pickle", len(data), MAX_BYTES)
    machine = _Machine(file, vocabulary)
    for step, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        limit(file, "instructions of its pickle", step, MAX_STEPS)
        if opcode.name == "STOP":
            return machine.result()
        machine.step(opcode.name, argument)
    raise BadPickle("it has no end")


_MARK = object()
_VALUES = frozenset(
    [
        "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
        "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
        "BINBYTES8",
    ]
)  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """The stack and the memo of a pickle under execution."""

    def __init__(self, file: Path, vocabulary: Vocabulary):
        self._file, self._vocabulary = file, vocabulary
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def result(self) -> Any:
        if len(self._stack) != 1 or self._stack[0] is _MARK:
            raise BadPickle(f"it ends with {len(self._stack)} values")
        return self._stack[0]

    def step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _VALUES:
            if isinstance(argument, int) and argument.bit_length() > 64:
                raise BadPickle(f"a number of {argument.bit_length()} bits")
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            stack.append(tuple(self._pop(_TUPLES[name])))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[int(argument)] = self._top()
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self._top()
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            if int(argument) not in self._memo:
                raise BadPickle(f"it refers to value {argument}, which it has not made")
            stack.append(self._memo[int(argument)])
        elif (method := getattr(self, f"_{name.lower()}", None)) is not None and name in _INSTRUCTIONS:
            method(argument)
        elif name not in ("PROTO", "FRAME"):
            raise BadPickle(f"instruction {name}, which {self._vocabulary.purpose} never need")

    # -------------------------------------------------------------------------------------------- the stack

    def _top(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise BadPickle("a value is missing")
        return self._stack[-1]

    def _pop(self, count: int) -> list[Any]:
        values = self._stack[len(self._stack) - count :] if len(self._stack) >= count else [_MARK]
        if any(value is _MARK for value in values):
            raise BadPickle("a value is missing")
        del self._stack[len(self._stack) - count :]
        return values

    def _pop_to_mark(self) -> list[Any]:
        for at in range(len(self._stack) - 1, -1, -1):
            if self._stack[at] is _MARK:
                values = self._stack[at + 1 :]
                del self._stack[at:]
                return values
        raise BadPickle("a mark is missing")

    # -------------------------------------------------------------------------------------------- instructions

    def _mark(self, _: Any) -> None:
        self._stack.append(_MARK)

    def _tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._pop_to_mark()))

    def _list(self, _: Any) -> None:
        self._stack.append(self._pop_to_mark())

    def _append(self, _: Any) -> None:
        self._extend(self._pop(1))

    def _appends(self, _: Any) -> None:
        self._extend(self._pop_to_mark())

    def _extend(self, values: list[Any]) -> None:
        if type(self._top()) is not list:
            raise BadPickle("it appends to something that is not a list")
        self._top().extend(values)

    def _dict(self, _: Any) -> None:
        values = self._pop_to_mark()
        self._stack.append({})
        self._set(values)

    def _setitem(self, _: Any) -> None:
        self._set(self._pop(2))

    def _setitems(self, _: Any) -> None:
        self._set(self._pop_to_mark())

    def _set(self, values: list[Any]) -> None:
        if type(self._top()) is not dict or len(values) % 2:
            raise BadPickle("it sets an item of something that is not a dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) not in (str, int):  # hashing deeply nested tuples would crash the process
                raise BadPickle(f"a dict has the key {shown(key)}")
            self._top()[key] = value

    def _global(self, argument: str) -> None:
        self._find(*argument.split(" ", 1))

    def _stack_global(self, _: Any) -> None:
        self._find(*self._pop(2))

    def _find(self, module: Any, name: Any = "") -> None:
        if type(module) is not str or type(name) is not str:
            raise BadPickle(f"a global has the name {shown((module, name))}")
        if (module, name) not in self._vocabulary.names:
            raise Emu3Error(
                f"{self._file}: refused: its pickle asks for {module}.{name:.80}, which {self._vocabulary.purpose} "
                f"never need and which could run code; {self._vocabulary.remedy}"
            )
        self._stack.append(self._vocabulary.names[module, name])

    def _reduce(self, _: Any) -> None:
        function, arguments = self._pop(2)
        if not isinstance(function, Function) or type(arguments) is not tuple:
            raise BadPickle(f"it calls {shown(function)}")
        self._stack.append(function.call(*arguments))

    def _build(self, _: Any) -> None:
        (state,) = self._pop(1)
        # PyTorch modules attach `_metadata` to an OrderedDict as its state. We ignore it.
        if isinstance(self._top(), Filled):
            self._top().fill(state)
        elif type(self._top()) is not dict:
            raise BadPickle(f"it changes {shown(self._top())}")

    def _binpersid(self, _: Any) -> None:
        self._stack.append(self._vocabulary.persistent(*self._pop(1)))


_INSTRUCTIONS = frozenset(
    [
        "MARK", "TUPLE", "LIST", "APPEND", "APPENDS", "DICT", "SETITEM", "SETITEMS", "GLOBAL", "STACK_GLOBAL",
        "REDUCE", "BUILD", "BINPERSID",
    ]
)  # fmt: skip

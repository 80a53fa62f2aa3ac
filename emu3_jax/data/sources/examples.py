"""What every source of captioned pictures is made of: examples, and pictures that are read only when asked for."""

import dataclasses
import hashlib
import io
import os
from pathlib import Path
from typing import BinaryIO, Protocol

from PIL import Image

from emu3_jax.data.records import Turn, check_text
from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import limit, plain_file, reading
from emu3_jax.media.clips import Clip, load_clip
from emu3_jax.media.images import HEIC_SUFFIXES, load_image, picture_formats
from emu3_jax.printable import one_line

MAX_CAPTION = 1 << 20  # bytes of a caption's file
_MAX_PICTURE = 1 << 28  # bytes of a picture inside another file
_END = 1 << 16  # bytes of either end of a picture that tell it from others


class Medium(Protocol):
    """A picture or clip that has not been read yet. Equal ones are the same."""

    def check(self) -> None:
        """Raises the `Emu3Error` that is known before it is read."""

    def load(self) -> Image.Image | Clip:
        """The picture, upright and in RGB, or the clip. Raises `Emu3Error` if it is damaged."""

    def ends(self) -> bytes:
        """Its length and both ends of its bytes: the same for copies, wherever they lie."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One record before its picture is encoded.

    Attributes:
        where: its place, with which errors begin.
        name: of the record.
        text: the caption.
        medium: its picture or clip, or None of text alone.
        conversation: turns, or none.
    """

    where: str
    name: str
    text: str
    medium: Medium | None
    conversation: tuple[Turn, ...] = ()

    def identity(self) -> bytes:
        """A hash that is the same for all captions of one picture, wherever and under whatever name it lies."""
        parts = (self.text, *(turn.text for turn in self.conversation))
        content = self.medium.ends() if self.medium is not None else "\0".join(parts).encode()
        return hashlib.sha256(content).digest()


class Source(Protocol):
    """Examples, read one by one: a source of millions is never in memory."""

    digest: str  # of all that decides the examples, but for the pixels

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Example `index`; `Emu3Error` that says what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class MediaFile:
    """A picture's file, or with `clip` a clip's: an animation, a video, or a folder of frames."""

    path: Path
    clip: bool = False

    def check(self) -> None:
        if not os.path.exists(self.path):
            raise Emu3Error(f"there is no {self.path}: correct the path, or add the file")

    def load(self) -> Image.Image | Clip:
        with reading(self.path):
            return load_clip(self.path) if self.clip else load_image(self.path)

    def ends(self) -> bytes:
        with reading(self.path):
            if self.path.is_dir():
                frames = sorted(self.path.iterdir())
                return b"".join([MediaFile(frame).ends() for frame in frames if frame.is_file()])
            plain_file(self.path)
            with self.path.open("rb") as stream:
                return stream_ends(stream, 0, os.fstat(stream.fileno()).st_size)


@dataclasses.dataclass(frozen=True)
class MemberPicture:
    """A picture that lies inside a file as it is, such as a tar file: `size` bytes from `start` on.

    Errors call it `name`.
    """

    path: Path
    start: int
    size: int
    name: str

    def check(self) -> None:
        """Nothing is known before it is read."""

    def load(self) -> Image.Image:
        return load_image(Path(self.name), self.read())

    def read(self) -> bytes:
        """Its bytes."""
        limit(self.name, "bytes", self.size, _MAX_PICTURE)
        with reading(self.path), self.path.open("rb") as stream:
            stream.seek(self.start)
            return stream.read(self.size)

    def ends(self) -> bytes:
        with reading(self.path), self.path.open("rb") as stream:
            return stream_ends(stream, self.start, self.size)


def stream_ends(stream: BinaryIO, start: int, size: int) -> bytes:
    """What `Medium.ends` gives for the `size` bytes of a file from `start` on."""
    stream.seek(start)
    first = stream.read(min(size, _END))
    stream.seek(start + max(size - _END, 0))
    return b"%d " % size + first + stream.read(min(size, _END))


def bytes_ends(data: bytes) -> bytes:
    """The same for bytes."""
    return stream_ends(io.BytesIO(data), 0, len(data))


def picture_suffixes() -> frozenset[str]:
    """Endings of pictures' names, in lower case; those of HEIC also where nothing is installed that reads it."""
    formats = picture_formats()
    registered = {suffix for suffix, name in Image.registered_extensions().items() if name in formats}
    return frozenset(registered | HEIC_SUFFIXES)


def where_once(where: str, error: Exception) -> str:
    """The error's message, which begins with `where` unless that stands in it."""
    message = str(error)
    return message if one_line(where) in message else f"{where}: {message}"


def decode_caption(data: bytes, where: str) -> str:
    """The caption that a text file holds. Raises `Emu3Error` that begins with `where` if it is no text, or empty."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Emu3Error(f"{where} is not UTF-8 text: save it in UTF-8") from error
    return clean_caption(text, where)


def clean_caption(text: object, where: str) -> str:
    """A caption without blank ends. Raises `Emu3Error` that begins with `where` if it is no text, or empty."""
    try:
        caption = check_text("caption", text).strip()
    except Emu3Error as error:
        raise Emu3Error(f"{where}: {error}") from error
    if not caption:
        raise Emu3Error(f"{where}: the caption is empty: write one")
    if "\0" in caption:  # UTF-16 without a mark at its beginning reads as UTF-8
        raise Emu3Error(f"{where}: the caption has zero characters in it: save it as text in UTF-8")
    return caption

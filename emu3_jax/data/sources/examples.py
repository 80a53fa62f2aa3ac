"""Building blocks of all sources: examples, and pictures that are read on demand."""

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

MAX_CAPTION = 1 << 20  # bytes of a file with one caption
_MAX_PICTURE = 1 << 28  # bytes of a picture inside another file
_END = 1 << 16  # bytes at each end of a picture that identify it


class Medium(Protocol):
    """A picture or clip that has not been read yet. Two equal objects stand for the same picture or clip."""

    def check(self) -> None:
        """Raises an `Emu3Error` if an error can be found without reading the picture."""

    def load(self) -> Image.Image | Clip:
        """Reads the picture, upright and in RGB, or the clip. Raises an `Emu3Error` if it is damaged."""

    def ends(self) -> bytes:
        """Returns the length of the file and the bytes at both ends. Copies of a picture give equal values."""


@dataclasses.dataclass(frozen=True)
class ExamplePart:
    """A part of a document: a text, or with `medium` a picture. See `records.Part`."""

    role: str | None
    text: str
    medium: Medium | None


@dataclasses.dataclass(frozen=True)
class Example:
    """A record before its pictures are encoded.

    Attributes:
        where: file and line of the example; begins error messages.
        name: name of the record.
        text: the caption.
        medium: the picture or clip; None for plain text.
        conversation: turns; may be empty.
        document: texts and pictures in order; may be empty.
    """

    where: str
    name: str
    text: str
    medium: Medium | None
    conversation: tuple[Turn, ...] = ()
    document: tuple[ExamplePart, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts."""
        return (self.text, *(turn.text for turn in self.conversation), *(part.text for part in self.document))

    @property
    def media(self) -> tuple[Medium, ...]:
        """All pictures and clips."""
        media = (self.medium, *(part.medium for part in self.document))
        return tuple(medium for medium in media if medium is not None)

    def identity(self) -> bytes:
        """A hash of the picture's contents, or of the text if there is no picture. Of a document, a hash of all parts.

        All captions of one picture have the same hash, also if copies of the picture have different names.
        """
        content = self.medium.ends() if self.medium is not None else "\0".join(self.texts).encode()
        if self.document:
            content += b"".join(hashlib.sha256(medium.ends()).digest() for medium in self.media)
        return hashlib.sha256(content).digest()


class Source(Protocol):
    """Interface of sources. Examples are read on demand, so a source of millions fits in memory."""

    digest: str  # hash of everything that determines the examples, except the pixels

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Reads example `index`. Raises an `Emu3Error` if the example is not usable."""


@dataclasses.dataclass(frozen=True)
class MediaFile:
    """A picture in a file of its own; or, with `clip`, an animation, a video, or a folder of frames."""

    path: Path
    clip: bool = False

    def check(self) -> None:
        if not os.path.exists(self.path):
            raise Emu3Error(f"{self.path} does not exist: correct the path, or add the file")

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
    """A picture inside an uncompressed archive, such as a tar file.

    Attributes:
        path: the archive.
        start: position of the picture in the archive.
        size: length of the picture in bytes.
        name: name of the picture in errors.
    """

    path: Path
    start: int
    size: int
    name: str

    def check(self) -> None:
        """Does nothing: errors are found only by reading the picture."""

    def load(self) -> Image.Image:
        return load_image(Path(self.name), self.read())

    def read(self) -> bytes:
        """Reads the picture's bytes. Raises an `Emu3Error` if it is too large or cannot be read."""
        limit(self.name, "bytes", self.size, _MAX_PICTURE)
        with reading(self.path), self.path.open("rb") as stream:
            stream.seek(self.start)
            return stream.read(self.size)

    def ends(self) -> bytes:
        with reading(self.path), self.path.open("rb") as stream:
            return stream_ends(stream, self.start, self.size)


def stream_ends(stream: BinaryIO, start: int, size: int) -> bytes:
    """Computes `Medium.ends` for `size` bytes of a file, beginning at `start`."""
    stream.seek(start)
    first = stream.read(min(size, _END))
    stream.seek(start + max(size - _END, 0))
    return b"%d " % size + first + stream.read(min(size, _END))


def bytes_ends(data: bytes) -> bytes:
    """Computes `Medium.ends` for bytes in memory."""
    return stream_ends(io.BytesIO(data), 0, len(data))


def picture_suffixes() -> frozenset[str]:
    """File endings of pictures, in lower case. Includes HEIC even if pillow-heif is not installed."""
    formats = picture_formats()
    registered = {suffix for suffix, name in Image.registered_extensions().items() if name in formats}
    return frozenset(registered | HEIC_SUFFIXES)


def where_once(where: str, error: Exception) -> str:
    """Returns the error's message, with `where` in front unless the message already contains it."""
    message = str(error)
    return message if one_line(where) in message else f"{where}: {message}"


def decode_caption(data: bytes, where: str) -> str:
    """Decodes the caption in a text file. Raises an `Emu3Error` that begins with `where` if it is empty or not text."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Emu3Error(f"{where} is not UTF-8 text: save it in UTF-8") from error
    return clean_caption(text, where)


def clean_caption(text: object, where: str) -> str:
    """Strips blanks from a caption. Raises an `Emu3Error` that begins with `where` if it is empty or not text."""
    try:
        caption = check_text("caption", text).strip()
    except Emu3Error as error:
        raise Emu3Error(f"{where}: {error}") from error
    if not caption:
        raise Emu3Error(f"{where}: the caption is empty: write one")
    if "\0" in caption:  # UTF-16 without a byte order mark decodes as UTF-8 with null characters
        raise Emu3Error(f"{where}: the caption contains null characters: save it as text in UTF-8")
    return caption

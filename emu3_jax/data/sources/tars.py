"""Tar files of pictures and captions in the format of `webdataset`: members with the same name belong together.

The caption of `000.jpg` is in `000.txt`, or in a field of the object in `000.json`. The ending of a name begins at its
last dot. Python's `tarfile` lists the members, and pictures are read directly from their position in the tar file. The
library `webdataset` is not used: it reads only from beginning to end, while `prepare` reads in any order. Nothing is
unpacked to disk, so names in a tar file never become paths.
"""

import hashlib
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from emu3_jax.data.sources.examples import (
    MAX_CAPTION,
    Example,
    MemberPicture,
    clean_caption,
    decode_caption,
    picture_suffixes,
)
from emu3_jax.data.sources.packed import PackedNames, PackedNumbers
from emu3_jax.data.sources.tables import Columns, caption_of
from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import limit, parse_json, plain_file, reading
from emu3_jax.media.images import require_heic
from emu3_jax.printable import printable, shown

_BLOCK = 512  # bytes; headers begin at multiples of this number
_PADDING = 1 << 16  # bytes to check after the end of the archive; tar pads a file to a multiple of 20 blocks
_MAX_HEADER = 1 << 20  # bytes of a member's extended header, which holds long names
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # first bytes of gzip, bzip2, xz and zstd files
_AGAIN = "download or write the tar file again"
_Member = tuple[str, int, int]  # name, position, size


class Tars:
    """The captioned pictures of tar files, in order. Memory holds about 100 bytes per picture.

    Unusable members are also examples, and reading them raises an error: a picture without a caption, a caption without
    a picture, two members with the same name, links and devices.
    """

    def __init__(self, paths: Sequence[Path], columns: Columns):
        """Lists all members and reads all captions.

        Raises:
            Emu3Error: a file is not a tar file, is compressed, or is truncated; or no picture has a caption.
        """
        self._paths, self._columns = list(paths), columns
        self._suffixes = picture_suffixes()
        self._names = PackedNames()  # for each example, the name of the picture, then of the caption's member
        # Number of the tar file, position and size of the picture, position and size of the caption.
        self._places = PackedNumbers(5)
        self._problems: dict[int, str] = {}
        self._digest = hashlib.sha256(b"tar")
        for number, path in enumerate(paths):
            self._index(number, path)
        usable = len(self._places) - len(self._problems)
        if not usable:
            first = f"; the first: {self._problems[0]}" if self._problems else ""
            raise Emu3Error(f"{paths[0]}: no picture in it has a caption in a .txt or .json with its name{first}")
        self.digest = self._digest.hexdigest()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Example:
        """Reads example `index`. Raises an `Emu3Error` if the example is not usable."""
        if index in self._problems:
            raise Emu3Error(self._problems[index])
        number, start, size, text_start, text_size = self._places[index]
        name, path = printable(self._names[2 * index]), self._paths[number]
        where = f"{path}: {name}"
        with reading(path, _AGAIN), path.open("rb") as stream:
            text = self._caption(stream, path, (self._names[2 * index + 1], text_start, text_size))
        return Example(where, printable(f"{path.name}/{name}"), text, MemberPicture(path, start, size, where))

    def _index(self, number: int, path: Path) -> None:
        """Lists the members of one file, and adds its examples."""
        samples: dict[str, dict[str, _Member]] = {}
        problems = []
        for member in members(path):
            folder, _, base = member.name.rpartition("/")
            if member.isdir() or any(part[:1] == "." and part not in (".", "..") for part in member.name.split("/")):
                continue
            stem, dot, suffix = base.rpartition(".")
            key, suffix = (f"{folder}/{stem}", f".{suffix.lower()}") if dot else (f"{folder}/{base}", "")
            if not member.isreg() or member.issparse():
                problems.append(
                    f"{path}: {shown(member.name)} is not a regular file but a link, a device or sparse: remove it"
                )
            elif suffix in samples.setdefault(key, {}):
                problems.append(f"{path}: {shown(member.name)} is in it twice: the first one is used; remove the other")
            else:
                samples[key][suffix] = (member.name, member.offset_data, member.size)
        require_heic(path, sum(bool({".heic", ".heif"} & found.keys()) for found in samples.values()))
        with reading(path, _AGAIN), path.open("rb") as stream:
            for sample in samples.values():
                try:
                    picture, text = self._pair(path, sample)
                    caption = self._caption(stream, path, text)
                except Emu3Error as error:
                    problems.append(str(error))
                    continue
                self._digest.update(f"{picture[2]} {caption}\0".encode() + picture[0].encode("utf-8", "replace"))
                self._names.append(picture[0])
                self._names.append(text[0])
                self._places.append(number, *picture[1:], *text[1:])
        for problem in problems:
            self._problems[len(self._places)] = problem
            self._digest.update(b"!\0")
            self._names.append("")
            self._names.append("")
            self._places.append(number, 0, 0, 0, 0)

    def _pair(self, path: Path, sample: dict[str, _Member]) -> tuple[_Member, _Member]:
        """Finds picture and caption among the members with one name.

        Raises:
            Emu3Error: the picture or the caption is missing, or there are two pictures.
        """
        pictures = [member for suffix, member in sample.items() if suffix in self._suffixes]
        text = sample.get(".txt") or sample.get(".json")
        names = ", ".join(shown(name) for name, _, _ in list(sample.values())[:3])
        if len(pictures) > 1:
            raise Emu3Error(f"{path}: {names}: two pictures have the same name: rename one, and its caption")
        if not pictures:
            what = "a caption without a picture" if text else "neither a picture nor a caption"
            raise Emu3Error(f"{path}: {names}: it is {what}: remove it, or add what is missing")
        if text is None:
            raise Emu3Error(f"{path}: {names}: there is no caption: add a .txt or .json with the same name")
        return pictures[0], text

    def _caption(self, stream: IO[bytes], path: Path, text: _Member) -> str:
        name, start, size = text
        where = f"{path}: {printable(name)}"
        limit(where, "bytes of a caption", size, MAX_CAPTION)
        stream.seek(start)
        data = stream.read(size)
        if name.lower().endswith(".json"):
            value = caption_of(parse_json(data, where, _AGAIN), self._columns, where)
            return clean_caption(value, where)
        return decode_caption(data, where)


def members(path: Path) -> Iterator[tarfile.TarInfo]:
    """Yields the members of a tar file in order.

    Raises:
        Emu3Error: the file is not a tar file, is compressed, truncated or damaged, or consists of several joined files.
    """
    with reading(path, _AGAIN):
        plain_file(path)
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            head = stream.read(_BLOCK)
            stream.seek(0)
            if head.startswith(_COMPRESSED):
                raise Emu3Error(f"{path} is compressed: decompress it to a plain .tar file")
            try:
                with tarfile.open(fileobj=_Bounded(stream), mode="r:") as tar:  # type: ignore[call-overload]
                    while (member := tar.next()) is not None:
                        tar.members = []  # `tarfile` would keep every member in memory
                        if member.isreg() and not member.issparse() and member.offset_data + member.size > size:
                            raise Emu3Error(f"{path} is cut off in {shown(member.name)}: {_AGAIN}")
                        yield member
                    end = tar.offset
            except tarfile.TarError as error:
                raise Emu3Error(f"{path} is not a readable tar file ({error}): {_AGAIN}") from error
            # `tarfile` stops without an error at a damaged header, and at the end mark inside joined files.
            stream.seek(min(end, size))
            if stream.read(_BLOCK).strip(b"\0"):
                raise Emu3Error(f"{path} is damaged at byte {end}: {_AGAIN}")
            if stream.read(_PADDING).strip(b"\0"):
                raise Emu3Error(f"{path} consists of several tar files joined together: split it, and give each one")


class _Bounded:
    """A stream that refuses large reads. `tarfile` reads headers of whatever length the file claims."""

    def __init__(self, stream: IO[bytes]):
        self._stream = stream
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._stream.read(size)

"""Checksums of a bundle's files: the file `SHA256SUMS`, in the format of `sha256sum`.

The weights' files contain no checksums, so a flipped bit would only give a wrong number. Every bundle gets this list.
"""

import concurrent.futures
import dataclasses
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import inner_path, limit, plain_file, read_bytes, reading
from emu3_jax.progress import Progress

CHECKSUMS = "SHA256SUMS"
COPY_AGAIN = "copy the bundle again, or convert the model again"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_MAX_FILES = 100_000  # most files of a bundle
_MAX_BYTES = 16 << 20  # largest SHA256SUMS, in bytes
_EDITED = "config.json"  # the file that error lines tell users to correct
EDITED_REMEDY = f"if you changed it yourself, put its new sum (sha256sum) into {CHECKSUMS}; otherwise copy it again"
_THREADS = 8  # hashing releases the interpreter lock


def write_checksums(directory: Path, progress: bool | None = False) -> None:
    """Writes the SHA-256 of every file below `directory` to `directory/SHA256SUMS`. Call it last.

    `progress` is as in `progress.Progress`.
    """
    names = sorted(name for name in _files(directory) if name != CHECKSUMS)
    sums = _sums(directory, names, progress)
    (directory / CHECKSUMS).write_text("".join(f"{sums[name]}  {name}\n" for name in names))


def has_checksums(directory: Path) -> bool:
    """Whether the bundle has a list of checksums. Bundles of older versions have none."""
    return (directory / CHECKSUMS).is_file()


@dataclasses.dataclass(frozen=True)
class Difference:
    """A file of a bundle that differs from the list of checksums.

    Attributes:
        name: path of the file, relative to the bundle's directory.
        what: what is wrong, as part of an error line.
        edited: whether users may have edited this file, so that the difference may be no damage.
    """

    name: str
    what: str
    edited: bool = False


def compare_checksums(
    directory: Path, *, whole: bool = False, progress: bool | None = None
) -> tuple[int, list[Difference]]:
    """Compares every listed file of a bundle with its checksum.

    A whole part may be missing, because users may remove one. Files beside the parts and hidden files need not be
    listed.

    Args:
        directory: directory of a bundle with a list of checksums.
        whole: whether no part may be missing.
        progress: as in `progress.Progress`.

    Returns:
        The number of files that were read, and the files that differ.

    Raises:
        Emu3Error: the list is damaged, or a file cannot be read.
    """
    expected = read_checksums(directory / CHECKSUMS)
    if not whole:
        expected = {name: digest for name, digest in expected.items() if (directory / name.split("/")[0]).exists()}
    found = set(_files(directory))
    different = [Difference(name, "is missing") for name in expected if name not in found]
    unlisted = sorted(name for name in found - expected.keys() if "/" in name and "/." not in f"/{name}")
    different += [Difference(name, f"is not in its {CHECKSUMS}, so it came later") for name in unlisted]
    there = [name for name in expected if name in found]
    for name, digest in _sums(directory, there, progress).items():
        if digest != expected[name]:
            different.append(Difference(name, "is damaged, its checksum differs", name.endswith(_EDITED)))
    return len(there), different


def verify_checksums(directory: Path, *, whole: bool = False, progress: bool | None = None) -> None:
    """Compares the files of a bundle with their checksums, see `compare_checksums`.

    Raises:
        Emu3Error: there is no list, or it is damaged; a file is missing, unlisted or damaged.
    """
    if not has_checksums(directory):
        raise Emu3Error(
            f"{directory} has no {CHECKSUMS}, because an older version wrote it: convert the model again, or load it "
            "without verifying"
        )
    _, different = compare_checksums(directory, whole=whole, progress=progress)
    for difference in different[:1]:
        remedy = EDITED_REMEDY if difference.edited else COPY_AGAIN
        raise Emu3Error(f"a file of the bundle {difference.what}: {directory / difference.name}; {remedy}")


def part_digest(directory: Path, part: str) -> str:
    """Identifies the contents of a bundle's part: a SHA-256 of its files' checksums.

    The checksums come from the bundle's list. If it has none, the files are read, which takes a while.

    Args:
        directory: directory of the bundle.
        part: name of the part's directory, such as "decoder".

    Raises:
        Emu3Error: the list is damaged, or a file cannot be read.
    """
    if has_checksums(directory):
        sums = read_checksums(directory / CHECKSUMS)
    else:
        sums = _sums(directory, sorted(name for name in _files(directory) if name.startswith(f"{part}/")), None)
    lines = sorted(f"{digest}  {name}\n" for name, digest in sums.items() if name.startswith(f"{part}/"))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_checksums(listing: Path, remedy: str = COPY_AGAIN) -> dict[str, str]:
    """Reads a list of checksums: SHA-256 in hex, by path relative to the list's directory.

    Raises:
        Emu3Error: the list is unreadable, empty, has a malformed line, or a path that leaves the directory.
    """
    with reading(listing, remedy):
        lines = read_bytes(listing, _MAX_BYTES, remedy).decode().splitlines()
        limit(listing, "lines", len(lines), _MAX_FILES)
        sums: dict[str, str] = {}
        for number, line in enumerate(lines, start=1):
            match = _LINE.fullmatch(line)
            if match is None or match[2] in sums:
                raise Emu3Error(f"{listing} line {number} is not a checksum, two spaces and a new name; {remedy}")
            sums[inner_path(match[2], f"{listing} line {number}")] = match[1]
    if not sums:
        raise Emu3Error(f"{listing} is empty; {remedy}")
    return sums


def _files(directory: Path) -> Iterator[str]:
    """Yields the paths of all files below `directory`, relative to it, with `/`. It follows symbolic links."""
    count = 0
    for place, folders, names in os.walk(directory, followlinks=True):
        count += len(folders) + len(names)
        limit(directory, "files", count, _MAX_FILES)
        for link in (Path(place) / name for name in folders):
            if link.is_symlink() and Path(place).resolve().is_relative_to(link.resolve()):
                raise Emu3Error(f"{link} is a link to a directory that it lies in: remove it")
        for name in names:
            yield (Path(place) / name).relative_to(directory).as_posix()


def _sums(directory: Path, names: list[str], progress: bool | None) -> dict[str, str]:
    """Computes the SHA-256 of each file, on several threads."""
    with reading(directory):
        sizes = []
        for name in names:
            plain_file(directory / name)
            sizes.append((directory / name).stat().st_size)
    threads = min(_THREADS, os.cpu_count() or 1)
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    with Progress(progress, sum(sizes), "bytes", name="checksums") as bar:
        try:
            sums = {}
            for name, size, digest in zip(names, sizes, pool.map(_sha256, [directory / n for n in names]), strict=True):
                sums[name] = digest
                bar.update(size)
            return sums
        finally:
            pool.shutdown(cancel_futures=True)


def _sha256(file: Path) -> str:
    with reading(file, COPY_AGAIN), file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

"""Recognises the kind of source that a command line names, and opens it."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path

from emu3_jax.data.manifest import MAX_LINE, Manifest
from emu3_jax.data.sources.captions import NAMES, TABLES
from emu3_jax.data.sources.conversations import Conversations
from emu3_jax.data.sources.examples import Example, ExamplePart, MediaFile, Source, picture_suffixes
from emu3_jax.data.sources.folder import Folder
from emu3_jax.data.sources.tables import FILE_COLUMNS, Columns
from emu3_jax.data.sources.tars import Tars
from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import local_path, parse_json, plain_file, reading
from emu3_jax.printable import shown

_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")
_CONTAINERS = (".tar", ".parquet")


def open_source(
    places: Sequence[str], columns: Columns, *, images: Path | None = None, output: Path | None = None
) -> Source:
    """Opens a source of captioned pictures.

    Args:
        places: one folder; `hf:NAME`; one file that lists pictures (a manifest, CSV, JSON lines, or LLaVA's JSON); or
            one or more tar or Parquet files.
        columns: names of columns in tables.
        images: folder to which paths in LLaVA's JSON are relative.
        output: output folder of `prepare`. It is skipped if it is inside a folder of pictures.

    Raises:
        Emu3Error: a path does not exist, or holds nothing that can be prepared.
    """
    source = _open(places, columns, images, output)
    if images is not None and not isinstance(source, Conversations):
        raise Emu3Error("--images works only with LLaVA's JSON; other sources contain their paths: leave it out")
    return source


def _open(places: Sequence[str], columns: Columns, images: Path | None, output: Path | None) -> Source:
    if len(places) == 1 and places[0].startswith("hf:"):
        from emu3_jax.data.sources.hub import HubDataset

        return HubDataset(places[0], columns)
    paths = [local_path(place) for place in places]
    for path in paths:
        with reading(path):
            os.stat(path)
    if output is not None and os.path.realpath(output) in map(os.path.realpath, paths):
        raise Emu3Error(f"{output} is the source itself: choose another directory for the data")
    if len(paths) == 1 and paths[0].is_dir():
        return _open_folder(paths[0], columns, output)
    endings = {path.suffix.lower() for path in paths}
    if len(endings) == 1 and (ending := endings.pop()) in _CONTAINERS:
        return _open_container(ending, paths, columns)
    if len(paths) > 1:
        raise Emu3Error(
            f"{len(paths)} sources were given: several sources must all be tar files or all be Parquet files; run "
            "prepare once for each other source, each with its own output"
        )
    return _open_list(paths[0], columns, images)


def _open_folder(path: Path, columns: Columns, output: Path | None) -> Source:
    """Opens a folder of pictures, or a folder that holds only tar files or only Parquet files."""
    with reading(path):
        names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    if output is not None:
        names = [name for name in names if os.path.realpath(path / name) != os.path.realpath(output)]
    for ending in _CONTAINERS:
        found = [path / name for name in names if name.lower().endswith(ending)]
        if not found:
            continue
        others = [name for name in names if path / name not in found and not name.lower().endswith((".md", ".txt"))]
        if others:
            raise Emu3Error(
                f"{path} holds {shown(found[0].name)} and {shown(others[0])}: give the {ending} files by name, or "
                "give folders that hold one kind of data"
            )
        return _open_container(ending, found, columns)
    return Folder(path, columns, leave_out=output)


def _open_container(ending: str, paths: Sequence[Path], columns: Columns) -> Source:
    if ending == ".tar":
        return Tars(paths, columns)
    from emu3_jax.data.sources.arrow import ParquetFiles

    return ParquetFiles(paths, columns)


def _open_list(path: Path, columns: Columns, images: Path | None) -> Source:
    """Opens a file that lists pictures. Its name determines its kind; for JSON lines, its first line does."""
    suffix = path.suffix.lower()
    if suffix in _COMPRESSED:
        raise Emu3Error(f"{path} is compressed: unpack it, and give the folder or the plain .tar")
    if suffix in picture_suffixes():
        raise Emu3Error(f"{path} is a picture: give the folder that holds it and its caption")
    if suffix in TABLES:
        return Folder(path, columns)
    if suffix == ".json":
        return Conversations(path, images)
    if suffix == ".jsonl":
        first = _first_line(path)
        if isinstance(first, dict) and "conversations" in first:
            return Conversations(path, images)
        # `image` does not identify a caption file, because manifests have this field too.
        named = set(FILE_COLUMNS) - {"image"} if columns.picture is None else {columns.picture}
        if isinstance(first, dict) and (named & first.keys() or path.name.lower() in NAMES):
            return Folder(path, columns)
    return ManifestSource(Manifest(path))


def _first_line(path: Path) -> object:
    """Parses the first line that is not blank. Returns None if it is not JSON, or there is none."""
    with reading(path):
        plain_file(path)
        with path.open("rb") as stream:
            for line in iter(functools.partial(stream.readline, MAX_LINE), b""):
                if line.strip():
                    try:
                        return parse_json(line.strip().removeprefix(b"\xef\xbb\xbf"), path)
                    except Emu3Error:
                        return None
    return None


class ManifestSource:
    """The lines of a manifest as examples."""

    def __init__(self, manifest: Manifest):
        """Wraps an open manifest."""
        self._manifest, self.digest = manifest, manifest.digest

    def __len__(self) -> int:
        return len(self._manifest)

    def __getitem__(self, index: int) -> Example:
        """Makes example `index`. Raises as `Manifest.__getitem__`."""
        entry = self._manifest[index]
        file = entry.image or entry.clip
        medium = None if file is None else MediaFile(file, clip=entry.clip is not None)
        where = f"{self._manifest.path} line {self._manifest.line(index)}"
        document = tuple(
            ExamplePart(part.role, part.text, None if part.image is None else MediaFile(part.image))
            for part in entry.document
        )
        return Example(where, entry.name, entry.text, medium, entry.conversation, document)

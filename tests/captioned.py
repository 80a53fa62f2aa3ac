"""Captioned pictures in files of all kinds, for the tests of `prepare`'s sources."""

import io
import pathlib
import tarfile

import numpy as np
import pytest
from PIL import Image

from emu3_jax import Emu3Error
from emu3_jax.config import VisionConfig
from emu3_jax.data.sources.tables import Columns

ANY = Columns()


def picture(colour: int = 0, kind: str = "PNG", side: int = 8) -> bytes:
    """The bytes of a picture of one colour."""
    stream = io.BytesIO()
    Image.new("RGB", (side, side), (colour % 256, colour // 256, 90)).save(stream, kind)
    return stream.getvalue()


def write(root: pathlib.Path, files: dict[str, str | bytes]) -> pathlib.Path:
    """Writes files below `root`; pictures whose content is given as their colour."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def write_tar(path: pathlib.Path, files: dict[str, bytes | str]) -> pathlib.Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            add(tar, name, content)
    return path


def add(tar: tarfile.TarFile, name: str, content: bytes | str) -> None:
    data = content.encode() if isinstance(content, str) else content
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def split(source) -> tuple[dict[str, str], list[str]]:
    """Captions by name, and what is said of all that cannot be read."""
    good, bad = {}, []
    for index in range(len(source)):
        try:
            example = source[index]
        except Emu3Error as error:
            bad.append(str(error))
        else:
            good[example.name] = example.text
    return good, bad


class Model:
    """Stands in for a vision tokenizer: a picture's codes are its red and green in the first pixel."""

    class vision:
        config, image = VisionConfig(), "stand-in"

    def tokenize(self, media):
        assert all(item.mode == "RGB" for item in media)
        return [np.asarray(item)[0, :1, :2].astype(np.int32) for item in media]


def write_parquet(path: pathlib.Path, rows: list[dict], **options) -> pathlib.Path:
    pa = pytest.importorskip("pyarrow", reason="the extra `data` installs PyArrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def cell(colour: int, name: str | None = None) -> dict[str, object]:
    """A picture as `datasets` writes it."""
    return {"bytes": picture(colour), "path": name}

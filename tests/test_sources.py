"""Sources of captioned pictures: what is read of each kind, what is told of the rest, the share for validation."""

import ast
import csv
import errno
import hashlib
import http.server
import io
import json
import os
import pathlib
import random
import re
import runpy
import socket
import subprocess
import sys
import tarfile
import textwrap
import threading
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import GOLDEN
from PIL import Image

from emu3_jax import Emu3Error
from emu3_jax.cli.main import main
from emu3_jax.data.shards import PreparedData
from emu3_jax.data.sources import folder as folders
from emu3_jax.data.sources.conversations import Conversations
from emu3_jax.data.sources.folder import Folder
from emu3_jax.data.sources.opening import open_source
from emu3_jax.data.sources.packed import PackedNames
from emu3_jax.data.sources.records import SourceRecords
from emu3_jax.data.sources.tables import Columns
from emu3_jax.data.sources.tars import Tars
from emu3_jax.data.sources.validation import divide
from emu3_jax.media import images

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
        config = image = "stand-in"

    def tokenize(self, media):
        assert all(item.mode == "RGB" for item in media)
        return [np.asarray(item)[0, :1, :2].astype(np.int32) for item in media]


# ---------------------------------------------------------------------------------------------------------- folders


def test_text_files_beside_pictures(tmp_path):
    write(tmp_path, {
        "a.png": picture(1), "a.txt": "one\n", "sub/b.JPG": picture(2, "JPEG"), "sub/b.txt": "\ufefftwo",
        "c.d.webp": picture(3, "WEBP"), "c.d.txt": " three ", "e.png": picture(4), "e.png.txt": "four",
        ".hidden.png": b"", ".git/x.png": b"", "notes.md": "no caption",
    })  # fmt: skip
    source = Folder(tmp_path, ANY)
    good, bad = split(source)
    assert good == {"a.png": "one", "c.d.webp": "three", "e.png": "four", "sub/b.JPG": "two"} and not bad
    assert [source[index].medium.load().size for index in range(4)] == [(8, 8)] * 4


@pytest.mark.parametrize("columns", [("file_name", "text"), ("image", "caption"), ("filename", "prompt")])
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "captions.csv", "captions.jsonl"])
def test_files_that_list_pictures(tmp_path, name, columns):
    write(tmp_path, {"a.png": picture(1), "sub/b.png": picture(2)})
    rows = [("a.png", 'a "red", round\nthing'), ("./sub/b.png", "b")]
    with (tmp_path / name).open("w", newline="") as stream:
        if name.endswith(".csv"):
            writer = csv.writer(stream)
            writer.writerows([("id", *columns), *((n, *row) for n, row in enumerate(rows))])
        else:
            stream.writelines(json.dumps(dict(zip(columns, row, strict=True))) + "\n\n" for row in rows)
    expected = {"a.png": rows[0][1], "sub/b.png": "b"}
    assert split(Folder(tmp_path, ANY)) == (expected, [])
    if name != "captions.jsonl" or columns[0] == "file_name":
        assert split(open_source([str(tmp_path / name)], ANY)) == (expected, [])


def test_lists_in_folders_inside_name_what_lies_there(tmp_path):
    write(tmp_path, {
        "x/a.png": picture(1), "y/a.png": picture(2), "x/metadata.csv": "file_name,text\na.png,in x\n",
        "y/metadata.csv": "\ufefffile_name;text\r\na.png;in y, as spreadsheets write it\r\n",
    })  # fmt: skip
    assert split(Folder(tmp_path, ANY))[0] == {"x/a.png": "in x", "y/a.png": "in y, as spreadsheets write it"}


def test_columns_that_the_user_names(tmp_path):
    write(tmp_path, {"a.png": picture(), "metadata.csv": "where,text,what\na.png,no,yes\n"})
    with pytest.raises(Emu3Error, match=r"no column with the pictures' file names: it has \['where', 'text', 'what'\]"):
        Folder(tmp_path, ANY)
    assert split(Folder(tmp_path, Columns("where", "what")))[0] == {"a.png": "yes"}


def test_what_a_folder_has_beside_is_told(tmp_path):
    write(tmp_path, {
        "good.png": picture(1), "good.txt": "good", "alone.png": picture(2), "empty.png": picture(3), "empty.txt": " ",
        "orphan.txt": "of no picture", "latin.png": picture(4), "latin.txt": b"caf\xe9",
        "sub/told.png": picture(7), "two.png": picture(5), "two.txt": "one",
        "same.png": picture(6), "same.txt": "the same",
        "metadata.jsonl": "\n".join([
            '{"file_name": "two.png", "text": "another"}', '{"file_name": "same.png", "text": "the same"}',
            '{"file_name": "gone.png", "text": "gone"}', '{"file_name": "../good.png", "text": "out"}', "{broken",
            r'{"file_name": ".\\sub\\told.png ", "text": " "}', '{"file_name": 3, "text": "number"}',
        ]),
    })  # fmt: skip
    good, bad = split(Folder(tmp_path, ANY))
    assert good == {"good.png": "good", "same.png": "the same"}
    for reason in (
        "alone.png has no caption: write a caption beside it", "empty.txt: the caption is empty",
        "orphan.txt: there is no picture of that name", "latin.txt is not UTF-8 text",
        "two.png has two captions, metadata.jsonl line 1 and two.txt", "metadata.jsonl line 3: there is no",
        "'../good.png' is no path below the folder of this file: write it relative",
        "metadata.jsonl line 5: not readable as JSON", "metadata.jsonl line 6: the caption is empty",
        "metadata.jsonl line 7: the name 3 is no text",
    ):  # fmt: skip
        assert [reason in line for line in bad].count(True) == 1, (reason, bad)
    assert len(bad) == 10


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("caption".encode("utf-16"), "is not UTF-8 text: save it in UTF-8"),
        ("caption".encode("utf-16-le"), "the caption has zero characters in it: save it as text in UTF-8"),
        (b"caf\xe9", "is not UTF-8 text"),
        (b" \r\n", "the caption is empty: write one"),
        (b"x" * ((1 << 20) + 1), "1048577 bytes, and at most 1,048,576 are read"),
    ],
)
def test_captions_that_are_no_text(tmp_path, content, reason):
    write(tmp_path, {"a.png": picture(), "a.txt": content, "b.png": picture(), "b.txt": "b"})
    good, bad = split(Folder(tmp_path, ANY))
    assert good == {"b.png": "b"} and len(bad) == 1 and f"{tmp_path / 'a.txt'}" in bad[0] and reason in bad[0]


def test_links_and_pipes_in_a_folder(tmp_path):
    """Links to files are followed, also out of the folder; links to folders are not. Nothing waits for a pipe."""
    write(tmp_path, {"in/a.png": picture(1), "in/a.txt": "a", "out/b.png": picture(2), "out/b.txt": "b"})
    folder = tmp_path / "in"
    for name, target in {
        "link.png": "../out/b.png", "link.txt": "../out/b.txt", "gone.png": "nothing.png", "folder": "../out",
        "loop": ".", "a.png.txt": "nothing.txt",
    }.items():  # fmt: skip
        (folder / name).symlink_to(target)
    for name in ("pipe.png", "waits.txt"):
        os.mkfifo(folder / name)
    write(folder, {"gone.txt": "gone", "pipe.txt": "pipe", "waits.png": picture(3)})
    records = SourceRecords(Folder(folder, ANY), Model(), None)
    said = {}
    for index in range(len(records)):
        try:
            record = records[index]
            said[record.name] = record.text
        except Emu3Error as error:
            said[re.findall(r"(\w+\.\w+)", str(error))[0]] = str(error).split(": ", 1)[1]
    assert said == {
        "a.png": "a", "link.png": "b", "gone.png": "correct the path, or add the file",
        "pipe.png": "it is a pipe or device; give a file", "waits.txt": "it is a pipe or device; give a file",
    }  # fmt: skip


def test_a_caption_with_an_unquoted_comma_is_not_cut(tmp_path):
    write(tmp_path, {"a.png": picture(), "b.png": picture(), "captions.csv": "file,text\na.png,red, round\nb.png,b\n"})
    good, bad = split(Folder(tmp_path, ANY))
    assert good == {"b.png": "b"} and len(bad) == 1
    assert "captions.csv line 2: has 3 fields, the header 2: put captions in double quotes" in bad[0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Captions.CSV", "file_name,text\na.png,a\n"),
        ("list.tsv", "file_name\ttext\na.png\ta, b\n"),
        ("list.csv", "\n \n\ufeffpath;description\n\na.png;a, b\n"),
        ("list.jsonl", '{"filename": "a.png", "caption": "a"}'),
        ("Metadata.JSONL", '{"image": "a.png", "caption": "a"}'),
    ],
)
def test_spellings_of_lists(tmp_path, name, text):
    write(tmp_path, {"a.png": picture(), name: text})
    expected = {"a.png": "a, b" if name.startswith("list.") and "a, b" in text else "a"}
    assert split(open_source([str(tmp_path / name)], ANY)) == (expected, [])
    if not name.startswith("list"):
        assert split(Folder(tmp_path, ANY)) == (expected, [])


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "holds no pictures: give a folder of PNG, JPEG, WebP or other pictures, or one of tar or Parquet files"),
        ({"a.txt": "text", "b.md": "text"}, "holds no pictures"),
        ({"a.png": b"x"}, "no picture has a caption that can be used; the first: .*a.png has no caption"),
        ({"a.png": b"x", "metadata.csv": b"file_name,text\na.png,caf\xe9\n"}, r"metadata.csv line 2 is not UTF-8"),
        ({"a.png": b"x", "metadata.csv": 'file_name,text\na.png,"open\n'}, r"metadata.csv line .*not readable as CSV"),
        ({"a.png": b"x", "metadata.csv": ""}, "no column with the pictures' file names"),
        ({"a.png": b"x", "metadata.jsonl": '{"name": 1}'}, "line 1 has no column with the pictures' file names"),
        ({"a.tar": b"", "b.png": b""}, r"holds 'a.tar' and 'b.png': give the .tar files by name"),
    ],
)
def test_folders_without_captioned_pictures(tmp_path, files, reason):
    write(tmp_path, files)
    with pytest.raises(Emu3Error, match=reason):
        open_source([str(tmp_path)], ANY)


def test_a_folder_of_damaged_names(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(picture(7))
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("latin")
    write(tmp_path, {"u\u0308.png": picture(8), "\u00fc.txt": "one accent, two spellings"})
    good, bad = split(Folder(tmp_path, ANY))
    assert good == {r"caf\udce9.png": "latin", "u\u0308.png": "one accent, two spellings"} and not bad
    records = SourceRecords(Folder(tmp_path, ANY), Model(), None)
    assert [records[index].to_bytes() for index in range(2)]


def test_an_output_inside_the_folder_is_not_looked_at(tmp_path):
    write(tmp_path, {"a.png": picture(), "a.txt": "a", "data/skipped.txt": "b"})
    assert split(Folder(tmp_path, ANY, leave_out=tmp_path / "data")) == ({"a.png": "a"}, [])
    assert len(Folder(tmp_path, ANY)) == 2
    with pytest.raises(Emu3Error, match="is the source itself: choose another directory for the data"):
        open_source([str(tmp_path)], ANY, output=tmp_path / "data" / "..")


def test_the_digest_of_a_folder_is_that_of_its_content(tmp_path):
    files = {"a.png": picture(1), "a.txt": "a", "b.png": picture(2), "b.txt": "b"}
    first = Folder(write(tmp_path / "first", files), ANY).digest
    moved = write(tmp_path / "second", dict(reversed(files.items())))
    assert Folder(moved, ANY).digest == first
    for change in ({"a.txt": "c"}, {"b.png": picture(3, side=30)}, {"c.png": picture(), "c.txt": "c"}, {"d.png": b""}):
        assert Folder(write(moved, change), ANY).digest not in (first, Folder(tmp_path / "first", ANY).digest)
        write(moved, files)
        first_again = moved / next(iter(change))
        if first_again.name not in files:
            for name in change:
                (moved / name).unlink()
    assert Folder(moved, ANY).digest == first


# ---------------------------------------------------------------------------------------------------------- tar files


def test_tar_files(tmp_path):
    one = write_tar(tmp_path / "0.tar", {
        "000.jpg": picture(1, "JPEG"), "000.txt": "zero", "000.json": '{"caption": "not this"}', "000.cls": "7",
        "d/001.png": picture(2), "d/001.json": '{"url": "x", "caption": "one"}', "._000.jpg": b"", "d/.DS_Store": b"",
    })  # fmt: skip
    two = write_tar(
        tmp_path / "1.tar",
        {"b.txt": "b", "./x.y.webp": picture(3, "WEBP"), "./x.y.txt": "dots", "b.png": picture(4)},
    )
    source = Tars([one, two], ANY)
    good, bad = split(source)
    assert good == {"0.tar/000.jpg": "zero", "0.tar/d/001.png": "one", "1.tar/b.png": "b", "1.tar/./x.y.webp": "dots"}
    assert not bad
    for index in range(4):
        assert source[index].medium.load().size == (8, 8)
    assert split(open_source([str(tmp_path)], ANY))[0] == good
    (tmp_path / "data").mkdir()
    assert split(open_source([str(tmp_path)], ANY, output=tmp_path / "data"))[0] == good
    with pytest.raises(Emu3Error, match=r"holds '0\.tar' and 'data': give the \.tar files by name"):
        open_source([str(tmp_path)], ANY)
    assert split(open_source([str(one), str(two)], ANY))[0] == good
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar", "1.tar", "data"]


def test_other_things_in_tar_files(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in {
            "good.png": picture(1), "good.txt": "good", "alone.png": picture(2), "orphan.txt": "text", "LICENSE": "x",
            "model.pkl": b"\x80\x04.", "both.png": picture(3), "both.jpg": picture(3, "JPEG"), "both.txt": "two",
            "none.png": picture(4), "none.json": '{"url": "x"}', "list.png": picture(), "list.json": "[1]",
            "../../out.png": picture(5), "../../out.txt": "names are no paths", "/etc/abs.png": picture(6),
            "/etc/abs.txt": "nor these",
        }.items():  # fmt: skip
            add(tar, name, content)
        add(tar, "good.txt", "again")
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        sparse = tarfile.TarInfo("sparse.png")
        sparse.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 40)}
        tar.addfile(sparse)
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    good, bad = split(Tars([path], ANY))
    assert good == {
        "x.tar/good.png": "good", "x.tar/../../out.png": "names are no paths", "x.tar//etc/abs.png": "nor these",
    }  # fmt: skip
    for reason in (
        "'alone.png': there is no caption", "'orphan.txt': it is a caption without a picture",
        "'LICENSE': it is neither", "'model.pkl': it is neither",
        "'both.png', 'both.jpg', 'both.txt': there are two pictures of one name",
        "none.json has no column with captions: it has ['url']", "list.json: [1] is no object",
        "'good.txt' is in it twice", "'link.png' is no plain file",
        "'sparse.png' is no plain file",
    ):  # fmt: skip
        assert [reason in line for line in bad].count(True) == 1, (reason, bad)
    assert len(bad) == 10


def test_damaged_tar_files(tmp_path):
    good = write_tar(
        tmp_path / "good.tar", {"a.png": picture(side=200), "a.txt": "a", "b.png": picture(), "b.txt": "b"}
    )
    data = good.read_bytes()
    second = data.index(b"b.png")
    cases = {
        "gz": (b"\x1f\x8b" + data, "is compressed"), "text": (b"hello" * 300, "is no tar file"),
        "empty": (b"", "no tar"), "cut": (data[:700], "is cut off in 'a.png'"),
        "zero": (bytes(10240), "no picture in it has a caption"),
        "joined": (data + data, "goes on after its end, as tar files that were joined do: give them one by one"),
        "middle": (data[:second] + b"\xff" * 512 + data[second + 512 :], f"is damaged at byte {second}"),
    }  # fmt: skip
    for name, (content, reason) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Emu3Error, match=reason) as error:
            Tars([tmp_path / name], ANY)
        assert str(tmp_path / name) in str(error.value)
    header = bytearray(data[:512])
    header[124:136] = b"77777777777\0"  # 8 GB
    header[156:157] = b"x"  # of an extended header
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "bomb").write_bytes(bytes(header) + data)
    with pytest.raises(Emu3Error, match="a header of 8589934592 bytes"):
        Tars([tmp_path / "bomb"], ANY)


# ------------------------------------------------------------------------------------------------------- tables


def write_parquet(path: pathlib.Path, rows: list[dict], **options) -> pathlib.Path:
    pa = pytest.importorskip("pyarrow", reason="the extra `data` installs PyArrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def cell(colour: int, name: str | None = None) -> dict[str, object]:
    """A picture as `datasets` writes it."""
    return {"bytes": picture(colour), "path": name}


def test_parquet_files(tmp_path):
    one = write_parquet(
        tmp_path / "0.parquet",
        [{"image": cell(n, f"{n}.png"), "caption": f"colour {n}", "n": n} for n in range(10)],
        row_group_size=3,
    )
    two = write_parquet(
        tmp_path / "1.parquet", [{"jpg": picture(10 + n), "said": f"colour {10 + n}"} for n in range(5)]
    )
    source = open_source([str(tmp_path)], ANY)
    assert len(source) == 15
    records = SourceRecords(source, Model(), None)
    order = [*range(15), *range(0, 15, 4)]
    with ThreadPoolExecutor(4) as pool:  # rows that lie in different groups
        found = list(pool.map(records.__getitem__, order))
    assert [int(record.codes[0, 0]) for record in found] == order
    assert [record.text for record in found] == [f"colour {n}" for n in order]
    assert [source[n].name for n in (3, 9, 10)] == ["0.parquet row 3", "0.parquet row 9", "1.parquet row 0"]
    assert len(source._tables) <= 2
    assert open_source([str(one), str(two)], ANY).digest == source.digest
    assert open_source([str(two), str(one)], ANY).digest != source.digest


def test_rows_that_cannot_be_used(tmp_path):
    write_parquet(tmp_path / "a.parquet", [
        {"image": cell(1), "text": "good"}, {"image": cell(2), "text": None}, {"image": cell(3), "text": " "},
        {"image": {"bytes": None, "path": "/etc/hostname"}, "text": "path"}, {"image": None, "text": "none"},
        {"image": {"bytes": b"x", "path": None}, "text": "broken"},
    ])  # fmt: skip
    records = SourceRecords(open_source([str(tmp_path / "a.parquet")], ANY), Model(), None)
    assert records[0].text == "good"
    reasons = ["row 1: caption is None", "row 2: the caption is empty", "row 3: there are no bytes of a picture"]
    for index, reason in enumerate([*reasons, "row 4: there are no bytes", "row 5 is not a picture"], start=1):
        with pytest.raises(Emu3Error) as error:
            records[index]
        assert str(tmp_path / "a.parquet") in str(error.value) and reason in str(error.value)


def test_columns_of_tables(tmp_path):
    row = {"a": picture(1), "b": picture(2), "c": "see", "d": "dee", "n": 1}
    path = str(write_parquet(tmp_path / "a.parquet", [row]))
    with pytest.raises(Emu3Error, match=r"columns \['a', 'b'\] may hold pictures: name one with --image-column"):
        open_source([path], ANY)
    with pytest.raises(Emu3Error, match=r"columns \['c', 'd'\] may hold captions: name one with --text-column"):
        open_source([path], Columns("a"))
    with pytest.raises(Emu3Error, match=r"column 'n' cannot hold captions: it is int64"):
        open_source([path], Columns("a", "n"))
    with pytest.raises(Emu3Error, match=r"column 'z' cannot hold pictures: there is none of that name"):
        open_source([path], Columns("z", "n"))
    assert open_source([path], Columns("b", "d"))[0].text == "dee"


def test_types_of_columns(tmp_path):
    """Texts as pandas writes categories, long and short kinds of text and bytes."""
    pa = pytest.importorskip("pyarrow", reason="the extra `data` installs PyArrow")
    import pyarrow.parquet as pq

    texts = pa.array(["one", "two", "one"])
    for pictures, captions in (
        (pa.binary(), texts.dictionary_encode()),
        (pa.large_binary(), texts.cast(pa.large_string())),
        (pa.binary_view(), texts.cast(pa.string_view())),
    ):
        table = {"image": pa.array([picture(n) for n in range(3)], pictures), "text": captions}
        pq.write_table(pa.table(table), tmp_path / "a.parquet")
        source = open_source([str(tmp_path / "a.parquet")], ANY)
        assert [source[n].text for n in range(3)] == ["one", "two", "one"]
        assert [source[n].medium.load().getpixel((0, 0))[0] for n in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"n": 1}], r"no column holds pictures: it has \['n'\]; add one of bytes"),
        ([{"image": b"x", "n": 1}], r"no column holds captions: it has \['image', 'n'\]; add one of text"),
        ([], "no column"),
    ],
)
def test_tables_without_captioned_pictures(tmp_path, rows, reason):
    path = write_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(Emu3Error, match=reason):
        open_source([str(path)], ANY)


def test_damaged_tables(tmp_path):
    good = write_parquet(tmp_path / "a.parquet", [{"image": cell(n), "text": str(n)} for n in range(20)])
    data = good.read_bytes()
    for content in (b"", b"PAR1", data[:-9], data[:300], data[:-40] + bytes(40)):
        good.write_bytes(content)
        with pytest.raises(Emu3Error, match=r"a\.parquet"):
            open_source([str(good)], ANY)


# ------------------------------------------------------------------------------------------------------------ the hub

CONFIGURATIONS = b"""---
configs:
- {config_name: first, data_files: a.csv}
- {config_name: second, data_files: b.csv}
---
"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """Stands in for the hub: the requests that `datasets` makes for data sets that are not gated."""

    def do_GET(self):
        sets, path = self.server.sets, urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            if found[1] in sets:
                files = [{"rfilename": name} for name in sets[found[1]]]
                return self.answer({"id": found[1], "sha": COMMIT, "private": False, "tags": [], "siblings": files})
        elif found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/[^/]+(?:/(.+))?", path):
            everything = "recursive=true" in self.path.lower()
            return self.answer(tree(sets[found[1]], found[2] or "", everything))
        elif found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            if found[1] in sets and found[2] in sets[found[1]]:
                return self.answer(sets[found[1]][found[2]])
            if found[1] in sets:
                return self.refuse("EntryNotFound")
        return self.refuse("RepoNotFound")

    do_HEAD = do_GET

    def answer(self, content) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def tree(files: dict[str, bytes], under: str, everything: bool) -> list[dict[str, object]]:
    """The hub's listing of a folder."""
    inside = {name: data for name, data in files.items() if not under or name.startswith(f"{under}/")}
    tails = {name: name[len(under) + bool(under) :] for name in inside}
    folders = {name[: len(name) - len(tail)] + tail.split("/")[0] for name, tail in tails.items() if "/" in tail}
    entries = [{"type": "directory", "path": name, "oid": COMMIT, "size": 0} for name in sorted(folders)]
    return entries + [
        {"type": "file", "path": name, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}
        for name, data in inside.items()
        if everything or "/" not in tails[name]
    ]


HUB = """
    import sys
    from emu3_jax import Emu3Error
    from emu3_jax.data.sources.opening import open_source
    from emu3_jax.data.sources.tables import Columns

    for place in sys.argv[1:]:
        try:
            source = open_source([place], Columns())
            print(place, source.digest[:8], [source[n].text for n in range(len(source))])
            print([source[n].medium.load().getpixel((0, 0))[0] for n in range(len(source))])
        except Emu3Error as error:
            print("ERROR", error)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Runs a program against the stand-in, with a cache of its own; returns its lines."""
    pytest.importorskip("datasets", reason="the extra `data` installs datasets")
    root = tmp_path_factory.mktemp("hub")
    shards = {}
    for name, first in (("train", 0), ("test", 5)):
        rows = [{"image": cell(first + n, "x.png"), "caption": f"{name} {n}"} for n in range(3)]
        shards[f"data/{name}-00000-of-00001.parquet"] = write_parquet(root / "x.parquet", rows).read_bytes()
    away = [{"image": {"bytes": None, "path": "/etc/hostname"}, "text": "a"}, {"image": cell(1), "text": "b"}]
    photos = {f"train/{n}.png": picture(n) for n in range(2)}
    sets = {
        "org/shards": {"README.md": b"---\nlicense: cc0-1.0\n---\n", **shards},
        "org/photos": {"train/metadata.csv": b"file_name,text\n0.png,zero\n1.png,one\n", **photos},
        "org/away": {"data/train.parquet": write_parquet(root / "x.parquet", away).read_bytes()},
        "org/numbers": {"data/train.parquet": write_parquet(root / "x.parquet", [{"n": 1}]).read_bytes()},
        "org/nothing": {"README.md": b"a card without data or fields"},
        "org/two": {"README.md": CONFIGURATIONS, "a.csv": b"x\n1\n", "b.csv": b"x\n1\n"},
    }
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.sets = sets
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(*places: str, **environment: str) -> list[str]:
        settings = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(root / "home")}
        settings |= {"HF_HUB_OFFLINE": "0", "PYTHONPATH": str(pathlib.Path(__file__).parent.parent), **environment}
        command = [sys.executable, "-c", textwrap.dedent(HUB), *places]
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=True)
        assert not done.stderr, done.stderr
        return done.stdout.splitlines()

    yield ask
    server.shutdown()
    server.server_close()


def test_data_sets_of_the_hub(hub):
    lines = hub("hf:org/shards", "hf:org/shards:test", "hf:org/photos", "hf:org/shards", "hf:org/shards:default:train")
    texts = [line.split(" ", 2)[2] for line in lines[::2]]
    train, test = (str([f"{name} {n}" for n in range(3)]) for name in ("train", "test"))
    assert texts == [train, test, "['zero', 'one']", train, train]
    assert lines[1::2] == ["[0, 1, 2]", "[5, 6, 7]", "[0, 1]", "[0, 1, 2]", "[0, 1, 2]"]
    digests = [line.split(" ")[1] for line in lines[::2]]
    assert digests[0] == digests[3] == digests[4] and len(set(digests)) == 3
    # What was downloaded is there without the hub.
    assert hub("hf:org/shards", HF_HUB_OFFLINE="1") == lines[:2]


def test_a_full_disk_while_downloading():
    pytest.importorskip("datasets", reason="the extra `data` installs datasets")
    from emu3_jax.data.sources.hub import _explained

    with pytest.raises(Emu3Error, match=r"hf:a: the disk is full .*: free space, or set HF_HOME"), _explained("hf:a"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_data_sets_that_cannot_be_had(hub):
    places = [
        "org/none",
        "org/shards:dev",
        "org/numbers",
        "org/nothing",
        "org/two",
        "org/away",
        "../x",
        "a:b:c:d",
        "x/y:",
    ]
    lines = hub(*(f"hf:{place}" for place in places))
    for line, reason in zip(lines, (
        "ERROR hf:org/none: the hub has no such data set, or it is private",
        "ERROR hf:org/shards has no split 'dev': it has ['train', 'test']",
        "ERROR hf:org/numbers: no column holds pictures: it has ['n']",
        "ERROR hf:org/nothing: The directory at hf://datasets/org/nothing@",
        "ERROR hf:org/two: Config name is missing. Please pick one among the available configs: ['first', 'second']",
        "hf:org/away", "ERROR", "ERROR", "ERROR", "ERROR",
    ), strict=True):  # fmt: skip
        assert line.startswith(reason), (line, reason)
    assert "there are no bytes of a picture in this row" in lines[6]  # a file here is none of the hub's
    assert "give files that you downloaded" in lines[3] and "hf:NAME:CONFIG:SPLIT" in lines[4]
    assert all("is no name of a hub data set" in line for line in lines[7:])
    (line,) = hub("hf:org/else", HF_HUB_OFFLINE="1")
    assert line == "ERROR hf:org/else: HF_HUB_OFFLINE is set, and it was not downloaded before: unset the variable"
    with socket.socket() as free:  # nobody listens there
        free.bind(("127.0.0.1", 0))
        (line,) = hub("hf:org/photos", HF_ENDPOINT=f"http://127.0.0.1:{free.getsockname()[1]}")
    assert line.startswith("ERROR hf:org/photos: the hub cannot be reached (") and "set HF_ENDPOINT" in line


# ------------------------------------------------------------------------------------------------- conversations


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


def test_conversations(tmp_path):
    write(tmp_path, {"images/coco/1.png": picture(1)})
    objects = [
        {
            "id": "000",
            "image": "coco/1.png",
            "conversations": turns('<image>\nWhat "is" {this}?', "A [dog].", "Sure?", "Yes"),
        },
        {"id": 7, "conversations": turns("Hello", "Hi")},
        {"id": "2", "image": ["coco/1.png"], "conversations": turns("Where\n<image>", "There \\")},
    ]
    (tmp_path / "a.json").write_text(json.dumps(objects, indent=1))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in objects))
    for name in ("a.json", "a.jsonl"):
        source = open_source([str(tmp_path / name)], ANY, images=tmp_path / "images")
        assert isinstance(source, Conversations) and len(source) == 3
        first, second, third = (source[index] for index in range(3))
        assert [turn.text for turn in first.conversation] == ['What "is" {this}?', "A [dog].", "Sure?", "Yes"]
        assert [turn.role for turn in first.conversation] == ["user", "assistant"] * 2
        assert first.name == "000" and first.medium.path == tmp_path / "images/coco/1.png"
        assert first.medium == third.medium and second.medium is None
        assert [turn.text for turn in third.conversation] == ["Where", "There \\"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"conversations": "hi"}, "conversations is 'hi': it must be a list of turns"),
        ({"conversations": [{"from": "system", "value": "x"}]}, "is not from human or gpt"),
        ({"conversations": turns("<image>\nwhat", "this")}, "a turn shows <image>, and the object names none"),
        ({"image": ["a", "b"], "conversations": turns("a", "b")}, "has several pictures"),
        ({"image": ["a"], "video": "b", "conversations": turns("a", "b")}, "has several pictures"),
        ({"image": [3], "conversations": turns("a", "b")}, "the name 3 is no text"),
        ({"image": "a", "conversations": turns("<image> <image>", "b")}, "its turns have 2 pictures"),
        ({"image": "../a.png", "conversations": turns("a", "b")}, "does not name a file below its directory"),
        ({"image": "/a.png", "conversations": turns("a", "b")}, "does not name a file below its directory"),
        ({"conversations": turns("a")}, "has 1 turns: it must end with an answer"),
        ({"conversations": turns("a", "b")[::-1]}, "'user' belongs there"),
        ({"conversations": [{"from": "human", "value": 3}]}, "value is 3: it must be text"),
    ],
)
def test_objects_that_are_no_conversations(tmp_path, line, reason):
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": turns("a", "b")}, line]))
    source = Conversations(tmp_path / "a.json")
    assert source[0].conversation
    with pytest.raises(Emu3Error) as error:
        source[1]
    assert str(error.value).startswith(f"{tmp_path / 'a.json'} object 1: ") and reason in str(error.value)


def test_where_conversations_have_their_pictures(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": turns("a", "b")}]))
    with pytest.raises(Emu3Error, match=r"gone is no folder: give --images the folder where the paths"):
        open_source([str(tmp_path / "a.json")], ANY, images=tmp_path / "gone")
    write(tmp_path, {"a.png": picture(), "a.txt": "a"})
    with pytest.raises(Emu3Error, match=r"--images is for LLaVA's JSON alone"):
        open_source([str(tmp_path)], ANY, images=tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "[1]", '[{"a": 1}', '[{"a": 1}] x', '{"a": [{}]}', '"[{}]"', "[[1]", "]", "}["],
)
def test_lists_that_are_none(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(Emu3Error, match=r"a\.json") as error:
        Conversations(tmp_path / "a.json")
    assert "as LLaVA's are" in str(error.value)


# ---------------------------------------------------------------------------------------------------------- all kinds


@pytest.mark.parametrize("name", ["x.tar", "metadata.csv", "metadata.jsonl", "x.json", "x.parquet"])
def test_mutated_files_give_examples_or_one_line(tmp_path, name):
    write(tmp_path, {"a.png": picture(1)})
    file, talk = tmp_path / name, {"image": "a.png", "conversations": turns('<image>\n"q" {[', "a\\")}
    if name.endswith(".tar"):
        write_tar(file, {"a.png": picture(1), "a.txt": "a", "é" * 120 + ".jpg": picture(2), "é" * 120 + ".json": "{}"})
    elif name.endswith(".parquet"):
        write_parquet(file, [{"image": cell(n, "x"), "text": f"t{n}"} for n in range(30)], row_group_size=7)
    else:
        row = {"file_name": "a.png", "text": "x", "n": [1, {"a": 2}]}
        text = {"metadata.csv": 'file_name,text\na.png,"hello, ""you"" there"\r\n', "x.json": json.dumps([talk] * 3)}
        file.write_text(text.get(name, f"{json.dumps(row)}\n" * 2))
    good, mutate = file.read_bytes(), random.Random(0)
    for _ in range(150):
        data = bytearray(good)
        for _ in range(mutate.randint(1, 5)):
            place = mutate.randrange(len(data) + 1)
            cut, added = (
                mutate.choice([0, 1, 1, 5, 512]),
                mutate.choice([b"", b"\0", b"\xff", b'"', b"\\", b"7" * 11, good]),
            )
            data[place : place + cut] = added[:512]
        file.write_bytes(data)
        try:
            source = open_source([str(file)], ANY)
            for index in range(min(len(source), 50)):
                try:
                    example = source[index]
                    example.identity()
                    if example.medium is not None:
                        example.medium.load()
                except Emu3Error:
                    pass
        except Emu3Error as error:
            assert name in str(error) or "a.png" in str(error)


# ------------------------------------------------------------------------------------------------------------ records


def test_records_of_a_folder(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.new("RGB", (8, 8), (9, 0, 0))
    turned.paste((5, 6, 0), (0, 4, 4, 8))  # bottom left, which orientation 6 shows at the top left
    turned.save(tmp_path / "turned.png", exif=exif)
    write(tmp_path, {"turned.txt": "turned", "broken.png": picture()[:50], "broken.txt": "broken"})
    records = SourceRecords(Folder(tmp_path, ANY), Model(), None)
    np.testing.assert_array_equal(records[1].codes, [[5, 6]])
    assert records[1].text == "turned"
    with pytest.raises(Emu3Error, match=r"^cannot read .*broken\.png"):
        records[0]
    records.check(0)  # before it is read, nothing is known
    write(tmp_path, {"\x1b \n.png": b"no picture", "\x1b \n.txt": "named to move the cursor"})
    with pytest.raises(Emu3Error) as error:
        SourceRecords(Folder(tmp_path, ANY), Model(), None)[0]
    assert (
        str(error.value)
        == rf"{tmp_path}/\x1b .png is not a picture that can be read: give a PNG, JPEG, WebP or the like"
    )


def test_several_sources_that_are_no_shards(tmp_path):
    write(tmp_path, {"a.csv": "x", "b.csv": "x", "c.tar": "", "d.tgz": "x"})
    with pytest.raises(Emu3Error, match="2 sources were given: several must be tar or Parquet files"):
        open_source([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")], ANY)
    with pytest.raises(Emu3Error, match="2 sources were given"):
        open_source([str(tmp_path / "a.csv"), str(tmp_path / "c.tar")], ANY)
    with pytest.raises(Emu3Error, match="is compressed: unpack it"):
        open_source([str(tmp_path / "d.tgz")], ANY)
    with pytest.raises(Emu3Error, match="there is no such file"):
        open_source([str(tmp_path / "gone")], ANY)
    (tmp_path / "e.JPG").touch()
    with pytest.raises(Emu3Error, match=r"e\.JPG is a picture: give the folder that holds it"):
        open_source([str(tmp_path / "e.JPG")], ANY)


def test_packed_names():
    packed = PackedNames()
    names = ["a", "", "\udce9", "日本"]
    for name in names:
        packed.append(name)
    assert len(packed) == 4 and [packed[index] for index in range(4)] == names


# --------------------------------------------------------------------------------------------------------- validation


@pytest.fixture
def coloured(tmp_path):
    """A folder of 60 pictures, and a function that gives the names for validation of a source."""
    for number in range(60):
        write(tmp_path / "in", {f"{number}.png": picture(number), f"{number}.txt": f"colour {number}"})

    def held_out(source, share=0.3, **options) -> set[int]:
        train, validation = divide(SourceRecords(source, Model(), None), share, **options)
        sides = [{int(record[index].codes[0, 0]) for index in range(len(record))} for record in (train, validation)]
        assert not sides[0] & sides[1] and sides[0] | sides[1] == set(range(60))
        return sides[1]

    return tmp_path / "in", held_out


def test_the_number_of_threads_is_checked(coloured):
    with pytest.raises(Emu3Error, match="workers is 0: it must be 1 to 1024"):
        divide(SourceRecords(Folder(coloured[0], ANY), Model(), None), 0.3, workers=0)


def test_a_picture_is_always_on_the_same_side(coloured, tmp_path):
    folder, held_out = coloured
    expected = held_out(Folder(folder, ANY))
    assert 5 < len(expected) < 35
    assert held_out(Folder(folder, ANY), workers=1) == expected
    names = list(range(60))
    random.Random(0).shuffle(names)
    renamed = {
        f"{place}{end}": (folder / f"{n}{end}").read_bytes()
        for place, n in enumerate(names)
        for end in (".png", ".txt")
    }
    assert held_out(Folder(write(tmp_path / "renamed", renamed), ANY)) == expected
    assert held_out(Tars([write_tar(tmp_path / "x.tar", renamed)], ANY)) == expected
    lines = [{"image": str(folder / f"{n}.png"), "text": f"{caption} of {n}"} for n in names for caption in "ab"]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert held_out(open_source([str(tmp_path / "m.jsonl")], ANY)) == expected  # both captions of a picture
    assert held_out(Folder(folder, ANY), share=0.1) < expected < held_out(Folder(folder, ANY), share=0.6)


@pytest.mark.parametrize(("share", "reason"), [
    (0, "must be a share between 0 and 1"), (1, "must be a share"), (float("nan"), "must be a share"),
    (1e-9, "none of 60 records falls to validation; choose a larger share"),
    (1 - 1e-9, "none of 60 records falls to training; choose a smaller share"),
])  # fmt: skip
def test_shares_that_are_none(coloured, share, reason):
    with pytest.raises(Emu3Error, match=reason):
        divide(SourceRecords(Folder(coloured[0], ANY), Model(), None), share)


# ---------------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Eight photographs with captions, and what a folder of a person's has beside."""
    root = tmp_path_factory.mktemp("photos")
    with Image.open(GOLDEN / "photo.png") as photo:
        photo = photo.convert("RGB")
        for number in range(8):
            photo.crop((4 * number, 0, 4 * number + 40, 40)).save(root / f"{number}.jpg")
            (root / f"{number}.txt").write_text(f"part {number}")
    return root


def test_from_photos_to_data(photos, tmp_path, capsys):
    write(photos, {"broken.jpg": b"\xff\xd8\xff", "broken.txt": "broken", "alone.png": picture()})
    command = ["prepare", str(photos), "-o", str(tmp_path / "data"), "--validation", "0.3", "--quiet"]
    assert main(command) == 0
    said = capsys.readouterr().out
    train, validation = PreparedData(tmp_path / "data"), PreparedData(tmp_path / "data/validation")
    assert len(train) + len(validation) == 8
    texts = [data[index].text for data in (train, validation) for index in range(len(data))]
    assert sorted(texts) == [f"part {number}" for number in range(8)]
    listed = (tmp_path / "data/skipped.txt").read_text().splitlines()
    assert len(listed) == 2 and not (tmp_path / "data/validation/skipped.txt").exists()
    assert "alone.png has no caption" in listed[0] and "broken.jpg" in listed[1]
    assert f"2 skipped, listed in {tmp_path / 'data/skipped.txt'}" in said and f"skipped: {listed[0]}" in said
    before = (tmp_path / "data/index.json").read_bytes()
    assert main(command) == 0  # it is all there
    assert (tmp_path / "data/index.json").read_bytes() == before
    (photos / "0.txt").write_text("other")
    assert main(command) == 2
    assert "holds data prepared from another source" in capsys.readouterr().err
    (photos / "0.txt").write_text("part 0")
    assert main([*command[:-3], "--quiet", "--on-error", "stop", "-o", str(tmp_path / "other")]) == 2
    assert "alone.png has no caption" in capsys.readouterr().err and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "the following arguments are required|one of the arguments"),
        (["{empty}"], "holds no pictures"),
        (["{empty}/gone"], "there is no such file"),
        (["gs://bucket/photos"], "gs:// addresses are not supported"),
        (["{photos}", "{empty}"], "2 sources were given"),
        (["{photos}", "--validation", "2"], "must be a share between 0 and 1"),
        (["{photos}", "--validation", "x"], "invalid float value"),
    ],
)
def test_bad_input_is_one_line(arguments, reason, photos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    arguments = [text.format(empty=tmp_path / "empty", photos=photos) for text in arguments]
    try:
        code = main(["prepare", *arguments, "-o", str(tmp_path / "out")])
    except SystemExit as ended:  # where the arguments themselves are wrong
        code = ended.code
    assert code == 2
    said = capsys.readouterr().err
    assert any(word in said for word in reason.split("|")), said
    assert said.strip().splitlines()[-1].startswith("emu3-jax") and not (tmp_path / "out").exists()


def test_heic_without_what_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "_heic_is_read", lambda: False)
    write(tmp_path, {"a.heic": b"\0\0\0\x18ftypheic", "a.txt": "a", "b.png": picture(), "b.txt": "b"})
    with pytest.raises(Emu3Error, match=r"has 1 HEIC pictures. HEIC pictures need pillow-heif.*emu3-jax\[heic\]"):
        Folder(tmp_path, ANY)
    with pytest.raises(Emu3Error, match="HEIC pictures need pillow-heif"):
        images.load_image(tmp_path / "a.heic")
    assert folders.NAMES[0] == "metadata.jsonl"


def test_without_pyarrow(tmp_path, monkeypatch):
    write_files = write(tmp_path, {"a.parquet": b"PAR1"})
    for name in ("arrow", "hub"):
        monkeypatch.delitem(sys.modules, f"emu3_jax.data.sources.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for place in (str(write_files / "a.parquet"), "hf:org/name"):
        with pytest.raises(Emu3Error, match=r"pyarrow, which is not installed: pip install 'emu3-jax\[data\]'"):
            open_source([place], ANY)


def test_the_photographs(tmp_path):
    """`scripts/photos.py`: 24 photographs, all captioned, that `prepare` takes, of pictures that are free."""
    skimage = pytest.importorskip("skimage", reason="the extra `photos` installs scikit-image")
    script = pathlib.Path(__file__).parent.parent / "scripts" / "photos.py"
    pieces = runpy.run_path(str(script))["PHOTOS"]
    fetchers = ast.parse((pathlib.Path(skimage.__file__).parent / "data" / "_fetchers.py").read_text())
    said = {  # what the function that loads a picture says of it
        name: ast.get_docstring(function)
        for function in fetchers.body
        if isinstance(function, ast.FunctionDef)
        for name in re.findall(r"data/([\w.]+)", ast.unparse(function.body[-1]))
    }
    for _, file, *_ in pieces:
        assert re.search(r"CC0|public\s+domain|[Nn]o known copyright", said[file]), file
    subprocess.run([sys.executable, str(script), str(tmp_path / "photos")], check=True)
    good, bad = split(Folder(tmp_path / "photos", ANY))
    assert len(good) == len(set(good.values())) == 24 and not bad
    for name in good:
        with Image.open(tmp_path / "photos" / name) as photo:
            assert photo.size == (256, 256)


def test_heic(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif", reason="the extra `heic` installs pillow-heif")
    pillow_heif.register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = 6  # of phones that are held upright
    picture = Image.new("RGB", (64, 32), "red")
    picture.paste("blue", (0, 0, 32, 32))
    picture.save(tmp_path / "IMG_1.HEIC", exif=exif.tobytes())
    (tmp_path / "IMG_1.txt").write_text("half of it is blue")
    (tmp_path / "broken.heic").write_bytes((tmp_path / "IMG_1.HEIC").read_bytes()[:-100])
    (tmp_path / "broken.txt").write_text("cut off")
    source = Folder(tmp_path, ANY)
    image = source[0].medium.load()
    assert image.size == (32, 64)
    assert image.getpixel((16, 8))[2] > 200 and image.getpixel((16, 56))[0] > 200
    with pytest.raises(Emu3Error, match=r"broken\.heic"):
        source[1].medium.load()

"""Sources of captioned pictures that lie in other files: tar files, Parquet, data sets of the hub."""

import errno
import hashlib
import http.server
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import tarfile
import textwrap
import threading
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import pytest
from captioned import ANY, Model, add, cell, picture, split, write_parquet, write_tar

from emu3_jax import Emu3Error
from emu3_jax.data.sources.opening import open_source
from emu3_jax.data.sources.records import SourceRecords
from emu3_jax.data.sources.tables import Columns
from emu3_jax.data.sources.tars import Tars

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
        "'both.png', 'both.jpg', 'both.txt': two pictures have the same name",
        "none.json has no column with captions: its columns are ['url']", "list.json: [1] is not an object",
        "'good.txt' is in it twice", "'link.png' is not a regular file",
        "'sparse.png' is not a regular file",
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
        "gz": (b"\x1f\x8b" + data, "is compressed"), "text": (b"hello" * 300, "is not a readable tar file"),
        "empty": (b"", "not a readable tar"), "cut": (data[:700], "is cut off in 'a.png'"),
        "zero": (bytes(10240), "no picture in it has a caption"),
        "joined": (data + data, "consists of several tar files joined together: split it, and give each one"),
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
    reasons = ["row 1: caption is None", "row 2: the caption is empty", "row 3: this row has no picture"]
    for index, reason in enumerate([*reasons, "row 4: this row has no picture", "row 5 is not a picture"], start=1):
        with pytest.raises(Emu3Error) as error:
            records[index]
        assert str(tmp_path / "a.parquet") in str(error.value) and reason in str(error.value)


def test_columns_of_tables(tmp_path):
    row = {"a": picture(1), "b": picture(2), "c": "see", "d": "dee", "n": 1}
    path = str(write_parquet(tmp_path / "a.parquet", [row]))
    with pytest.raises(Emu3Error, match=r"columns \['a', 'b'\] can hold pictures: name one with --image-column"):
        open_source([path], ANY)
    with pytest.raises(Emu3Error, match=r"columns \['c', 'd'\] can hold captions: name one with --text-column"):
        open_source([path], Columns("a"))
    with pytest.raises(Emu3Error, match=r"column 'n' cannot hold captions: it is int64"):
        open_source([path], Columns("a", "n"))
    with pytest.raises(Emu3Error, match=r"column 'z' cannot hold pictures: it does not exist"):
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
        ([{"n": 1}], r"no column holds pictures: its columns are \['n'\]; add a column of bytes"),
        ([{"image": b"x", "n": 1}], r"no column holds captions: its columns are .*; add a column of text"),
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
        "ERROR hf:org/none: this data set does not exist or is private",
        "ERROR hf:org/shards has no split 'dev': it has ['train', 'test']",
        "ERROR hf:org/numbers: no column holds pictures: its columns are ['n']",
        "ERROR hf:org/nothing: The directory at hf://datasets/org/nothing@",
        "ERROR hf:org/two: Config name is missing. Please pick one among the available configs: ['first', 'second']",
        "hf:org/away", "ERROR", "ERROR", "ERROR", "ERROR",
    ), strict=True):  # fmt: skip
        assert line.startswith(reason), (line, reason)
    assert "this row has no picture" in lines[6]  # a file here is none of the hub's
    assert "give files that you downloaded" in lines[3] and "hf:NAME:CONFIG:SPLIT" in lines[4]
    assert all("is not a legal name of a hub data set" in line for line in lines[7:])
    (line,) = hub("hf:org/else", HF_HUB_OFFLINE="1")
    assert line == "ERROR hf:org/else: not downloaded yet, and HF_HUB_OFFLINE is set: unset the variable"
    with socket.socket() as free:  # nobody listens there
        free.bind(("127.0.0.1", 0))
        (line,) = hub("hf:org/photos", HF_ENDPOINT=f"http://127.0.0.1:{free.getsockname()[1]}")
    assert line.startswith("ERROR hf:org/photos: the hub cannot be reached (") and "set HF_ENDPOINT" in line

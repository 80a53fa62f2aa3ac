"""Files of codes: names, bounds that headers are held to, and members that are no arrays."""

import os
import pathlib
import zipfile
from pathlib import Path

import numpy as np
import pytest

from emu3_jax.errors import Emu3Error
from emu3_jax.media import codes as module
from emu3_jax.media.codes import code_names, load_codes, save_codes

CORPUS = pathlib.Path(__file__).parent / "corpus"
ONE = np.zeros((2, 3), np.int32)


def npy(header: str, data: bytes = b"", version: int = 1) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2 if version == 1 else 4, "little") + text + data


def header(shape="(2, 3)", descr="'<i4'", order="False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}"


def write(path, members, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize(
    "name", ["a", "file", "file.png", "allow_pickle", "allow_pickle.png", "args", "arr_0", "é 日本", "x.npy"]
)
def test_arrays_of_any_name(tmp_path, name):
    """`np.savez` takes some of these for its own arguments."""
    arrays = {name: np.arange(6, dtype=np.int32).reshape(2, 3), "other": np.zeros((1, 2, 3), np.int32)}
    save_codes(tmp_path / "x.npz", arrays)
    for found in (load_codes(tmp_path / "x.npz"), dict(np.load(tmp_path / "x.npz"))):
        assert list(found) == list(arrays)
        for key, array in arrays.items():
            assert found[key].dtype == np.int32
            np.testing.assert_array_equal(found[key], array)


def test_files_are_those_of_numpy(tmp_path):
    save_codes(tmp_path / "x.npz", {"a": ONE})
    np.savez(tmp_path / "y.npz", a=ONE)
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "y.npz").read_bytes()


def test_every_way_that_numpy_writes_is_read(tmp_path):
    array = np.arange(24).reshape(2, 3, 4)
    np.savez_compressed(
        tmp_path / "x.npz", a=array, f=np.asfortranarray(array), b=array.astype(">i2"), u=array.astype("u1")
    )
    for found in load_codes(tmp_path / "x.npz").values():
        np.testing.assert_array_equal(found, array)
        assert found.flags.writeable
    write(
        tmp_path / "y.npz", {"v2.npy": npy(header(), b"\1\0\0\0" * 6, 2), "v3.npy": npy(header(), b"\1\0\0\0" * 6, 3)}
    )
    for found in load_codes(tmp_path / "y.npz").values():
        np.testing.assert_array_equal(found, np.ones((2, 3)))


@pytest.mark.parametrize(
    "name", ["../../escaped", "/tmp/escaped", "a/b", "a\\b", "..", ".", "", "a\nb", "\x1b[2Jx", "nul", "x" * 300]
)
def test_names_that_are_refused(tmp_path, name):
    write(tmp_path / "x.npz", {f"{name}.npy": npy(header(), bytes(24))})
    with pytest.raises(Emu3Error, match=r"x\.npz: the name ") as error:
        load_codes(tmp_path / "x.npz")
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "names", [("a.npy", "A.npy"), ("a.npy", "a"), ("é.npy", "e\u0301.npy"), ("STRASSE.npy", "straße.npy")]
)
def test_names_of_one_file(tmp_path, names):
    write(tmp_path / "x.npz", {name: npy(header(), bytes(24)) for name in names})
    with pytest.raises(Emu3Error, match=r"x\.npz: .* and .* would become one file: rename one"):
        load_codes(tmp_path / "x.npz")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_twice(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for _ in range(2):
            archive.writestr("a.npy", npy(header(), bytes(24)))
    with pytest.raises(Emu3Error, match="would become one file"):
        load_codes(tmp_path / "x.npz")


def test_names_of_inputs():
    assert code_names([Path("a/x.png"), Path("file.tar.gz"), Path("folder")]) == ["x", "file.tar", "folder"]
    assert code_names([Path(".")]) == [Path.cwd().name]
    for bad, reason in (("a\n.png", "control"), ("caf\udce9.png", "control"), ("x" * 250 + ".png", "too long")):
        with pytest.raises(Emu3Error, match=reason):
            code_names([Path(bad)])
    with pytest.raises(Emu3Error, match=r"b/X\.gif: 'x' and 'X' would become one file: rename one"):
        code_names([Path("a/x.png"), Path("b/X.gif")])


@pytest.mark.parametrize(
    "data, reason",
    [
        (npy(header("(20000, 20000)")), "400000000 codes in a frame of 'a'; the limit is 262,144"),
        (npy(header("(100000, 64, 64)")), "409600000 codes in 'a'; the limit is 4,194,304"),
        (npy(header("(2**31, 1)")), "is not a readable"),
        (npy(header(f"({10**400}, 1)")), "codes in a frame of 'a'"),
        (npy(header("(2, 3)", "'|O'")), r"is object \(2, 3\): codes must be integers"),
        (npy(header("(2, 3)", "'<f4'")), "is float32"),
        (npy(header("(2, 3)", "[('x', '<i4')]")), "codes must be integers"),
        (npy(header("(2,)")), "codes must be integers"),
        (npy(header("(0, 3)")), "codes must be integers"),
        (npy(header("(-2, 3)")), "codes must be integers"),
        (npy(header("(True, 3)")), "does not have as many codes as its header says"),
        (npy(header("'x'")), "is not a readable .npz"),
        (npy(header(), bytes(23)), "does not have as many codes as its header says"),
        (npy(header(), bytes(25)), "does not have as many codes as its header says"),
        (npy("__import__('os').abort()"), "is not a readable .npz"),
        (npy("(" * 900), "is not a readable .npz"),
        (npy("[]"), "is not a readable .npz"),
        (npy("{}"), "is not a readable .npz"),
        (b"\x93NUMPY\x02\x00" + (2**31).to_bytes(4, "little"), "bytes in the header of 'a'; the limit is 1,000"),
        (b"\x93NUMPY\x09\x00", "is not a NumPy array"),
        (b"text", "is not a readable .npz"),
        (b"", "is not a readable .npz"),
    ],
)
def test_members_that_are_no_codes(tmp_path, data, reason):
    write(tmp_path / "x.npz", {"a.npy": data})
    with pytest.raises(Emu3Error, match=f"x.npz.*{reason}"):
        load_codes(tmp_path / "x.npz")


def test_headers_are_checked_before_there_is_memory(tmp_path, monkeypatch):
    """Of what a member claims, no more bytes are taken from it than its header has."""
    taken = []
    original = zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda self, n=-1: taken.append(data := original(self, n)) or data)
    write(tmp_path / "x.npz", {"a.npy": npy(header("(2000, 2000)"), bytes(1 << 24))})
    with pytest.raises(Emu3Error, match="codes in a frame"):
        load_codes(tmp_path / "x.npz")
    assert sum(map(len, taken)) < 200


def test_all_arrays_together_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 100)
    save_codes(tmp_path / "x.npz", {name: ONE for name in "abcd"})
    assert len(load_codes(tmp_path / "x.npz")) == 4
    save_codes(tmp_path / "x.npz", {name: ONE for name in "abcde"})
    with pytest.raises(Emu3Error, match="120 bytes up to the end of 'e'; the limit is 100"):
        load_codes(tmp_path / "x.npz")
    monkeypatch.setattr(module, "MAX_ARRAYS", 4)
    with pytest.raises(Emu3Error, match="5 arrays; the limit is 4"):
        load_codes(tmp_path / "x.npz")


def _patched(place: str, change) -> bytes:
    """A sound file with bytes changed after each mark: "PK12" of the member, "PK34" of the directory."""
    import io

    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("abc.npy", npy(header(), bytes(24)))
    data = bytearray(stream.getvalue())
    for mark, offset in ((b"PK\3\4", 0), (b"PK\1\2", 2)):
        start = data.index(mark)
        if place == "flags":
            data[start + 6 + offset] |= change
        elif place == "method":
            data[start + 8 + offset : start + 10 + offset] = change.to_bytes(2, "little")
    if place == "name":
        data = data.replace(b"abc.npy", change)
        for mark, offset in ((b"PK\3\4", 7), (b"PK\1\2", 9)):
            data[data.index(mark) + offset] |= 8  # "the name is UTF-8"
    if place == "data":
        start = data.index(b"abc.npy") + 7
        data[start : start + 10] = change
    return bytes(data)


@pytest.mark.parametrize(
    "place, change, reason",
    [
        ("flags", 1, "'abc' is encrypted"),
        ("method", 99, "'abc' is compressed by method 99"),
        ("method", 12, "'abc' is compressed by method 12"),
        ("method", 14, "'abc' is compressed by method 14"),
        ("data", b"\xff" * 10, "is not a readable .npz of codes .Error -3 while decompressing"),
        ("name", b"\xff\xfe\xfd.npy", "is not a readable .npz"),
    ],
)
def test_members_that_cannot_be_read(tmp_path, place, change, reason):
    (tmp_path / "x.npz").write_bytes(_patched(place, change))
    with pytest.raises(Emu3Error, match=f"x.npz.*{reason}"):
        load_codes(tmp_path / "x.npz")


def test_files_that_are_none(tmp_path):
    (tmp_path / "text.npz").write_text("not a zip")
    with zipfile.ZipFile(tmp_path / "empty.npz", "w"):
        pass
    np.save(tmp_path / "array.npy", ONE)
    os.mkfifo(tmp_path / "pipe.npz")
    for name, reason in (
        ("text.npz", "is not a readable .npz"),
        ("empty.npz", "holds no codes"),
        ("array.npy", "is not a readable .npz"),
        ("pipe.npz", "it is a pipe or device"),
        ("none.npz", "there is no such file"),
        ("", "it is a directory"),
    ):
        with pytest.raises(Emu3Error, match=reason):
            load_codes(tmp_path / name)


@pytest.mark.parametrize(
    "name, reason",
    [("codes_20000.npz", "codes in a frame"), ("codes_escape.npz", "the name"), ("codes_case.npz", "would become one")],
)
def test_corpus(name, reason):
    with pytest.raises(Emu3Error, match=f"{name}: .*{reason}"):
        load_codes(CORPUS / name)

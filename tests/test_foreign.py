"""The boundary that foreign files cross: bounds, names, paths, and one printable line for every error."""

import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import file_name, limit, local_path, parse_json, read_bytes, read_json, read_object, reading
from emu3_jax.printable import one_line, printable, shown


class Panic(BaseException):
    """As extensions written in Rust raise it."""


@pytest.mark.parametrize(
    "fault",
    [ValueError("x"), KeyError("x"), RecursionError(), MemoryError(), OSError(5, "I/O"), Panic("p"), TypeError()],
)
def test_whatever_a_reader_raises_becomes_one_line(fault):
    with pytest.raises(Emu3Error, match=r"^(cannot read )?file.json.*(again|: )"), reading("file.json"):
        raise fault


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_end_of_the_process_passes(stop):
    with pytest.raises(stop), reading("file.json"):
        raise stop


def test_an_error_that_names_its_culprit_passes():
    with pytest.raises(Emu3Error, match=r"^tensor x is bad$"), reading("file"):
        raise Emu3Error("tensor x is bad")


@pytest.mark.parametrize(
    "text, reason",
    [
        (b"[" * 100_000, "nested too deeply"),
        (b"[" + b"1," * 5_000_000 + b"1]", "values in its JSON; the limit is 4,000,000"),
        (b"{", "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON"),
        (b"1" * 5000, "not readable as JSON"),
    ],
)
def test_json_is_bounded(tmp_path, text, reason):
    file = tmp_path / "a.json"
    file.write_bytes(text)
    with pytest.raises(Emu3Error, match=reason) as error:
        read_json(file)
    assert len(str(error.value)) <= 300


def test_json_that_is_no_object(tmp_path):
    (tmp_path / "c.json").write_text("[1")
    with pytest.raises(Emu3Error, match=r"c\.json: not readable as JSON"):
        read_object(tmp_path / "c.json")
    (tmp_path / "c.json").write_text("[1]")
    with pytest.raises(Emu3Error, match="a JSON list, not an object"):
        read_object(tmp_path / "c.json")
    with pytest.raises(Emu3Error, match=r"d\.json: not found"):
        read_object(tmp_path / "d.json")


def test_a_file_that_is_too_long_is_not_read(tmp_path):
    file = tmp_path / "long.json"
    with file.open("wb") as stream:
        stream.truncate(1 << 40)  # takes no space
    with pytest.raises(Emu3Error, match="1099511627776 bytes; the limit is"):
        read_json(file)


def test_what_is_no_plain_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a pipe or device"), (tmp_path, "a directory"), ("/dev/zero", "a pipe")):
        with pytest.raises(Emu3Error, match=f"cannot read {path}: it is {kind}"):
            read_bytes(path, 10)
    with pytest.raises(Emu3Error, match="there is no such file"):
        read_bytes(tmp_path / "none", 10)


@pytest.mark.parametrize("name", ["a", "é", "with space", "file", "allow_pickle", ".hidden", "x" * 240])
def test_names_of_files(name):
    assert file_name(name, "codes.npz") == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "/x",
        "a/b",
        "a\\b",
        "a\nb",
        "\x1b[31m",
        "con",
        ".emu3-tmp-x",
        "NUL.png",
        "\udc80",
        "x" * 250,
        5,
        None,
    ],
)
def test_names_that_are_refused(name):
    with pytest.raises(Emu3Error, match=r"^codes.npz: the name "):
        file_name(name, "codes.npz")


@given(st.text())
def test_a_name_that_passes_stays_in_its_directory(name):
    try:
        path = os.path.join("/base", file_name(name, "x"))
    except Emu3Error:
        return
    assert os.path.dirname(os.path.normpath(path)) == "/base" and name.isprintable()


@pytest.mark.parametrize("path", ["gs://bucket/x", "s3://b", "https://h/x", "gs:/bucket", "file:///x", "hf://a/b"])
def test_addresses_are_no_paths(path):
    with pytest.raises(Emu3Error, match=":// addresses are not supported"):
        local_path(path)


@pytest.mark.parametrize("path", ["a\0b", "x" * 256, "a/" * 2050, "a\ud800"])
def test_paths_that_no_file_system_has(path):
    with pytest.raises(Emu3Error, match=r"^the path "):
        local_path(path)


@pytest.mark.parametrize("path", ["../x", "/a/b", "C:/x", "a:b", "x" * 255, "caf\udce9"])
def test_paths_of_a_file_system(path):
    assert os.fspath(local_path(path)) == path


@given(st.text())
def test_error_lines_are_short_and_printable(text):
    line = str(Emu3Error(text))
    assert line.isprintable() and len(line) <= 300
    assert len(shown(text)) <= 80 and shown(text).isprintable()


def test_a_long_line_keeps_both_ends_of_its_path_and_its_remedy():
    line = one_line(f"{'/'.join(['deep'] * 100)}/file.png: no picture; {'y' * 500}; give another")
    assert len(line) <= 300 and line.startswith("deep/deep") and "file.png: no picture" in line
    assert line.endswith("; give another")


def test_values_are_shown_without_being_written_out():
    assert len(shown(list(range(10**6)))) <= 80
    assert shown(1 << 10**6) == "a number of 1000001 bits"
    assert shown({"a": [1, "b"]}) == "{'a': [1, 'b']}"


def test_printable_keeps_what_it_is_told():
    assert printable("a\x1b[0m\nb\u202e\udc80", keep="\n") == "a\\x1b[0m\nb\\u202e\\udc80"


def test_limits_are_checked_before_memory_is_taken():
    limit("x.npz", "elements", 10, 10)
    with pytest.raises(Emu3Error, match=re.escape("x.npz: 11 elements; the limit is 10")):
        limit("x.npz", "elements", 11, 10)
    with pytest.raises(Emu3Error, match="JSON"):
        parse_json(b"1" * (65 << 20), "x")

"""Writing all or nothing."""

import errno
import os

import pytest

from emu3_jax import Emu3Error, files


@pytest.mark.parametrize("fails", [False, True])
def test_a_path_that_leads_out_of_a_directory_does_not_make_it(tmp_path, fails):
    try:
        with files.files_into(tmp_path / "absent" / ".." / "made") as directory:
            (directory / "x").write_text("x")
            if fails:
                raise Emu3Error("no")
    except Emu3Error:
        assert fails
    assert [path.name for path in tmp_path.iterdir()] == ([] if fails else ["made"])


def test_nothing_moves_where_one_file_has_no_place(tmp_path):
    (tmp_path / "out" / "b").mkdir(parents=True)
    with pytest.raises(Emu3Error, match=r"out/b: it is a directory"), files.files_into(tmp_path / "out") as directory:
        for name in "ab":
            (directory / name).write_text(name)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b"]


@pytest.mark.parametrize("links", [True, False])
def test_a_name_that_is_taken_at_the_end_is_not_replaced(tmp_path, monkeypatch, links):
    """Of several files, none stays. Also on a file system without hard links, where the same checks hold."""
    if not links:

        def none(*_):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", none)
    taken, link = tmp_path / "out" / "b", tmp_path / "link"
    said = r"out/b exists already: another program wrote it just now; choose another"
    with pytest.raises(Emu3Error, match=said), files.files_into(tmp_path / "out", replace=False) as directory:
        for name in "abc":
            (directory / name).write_text(name)
        taken.parent.mkdir()
        taken.write_text("kept")
    assert [path.name for path in taken.parent.iterdir()] == ["b"] and taken.read_text() == "kept"
    with pytest.raises(Emu3Error, match="link exists already"), files.new_file(link, replace=False) as temporary:
        temporary.write_text("x")
        link.symlink_to("nowhere")
    assert link.is_symlink()
    with files.new_file(tmp_path / "new", replace=False) as temporary:
        temporary.write_text("x")
    with files.files_into(tmp_path / "more", replace=False) as directory:
        (directory / "a").write_text("x")
    assert (tmp_path / "new").read_text() == (tmp_path / "more" / "a").read_text() == "x"
    assert sorted(os.listdir(tmp_path)) == ["link", "more", "new", "out"]


def test_an_output_inside_an_input_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "link").symlink_to("full")
    for output in ("full/in", "full/a/../b", "link/in", tmp_path / "full" / "a" / "b"):
        with pytest.raises(
            Emu3Error, match=r"^cannot write \S+: it is inside full, which is read; choose a place outs"
        ):
            files.require_outside(output, "other", "full")
    with pytest.raises(Emu3Error, match="it is inside gs://bucket/full, which is read"):
        files.require_outside("gs://bucket/full/in", "gs://bucket/full")
    files.require_outside("full2/in", "full")
    files.require_outside("full/../in", "full", "link", "gs://bucket/full")


def write(call, output) -> None:
    with call(output):
        pytest.fail("the work began")


@pytest.mark.parametrize("call", [files.files_into, files.shared_directory, lambda path: files.new_directory(path, 1)])
def test_a_file_or_a_broken_link_above_an_output(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").touch()
    (tmp_path / "link").symlink_to("absent")
    for output in ("a.txt/x", "a.txt/x/y"):
        with pytest.raises(
            Emu3Error, match=f"^cannot write to {output}: a.txt is a file, not a directory; choose anot"
        ):
            write(call, output)
    with pytest.raises(
        Emu3Error, match=r"^cannot write to link/x: link is a link that leads nowhere; delete it or cho"
    ):
        write(call, "link/x")
    with pytest.raises(
        Emu3Error, match=r"^(cannot write to link: link is a link that leads nowhere|link exists already)"
    ):
        write(call, "link")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "link"]


def test_a_new_file_below_a_file(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(Emu3Error, match=r"a\.txt is a file: choose a directory to write to"):
        write(files.new_file, tmp_path / "a.txt" / "x")


def test_a_full_disk_names_the_place_that_the_user_gave(tmp_path):
    with (
        pytest.raises(Emu3Error) as caught,
        files.files_into(tmp_path / "out") as directory,
        files.new_file(directory / "004.png"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(caught.value) == (
        f"cannot write {tmp_path}/out/004.png: No space left on device; free space or choose another place"
    )
    assert list(tmp_path.iterdir()) == []

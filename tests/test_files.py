"""Writing all or nothing."""

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

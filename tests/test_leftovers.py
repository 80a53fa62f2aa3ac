"""What killed runs left: it is removed by the next run or by `doctor --clean`, and named."""

import json
import os
import subprocess
import sys

import pytest

from emu3_jax import Emu3Error, locks
from emu3_jax.cli.main import main
from emu3_jax.training import run_directory


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def run(tmp_path):
    """A run's directory with everything that a kill can leave, the paths of that, and what is not to be touched."""
    directory = tmp_path / "run"
    (directory / "checkpoints" / "3").mkdir(parents=True)
    (directory / "samples").mkdir()
    (directory / "run.json").write_text("{}")
    left = [
        directory / "model.new",
        directory / "adapter.new",
        directory / "checkpoints" / "4.orbax-checkpoint-tmp-123",
        directory / ".emu3-tmp-a",
        directory / "samples" / ".emu3-tmp-b",
    ]
    for path in left:
        path.mkdir()
        (path / "inside").write_text("x")
    return directory, left, {directory / "checkpoints" / "3", directory / "run.json"}


def test_the_next_run_removes_and_names_them(run, caplog):
    directory, left, kept = run
    with run_directory.locked(directory):
        said = [record.getMessage() for record in caplog.records]
    assert sorted(said) == sorted(f"removed {path}, a leftover of a killed run" for path in left)
    assert not any(path.exists() for path in left) and all(path.exists() for path in kept)
    with run_directory.locked(directory):
        assert len(caplog.records) == len(left)


def test_doctor_removes_and_names_them(run, dead, capsys):
    directory, left, kept = run
    beside, old, older = (directory.parent / name for name in (".emu3-tmp-c", f".run.{dead}.tmp", f".other.{dead}.tmp"))
    inside, mine = directory / f".metrics.jsonl.{dead}.tmp", directory / f".metrics.jsonl.{os.getpid()}.tmp"
    for path in (beside, old, older, inside, mine):
        path.write_text("")
    assert main(["doctor", "--clean", str(directory)]) == 0
    gone = [*left, beside, old, inside]
    said = capsys.readouterr().out.splitlines()
    assert sorted(said) == sorted(f"ok    removed {path}, a leftover of a killed run" for path in gone)
    assert not any(path.exists() for path in gone)
    assert all(path.exists() for path in (*kept, older, mine))
    assert main(["doctor", "--clean", "--json", str(directory)]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["level"] == "ok" and line["what"].startswith("no run that was killed left anything")


def test_a_directory_that_is_in_use_is_left_alone(run, capsys):
    directory, left, _ = run
    for path in left:
        path.mkdir(exist_ok=True)
    with locks.locked(directory / "lock", str):
        assert main(["doctor", "--clean", str(directory)]) == 2
        said = capsys.readouterr().err
        assert f"{directory} is in use by process {os.getpid()} on" in said and said.count("\n") == 1
        with pytest.raises(Emu3Error, match="is in use by"), run_directory.locked(directory):
            pass
    assert all(path.exists() for path in left)


@pytest.mark.parametrize("name", ["checkpoints", "samples", "tensorboard", "profile"])
def test_a_file_in_the_way_is_named_before_training(tmp_path, name):
    (tmp_path / name).write_text("")
    with (
        pytest.raises(Emu3Error, match=f"{name} is not a directory: move it away"),
        run_directory.locked(tmp_path),
    ):
        pass


def test_what_was_never_finished_may_be_cleaned(tmp_path, capsys):
    (tmp_path / ".emu3-tmp-x").mkdir()
    assert main(["doctor", "--clean", str(tmp_path / "bundle")]) == 0
    assert not list(tmp_path.iterdir()) and "removed" in capsys.readouterr().out


def test_a_lock_on_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", none)
    with locks.locked(tmp_path / "lock", str):
        assert "cannot be locked (Function not implemented); do not let another run write there" in caplog.text

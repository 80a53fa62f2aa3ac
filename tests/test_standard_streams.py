"""Standard output that nobody reads, that is full, or that is closed: one line or none, and the right exit code."""

import os
import pathlib
import subprocess
import sys

import pytest

BROKEN = "emu3-jax: error: cannot write to standard output: No space left on device\n"


pytestmark = pytest.mark.parametrize("unbuffered", ["", "1"])


def doctor(directory: pathlib.Path, unbuffered: str, redirection: str = "", **streams) -> tuple[int, str]:
    """Runs `emu3-jax doctor` on an empty directory, which has something to say; the exit code and standard error."""
    command = ["sh", "-c", f'"$0" -m emu3_jax doctor . {redirection}', sys.executable]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, cwd=directory, env=environment, **streams)
    return done.returncode, done.stderr


def test_nobody_reads(tmp_path, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    assert doctor(tmp_path, unbuffered, stdout=writer) == (141, "")
    os.close(writer)


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="the system has no full device")
def test_full(tmp_path, unbuffered):
    assert doctor(tmp_path, unbuffered, ">/dev/full") == (2, BROKEN)


def test_closed(tmp_path, unbuffered):
    """A file that is opened must not become a standard stream, and be written into."""
    assert doctor(tmp_path, unbuffered, "<&- >&-") == (2, "")

"""What long work shows: a bar on a terminal, lines in a log, nothing with --quiet or for users of the package."""

import contextlib
import errno
import fcntl
import io
import itertools
import json
import os
import pathlib
import re
import shutil
import struct
import sys
import termios
import threading

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_bundle import SIDE

from emu3_jax import progress
from emu3_jax.checkpoints.checksums import write_checksums
from emu3_jax.checkpoints.export import export
from emu3_jax.cli.main import main
from emu3_jax.media.codes import save_codes
from emu3_jax.progress import Progress, by_default, download_bars, duration, each, size, tell

pytestmark = pytest.mark.compiled_quickly

DATE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


class Clock:
    """Stands in for `time.monotonic`."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "_now", clock)
    monkeypatch.setattr(progress.time, "strftime", lambda _: "DATE")
    return clock


@contextlib.contextmanager
def terminal():
    """Standard error is a terminal of 100 columns; gives a function that returns what it was sent."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    os.set_blocking(ours, False)
    with os.fdopen(theirs, "w") as stream, os.fdopen(ours, "rb", buffering=0) as reader:

        def sent() -> str:
            stream.flush()
            return (reader.read() or b"").decode()

        with contextlib.redirect_stderr(stream):
            yield sent


# ------------------------------------------------------------------------------------------------ a log


def test_a_log_gets_a_line_every_thirty_seconds(clock, capsys):
    with Progress(True, 100, "records", name="prepare") as bar:
        for _ in range(10):
            clock.now += 10
            bar.update(10)
    # The first ten records, with which programs are compiled, tell nothing of the pace.
    assert capsys.readouterr().err.splitlines() == [
        "DATE prepare: 30 of 100 records, 70 left, 1 records/s, time left 1 min 10 s",
        "DATE prepare: 60 of 100 records, 40 left, 1 records/s, time left 40 s",
        "DATE prepare: 90 of 100 records, 10 left, 1 records/s, time left 10 s",
        "DATE prepare: done in 1 min 40 s",
    ]


def test_compilation_does_not_count_for_the_time_left(clock, capsys):
    with Progress(True, 100, "tokens", name="generate") as bar:
        clock.now += 600
        bar.update(1)
        clock.now += 30
        bar.update(30)
    assert capsys.readouterr().err.splitlines() == [
        "DATE generate: 1 of 100 tokens, 99 left",
        "DATE generate: 31 of 100 tokens, 69 left, 1 tokens/s, time left 1 min 9 s",
        "DATE generate: done in 10 min 30 s",
    ]


def test_bytes_and_what_was_done_before(clock, capsys):
    with Progress(True, 20 * 10**9, "bytes", name="convert", initial=5 * 10**9) as bar:
        bar.update(10**9)
        clock.now += 40
        bar.update(4 * 10**9)
    assert capsys.readouterr().err.splitlines()[0] == (
        "DATE convert: 10 GB of 20 GB, 10 GB left, 100 MB/s, time left 1 min 40 s"
    )


def test_short_work_says_nothing(clock, capsys):
    assert list(each([1, 2, 3], True, "files", name="tokenize")) == [1, 2, 3]
    with pytest.raises(ValueError, match="stop"), Progress(True, 2, "files", name="tokenize") as bar:
        clock.now += 31
        bar.update()
        raise ValueError("stop")
    assert capsys.readouterr().err == "DATE tokenize: 1 of 2 files, 1 left\n"  # and no line that says it is done


def test_work_of_unknown_length(clock, capsys):
    for _ in each(iter("abc"), True, "clips", name="clips"):
        clock.now += 40
    assert capsys.readouterr().err.splitlines() == [
        "DATE clips: 1 clips",
        "DATE clips: 2 clips, 0.025 clips/s",
        "DATE clips: 3 clips, 0.025 clips/s",
        "DATE clips: done in 2 min",
    ]


def test_who_sees_lines(clock, capsys):
    def lines(show) -> str:
        with Progress(show, 2, "files", name="work", every=0) as bar:
            bar.update()
            bar.line("line")
            bar.say("said")
        tell("told", show)
        return capsys.readouterr().err

    every = "".join(
        f"DATE {line}\n" for line in ("work: 1 of 2 files, 1 left", "line", "said", "work: done in 0 s", "told")
    )
    assert lines(True) == every
    assert lines(False) == lines(None) == ""
    with by_default(True):
        assert lines(None) == every and lines(False) == ""
        with by_default(False):
            assert lines(None) == "" and lines(True) == every
    assert lines(None) == ""


def test_of_several_processes_the_first_one_shows(clock, capsys, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    for index, shown in ((1, ""), (0, "DATE told\n")):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        tell("told", True)
        assert Progress(True, 1, "files", name="work").shown == bool(shown)
        assert capsys.readouterr().err == shown


def test_a_line_is_written_at_once_and_as_a_whole(clock, monkeypatch):
    calls = []

    class Stream(io.StringIO):
        def write(self, text):
            calls.append(text)

        def flush(self):
            calls.append("flush")

    monkeypatch.setattr(sys, "stderr", Stream())
    tell("told", True)
    assert calls == ["DATE told\n", "flush"]


def test_a_log_that_cannot_be_written_stops_nothing(clock, monkeypatch):

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "no space")

    closed = io.StringIO()
    closed.close()
    for stream in (Full(), closed, None):
        monkeypatch.setattr(sys, "stderr", stream)
        tell("told", True)


def test_threads_may_tell_of_units(capsys):
    bar = Progress(True, 8000, "bytes", name="convert")
    threads = [threading.Thread(target=lambda: [bar.update() for _ in range(1000)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bar.done == 8000


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (200, "3 min 20 s"), (3599, "59 min 59 s"), (3600, "1 h"),
        (4800, "1 h 20 min"), (86400, "1 d"), (97200, "1 d 3 h"),
    ],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1234, "1.23 kB"), (17e9, "17 GB"), (123.4e6, "123 MB")]
)
def test_sizes(count, text):
    assert size(count) == text


# ------------------------------------------------------------------------------------------------ a terminal


def test_a_terminal_gets_a_bar(clock):
    with terminal() as sent, Progress(None, 4, "steps", name="train", every=None) as bar:
        bar.update(1, "loss 5.0")
        clock.now += 10
        bar.update(1, "loss 4.0")
        bar.line("for logs")
        bar.say("a line above")
        tell("told", True)
        drawn = sent()
        bar.close()
        gone = sent()
        bar.say("afterwards")
        after = sent()
    assert "train:" in drawn and "2/4" in drawn and "time left 20 s, loss 4.0" in drawn
    assert "a line above\r\n" in drawn and "for logs" not in drawn and "told" not in drawn and "DATE" not in drawn
    assert re.fullmatch(r"\r *\r", gone)  # the bar is gone
    assert after.strip("\r ") == "afterwards\r\n"


def test_a_terminal_gets_nothing_where_nothing_is_wanted(clock):
    with terminal() as sent:
        for show in (False, None):
            with by_default(False), Progress(show, 4, "files", name="work") as bar:
                bar.update(4)
                bar.say("said")
        assert sent() == ""


# ------------------------------------------------------------------------------------------------ downloads


def test_a_download_in_a_log(clock, capsys):
    bars = download_bars(True, "BAAI/Emu3-Gen")
    loaded, files = bars(total=0, unit="B", unit_scale=True), bars(total=3, unit="it", desc="Fetching")
    loaded.total += 10**9
    loaded.update(4 * 10**8)
    loaded.refresh()
    assert capsys.readouterr().err == ""
    clock.now += 31
    files.update()
    files.close()
    assert capsys.readouterr().err == "DATE download BAAI/Emu3-Gen: 400 MB, 1 of 3 files\n"


def test_a_download_without_lines(clock):
    with terminal() as sent:
        assert download_bars(True, "a") is None  # the library's own bars
        bar = download_bars(False, "a")(total=3)
        clock.now += 31
        bar.update()
        bar.close()
        assert sent() == "" and bar.n == 1


# ------------------------------------------------------------------------------------------------ commands


def test_no_other_module_makes_bars():
    root = pathlib.Path(progress.__file__).parents[1]
    files = [*root.glob("emu3_jax/**/*.py"), *root.glob("scripts/**/*.py")]
    assert [file.name for file in files if re.search("(import|from) tqdm", file.read_text())] == ["progress.py"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_bundle):
    """Two pictures, codes, a manifest, a bundle with checksums and a checkpoint."""
    root = tmp_path_factory.mktemp("inputs")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (SIDE, SIDE)).save(root / name)
    save_codes(root / "codes.npz", {name: np.zeros((3, 3), np.int32) for name in "ab"})
    (root / "m.jsonl").write_text("".join(json.dumps({"text": f"text {index}"}) + "\n" for index in range(4)))
    shutil.copytree(tiny_bundle, root / "bundle")
    write_checksums(root / "bundle")
    export(tiny_bundle, root / "checkpoint", "upstream")
    return root


COMMANDS = [
    ("convert", "convert checkpoint/language_model checkpoint/vision_tokenizer -o OUT"),
    ("checksums|export", "export bundle --verify --layout upstream -o OUT"),
    ("checksums|doctor", "doctor bundle"),
    ("generate", "generate a b --batch-size 1 --model bundle -o OUT"),
    ("tokenize", "tokenize a.png b.png --model bundle -o OUT.npz"),
    ("detokenize", "detokenize codes.npz --model bundle -o OUT"),
    ("prepare", "prepare m.jsonl --model bundle -o OUT"),
]


@pytest.mark.parametrize(("names", "command"), COMMANDS)
def test_commands_write_lines_to_a_log(names, command, inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(inputs)
    monkeypatch.setattr(progress, "_now", itertools.count(0.0, 31.0).__next__)

    def run(output, *options) -> tuple[str, str]:
        assert main([*command.replace("OUT", str(tmp_path / output)).split(), *options]) == 0
        said = capsys.readouterr()
        return said.out.replace(str(tmp_path / output), "OUT"), said.err

    out, lines = run("log")
    assert re.fullmatch(rf"({DATE}({names}): .+\n)+", lines), lines
    for name in names.split("|"):
        assert re.search(rf"^{DATE}{name}: .+ of .+ left", lines, re.MULTILINE), lines
    assert run("quiet", "--quiet") == (out, "")

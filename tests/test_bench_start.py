"""scripts/bench_start.py: a second belongs to one phase, and both runs are timed whole."""

import pathlib
import re
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "scripts" / "bench_start.py"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import bench_start

    return bench_start


def test_what_is_within_another_phase_counts_once(bench):
    phases = bench.Phases()
    phases.add("imports", 0.0, 1.0)
    phases.add("imports", 2.5, 2.75)  # while a program is traced
    phases.add("tracing", 2.0, 3.0)  # ... and decoding goes on
    phases.add("compiling", 3.0, 5.0)
    phases.add("decoding", 1.5, 8.0)
    expected = {"imports": 1.25, "loading": 0.0, "tracing": 0.75, "compiling": 2.0, "decoding": 3.5, "rest": 0.0}
    assert phases.seconds == expected


def test_the_table_has_medians_of_both_runs(bench):
    def run(seconds):
        return {**dict.fromkeys(bench.PHASES, seconds), "wall": 10 * seconds, "cpu": 5 * seconds}

    text = bench.table([[run(1.0), run(0.5)], [run(3.0), run(1.5)], [run(2.0), run(0.25)]])
    assert "| imports | 2.00 | 0.50 |\n" in text and "| **the whole command** | 20.00 | 5.00 |\n" in text
    assert "Medians of 3 rounds. The whole command took 10.00 to 30.00 s, then 2.50 to 15.00 s.\n" in text
    assert text.endswith("The second run takes 25% of the first one's time, and 25% of its CPU seconds.")


def test_no_rounds_are_refused(bench, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_start.py", "--runs", "0"])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2 and "--runs is 0: it must be a whole number >= 1" in capsys.readouterr().err


@pytest.mark.slow
def test_every_phase_of_a_run_is_seen(bench, tiny_bundle):
    words = ["generate", "a dot", "--model", str(tiny_bundle)]
    command = [sys.executable, str(SCRIPT), "--runs", "1", "--", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| (.+?) \| ([0-9.]+) \| ([0-9.]+) \|$", done.stdout, re.MULTILINE)
    assert [text for text, _, _ in rows][:-2] == list(bench.PHASES.values())
    assert all(float(first) > 0 for _, first, _ in rows)

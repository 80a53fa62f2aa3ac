"""scripts/bench_serve.py: every side does the load, every figure is there, and wrong options are refused."""

import json
import pathlib
import random
import sys

import pytest

from emu3_jax.serving.jobs import AnswerJob, PictureJob

SCRIPT = pathlib.Path(__file__).parents[1] / "scripts" / "bench_serve.py"
pytestmark = pytest.mark.compiled_quickly


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import bench_serve

    def run(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["bench_serve.py", *words])
        bench_serve.main()

    bench_serve.run_with = run
    return bench_serve


def test_all_sides_do_the_same_load(bench, tiny_bundle, tmp_path, capsys):
    file = tmp_path / "figures.json"
    bench.run_with("--model", str(tiny_bundle), "--rows", "2", "--jobs", "6", "--tokens", "4", "--json", str(file))
    found = json.loads(file.read_text())
    sides = {side["side"]: side for side in found["sides"]}
    assert tuple(sides) == bench.SIDES
    assert [side["jobs"] for side in sides.values()] == [6, 6, 3, 6]
    assert all(side["refused"] == 0 and side["seconds"] > 0 for side in sides.values())
    for name in ("batched", "poisson", "one row"):
        side = sides[name]
        assert 0 < side["rows_used_share"] <= 1 and side["tokens_per_s"] > 0 and side["pictures_per_minute"] > 0
        assert 0 < side["picture_first_p50_s"] <= side["picture_p50_s"] <= side["picture_p99_s"]
    assert sides["one row"]["rows_used_share"] == 1.0
    assert set(found["ratios"]) == {
        "tokens per second, batched / one row",
        "seconds to the first row, one request / generate",
        "jobs per second, batched / generate",
    }
    assert all(ratio > 0 for ratio in found["ratios"].values()) and found["machine"]["jax"]
    out, said = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == 2 + 4 + 1 + 3 and {line.count("|") for line in lines[:6]} == {len(bench.COLUMNS) + 1}
    assert "poisson: 6 jobs in " in said


def test_the_load_is_mixed(bench):
    jobs = bench.make_jobs("mixed", 40, 576, 9, seed=3)
    pictures = [job for job in jobs if isinstance(job, PictureJob)]
    answers = [job for job in jobs if isinstance(job, AnswerJob)]
    assert (len(pictures), len(answers)) == (24, 16)
    assert {job.ratio for job in pictures} == set(bench.RATIOS) and {job.guidance for job in pictures} == {1, 3, 5}
    assert sum(bool(job.pictures) for job in answers) == 8 and {job.max_new_tokens for job in answers} == {9}
    assert len({job.client for job in jobs}) == bench.CLIENTS and len({job.seed for job in jobs}) == 40


def test_percentiles(bench):
    values = [float(number) for number in range(1, 101)]
    random.Random(0).shuffle(values)
    assert [bench.percentile(values, share) for share in (0.5, 0.99)] == [50.0, 99.0]
    assert (bench.percentile([7.0], 0.5), bench.percentile([], 0.5)) == (7.0, None)


def test_a_tokenizer_for_random_weights(bench):
    config, vision = bench.PRESETS["8b"]
    tokenizer = bench.stand_in_tokenizer(config)
    assert tokenizer.vocab_size == config.vocab_size and vision.codebook_size == config.tokens.visual_count
    assert tokenizer.decode(tokenizer.encode("a red apple")) == "a red apple"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--rows", "0"), "0 must be a whole number >= 1"),
        (("--rate", "0"), "0 must be a number > 0"),
        (("--sides", "batched,none"), "must be names of batched, poisson, one row, generate"),
    ],
)
def test_wrong_options_are_refused(bench, capsys, words, line):
    with pytest.raises(SystemExit) as ended:
        bench.run_with(*words)
    assert ended.value.code == 2 and line in capsys.readouterr().err


def test_a_missing_bundle_is_one_line(bench, tmp_path):
    with pytest.raises(SystemExit) as ended:
        bench.run_with("--model", str(tmp_path / "none"))
    assert str(ended.value).startswith("bench_serve.py: ") and "\n" not in str(ended.value)

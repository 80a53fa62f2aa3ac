"""`emu3-jax pairs`: best against worst by rewards, people's votes, what is skipped, and bad input."""

import pathlib

import numpy as np
import pytest
from drawn_samples import write_samples

from emu3_jax import Emu3Error
from emu3_jax.cli.main import main
from emu3_jax.data.pairs import PreparedPairs
from emu3_jax.data.shards import Codebook, write_json
from emu3_jax.preference import pairing
from emu3_jax.preference.samples import Samples

NAN = float("nan")
# Rewards of 4 prompts with 3 samples each.
REWARDS = np.asarray([0.5, 0.9, 0.1, 0.3, 0.3, 0.3, NAN, NAN, NAN, 0.2, 0.4, 0.3])


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Samples:
    """4 prompts with 3 samples each, of guidance scales 1, 1 and 3, in two shards, and rewards `best` and `other`."""
    root = tmp_path_factory.mktemp("pairs") / "samples"
    prompts = [f"prompt {group}" for group in range(4)]
    shards = write_samples(root, prompts, (1.0, 1.0, 3.0), Codebook(64, "abc"))
    for name, sign in (("best", 1), ("other", -1)):
        (root / "rewards" / name).mkdir(parents=True)
        for number, shard in enumerate(shards):
            groups = {g: (sign * REWARDS[3 * g : 3 * g + 3]).tolist() for g in (2 * number, 2 * number + 1)}
            data = {
                "format": 1, "samples": "job", "reward": {}, "rewards": {g: v for g, v in groups.items() if g != 2},
                "skipped": {2: "it raised"} if number else {},
            }  # fmt: skip
            write_json((root / "rewards" / name / shard.file).with_suffix(".json"), data)
    return Samples(root)


@pytest.fixture
def pairs(samples, tmp_path, capsys):
    """Runs `emu3-jax pairs` into tmp_path/data; returns the exit code and both outputs."""

    def run(*options: str) -> tuple[int, str, str]:
        code = main(["pairs", str(samples.directory), "-o", str(tmp_path / "data"), *options])
        return code, *capsys.readouterr()

    return run


def chosen(found: pairing.Choices) -> list[tuple[int, int]]:
    return [(pair.chosen, pair.rejected) for pair in found.pairs]


def test_the_best_sample_of_a_prompt_is_paired_with_the_worst(samples):
    found = pairing.by_reward(samples, REWARDS)
    assert chosen(found) == [(1, 2), (10, 9)] and found.pairs[0].margin == pytest.approx(0.8)
    assert found.skipped == {"without spread": 1, "without rewards": 1}
    found = pairing.by_reward(samples, REWARDS, margin=0.5)
    assert chosen(found) == [(1, 2)] and found.skipped == {"without spread": 2, "without rewards": 1}
    # With three samples, the second best is the second worst: there is no second pair.
    assert pairing.by_reward(samples, REWARDS, per_prompt=3) == pairing.by_reward(samples, REWARDS)
    found = pairing.by_reward(samples, REWARDS, guidance=1.0)
    assert chosen(found) == [(1, 0), (10, 9)]
    assert not pairing.by_reward(samples, REWARDS, guidance=3.0).pairs  # one sample of each prompt
    with pytest.raises(Emu3Error, match="has no samples of guidance scale 2: choose another scale"):
        pairing.by_reward(samples, REWARDS, guidance=2.0)


def test_several_pairs_of_a_prompt(tmp_path):
    write_samples(tmp_path / "samples", ["one", "two"], (1.0,) * 5, Codebook(64, "abc"))
    samples = Samples(tmp_path / "samples")
    rewards = np.asarray([0.1, 0.9, 0.4, 0.5, 0.8, 0.0, 0.5, 0.5, 0.5, 0.1])
    assert chosen(pairing.by_reward(samples, rewards)) == [(1, 0), (6, 5)]
    for most in (2, 5):
        found = pairing.by_reward(samples, rewards, per_prompt=most)
        assert chosen(found) == [(1, 0), (4, 2), (6, 5), (7, 9)]
    assert [pair.margin for pair in found.pairs] == pytest.approx([0.8, 0.4, 0.5, 0.4])
    found = pairing.by_reward(samples, rewards, per_prompt=2, margin=0.5)
    assert chosen(found) == [(1, 0), (6, 5)] and not found.skipped


def test_pairs_hold_the_codes_that_were_drawn(pairs, samples, tmp_path):
    data = tmp_path / "data"
    code, out, _ = pairs("--reward", "best")
    assert (code, out) == (0, f"{data}: 2 pairs, 1 prompt without spread, 1 prompt without rewards\n")
    first, second = (PreparedPairs(data)[index] for index in range(2))
    assert (first.prompt, second.prompt, first.margin) == ("prompt 0", "prompt 3", pytest.approx(0.8))
    for side, number in ((first.chosen, 1), (first.rejected, 2), (second.chosen, 10), (second.rejected, 9)):
        np.testing.assert_array_equal(side, samples[number].codes)
    assert PreparedPairs(data).index.codebook == samples.index.codebook
    code, _, error = pairs("--reward", "other")
    assert code == 2 and "data exists already" in error


def test_people_s_votes_take_the_place_of_rewards(pairs, samples, tmp_path):
    votes = tmp_path / "votes.csv"
    votes.write_text(
        "voter,chosen,rejected\nann,0,1\nbob,000000.png,png/000001.png\neve,1,0\nann,4,3\neve,3,4\nann,11,9\n"
    )
    found = pairing.by_votes(samples, votes)
    assert chosen(found) == [(0, 1), (11, 9)] and [pair.margin for pair in found.pairs] == [1.0, 1.0]
    assert found.skipped == {"tied": 1}
    code, out, _ = pairs("--votes", str(votes))
    assert (code, out) == (0, f"{tmp_path / 'data'}: 2 pairs, 1 pair tied\n")
    with pytest.raises(Emu3Error, match=r"gives no pairs \(2 below the margin, 1 tied\): lower the margin"):
        pairing.write(samples, pairing.by_votes(samples, votes, margin=2.0), tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("chosen,rejected\n0,1\n0,x\n1,2\n0,\n", "line 3: rejected is 'x': it must be a sample's number, or its"),
        ("chosen,rejected\n0,\n0,x\n0,y\n", "; and 2 more bad rows: correct the rows"),
        (
            "chosen,rejected\n12,0\n",
            "line 2: chosen is sample 12, but there are samples 0 to 11 only: correct",
        ),
        ("chosen,rejected\n-1,0\n", "line 2: chosen is '-1': it must be"),
        ("chosen,rejected\n3,3\n", "line 2: both columns name sample 3"),
        ("chosen,rejected\n2,3\n", "line 2: samples 2 and 3 are of different prompts (0 and 1)"),
        ("winner,loser\n0,1\n", "has no column chosen and rejected: its first line must name the columns"),
        ("chosen\n0\n", "has no column rejected"),
        ("", "has no column chosen and rejected"),
        ("chosen,rejected\n", "has no votes: write one vote per row"),
        ("chosen,rejected\n\xff,1\n", "is damaged (UnicodeDecodeError"),
        ("chosen,rejected\n" + "1" * 200_000 + ",1\n", "is damaged (Error: field larger than field limit"),
    ],
)
def test_bad_votes_are_named_and_nothing_is_written(text, line, pairs, tmp_path):
    votes = tmp_path / "votes.csv"
    votes.write_bytes(text.encode("latin-1"))
    code, out, error = pairs("--votes", str(votes))
    assert ((code, out, error.count("\n")) == (2, "", 1) and f"{votes} {line}" in error) or line in error
    assert [path.name for path in tmp_path.iterdir()] == ["votes.csv"]


def test_bad_options_are_named_and_nothing_is_written(pairs, samples, tmp_path):
    for options, line in (
        ((), "has 2 rewards: it has best, other; choose one by --reward"),
        (("--reward", "third"), "has no rewards 'third' (it has best, other): run emu3-jax score"),
        (
            ("--reward", "best", "--margin", "2"),
            "gives no pairs (3 without spread, 1 without rewards): lower",
        ),
        (("--reward", "best", "--margin", "-1"), "margin is -1.0: it must be a number >= 0"),
        (("--reward", "best", "--margin", "nan"), "margin is nan: it must be a number >= 0"),
        (("--reward", "best", "--per-prompt", "0"), "per_prompt is 0: it must be a whole number >= 1"),
        (("--votes", str(tmp_path / "none.csv"), "--per-prompt", "2"), "--per-prompt does not go with --votes"),
        (("--votes", str(tmp_path / "none.csv")), "there is no such file"),
        (("--votes", str(tmp_path / "none.csv"), "--guidance", "3"), "--guidance does not go with --votes"),
    ):
        code, out, error = pairs(*options)
        assert (code, out, error.count("\n")) == (2, "", 1) and line in error
        assert not list(tmp_path.iterdir())


def test_samples_without_rewards_are_named(samples, tmp_path, capsys):
    copy = pathlib.Path(tmp_path / "copy")
    copy.mkdir()
    for file in samples.directory.glob("*.*"):
        (copy / file.name).write_bytes(file.read_bytes())
    assert main(["pairs", str(copy), "-o", str(tmp_path / "data")]) == 2
    assert f"{copy} has 0 rewards: run emu3-jax score first" in capsys.readouterr().err

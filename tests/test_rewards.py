"""Rewards: worker processes that raise, hang, print and die; `emu3-jax score`; and the rewards that are shipped."""

import json
import os
import pathlib
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from drawn_samples import write_samples

from emu3_jax import Emu3Error
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.cli.main import main
from emu3_jax.data.encoder import bundle_codebook
from emu3_jax.evaluation.arrangements import Arrangement
from emu3_jax.evaluation.arrangements import rasterise as rasterise_arrangement
from emu3_jax.evaluation.procedural import Still, rasterise_still
from emu3_jax.preference import rewards as pools
from emu3_jax.preference.rewards import Group, Reward, RewardPool
from emu3_jax.preference.samples import Samples
from emu3_jax.preference.scoring import read_rewards, reward_names
from emu3_jax.preference.shipped_rewards import procedural

pytestmark = pytest.mark.compiled_quickly

FUNCTIONS = """
import os, sys, time, pathlib
import numpy as np
import neighbour

assert "jax" not in sys.modules and os.environ["JAX_PLATFORMS"] == "cpu"

def mean(prompts, pictures):
    print("a reward may print")
    assert all(p.dtype == np.uint8 and p.ndim == 3 for p in pictures)
    return [float(p.mean()) for p in pictures]

def calls(prompts, pictures):
    return np.full(len(prompts), neighbour.count(len(prompts)))

def moody(prompts, pictures):
    if "raises" in prompts:
        raise RuntimeError("no mood\\nfor this")
    if "hangs" in prompts:
        time.sleep(600)
    if "dies" in prompts:
        os._exit(3)
    if "exits" in prompts:
        sys.exit(4)
    if "few" in prompts:
        return [1.0]
    if "flat" in prompts:
        return 1.0
    if "words" in prompts:
        return ["good"] * len(prompts)
    found = [0.5] * len(prompts)
    for index, prompt in enumerate(prompts):
        if prompt in ("nan", "inf") and (prompt == "inf" or index % 2):
            found[index] = float(prompt)
    return found

def star(prompts, pictures):
    if "a red star" in prompts and not pathlib.Path(__file__).with_name("fixed").exists():
        raise ValueError("no stars")
    return mean(prompts, pictures)

value = 3
"""
NO_MOOD = 'raise RuntimeError("no mood\\nfor this")'


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("rewards")
    (root / "functions.py").write_text(FUNCTIONS)
    (root / "neighbour.py").write_text("def count(number):\n    return number\n")
    return root / "functions.py"


def line_of(code: str) -> int:
    return 1 + [line.strip() for line in FUNCTIONS.splitlines()].index(code)


def group(prompt: str, count: int = 2, shade: int = 7) -> Group:
    return Group(prompt, [np.full((4, 4 + index, 3), shade + index, np.uint8) for index in range(count)])


def test_groups_are_scored_in_order_and_in_batches(file):
    groups = [group(str(index), 1 + index % 3, index) for index in range(9)]
    with RewardPool(Reward.parse(f"{file}:mean"), workers=2, batch_size=5) as pool:
        found = list(pool.score(groups))
    for one, scored in zip(groups, found, strict=True):
        assert scored.rewards.tolist() == [picture.mean() for picture in one.pictures]
    with RewardPool(Reward.parse(f"{file}:calls"), batch_size=5) as pool:
        sizes = [scored.rewards[0] for scored in pool.score([group("x", count) for count in (2, 3, 1, 7, 2)])]
    assert sizes == [5, 5, 1, 7, 2]  # groups are never split


def test_a_bad_group_is_skipped_with_its_reason_and_the_others_are_not(file):
    prompts = ["fine", "raises", "nan", "inf", "few", "flat", "words", "exits", "dies", "hangs", "well"]
    with RewardPool(Reward.parse(f"{file}:moody"), timeout=2.0, batch_size=8) as pool:
        found = dict(zip(prompts, pool.score([group(prompt) for prompt in prompts]), strict=True))
    assert {prompt: scored.reason for prompt, scored in found.items()} == {
        "fine": "",
        "raises": f"RuntimeError: no mood for this (line {line_of(NO_MOOD)})",
        "nan": "it returned nan for picture 1 of the prompt",
        "inf": "it returned inf for picture 0 of the prompt",
        "few": "ValueError: it returned 1 numbers for 2 pictures",
        "flat": "ValueError: it returned an array of shape [] for 2 pictures",
        "words": "ValueError: could not convert string to float: 'good'",
        "exits": f"SystemExit: 4 (line {line_of('sys.exit(4)')})",
        "dies": "its process ended with code 3",
        "hangs": "it took longer than 2 s",
        "well": "",
    }
    assert [prompt for prompt, scored in found.items() if scored.rewards is not None] == ["fine", "well"]


def test_workers_end_with_the_pool_and_with_their_input(file):
    pool = RewardPool(Reward.parse(f"{file}:mean"), workers=1)
    list(pool.score([group("x")]))
    (worker,) = pool._workers
    process = worker._process
    process.stdin.close()  # as when this process is killed
    assert process.wait(timeout=60) == 0
    pool.close()
    pool = RewardPool(Reward.parse(f"{file}:moody"), workers=1)
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(lambda: list(pool.score([group("hangs")])))
        while pool._workers[0]._process is None:
            time.sleep(0.01)
        pool.close()
    (scored,) = future.result()
    assert scored.rewards is None and pool._workers[0]._process is None


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("nonsense", "reward is 'nonsense': it must be FILE.py:NAME, or procedural or judge"),
        ("{folder}/none.py:mean", "there is no such file"),
        ("{folder}/functions.py:", "the function '' is no Python name"),
        ("{folder}/functions.py:a.b", "the function 'a.b' is no Python name"),
        ("{folder}/functions.txt:mean", "is no Python file"),
        ("{folder}/functions.py:missing", "ValueError: the file defines no function missing"),
        ("{folder}/functions.py:value", "ValueError: the file defines no function value"),
        ("{folder}/broken.py:mean", "SyntaxError: "),
        ("{folder}/leaves.py:mean", "SystemExit: 5 (line 2)"),
        ("{folder}/dies.py:mean", "its process ended with code 6"),
        ("{folder}/waits.py:mean", "it took longer than 1 s"),
    ],
)
def test_a_reward_that_cannot_be_loaded_is_named(text, line, file, tmp_path):
    for name, source in {
        "broken": "def mean(:\n", "leaves": "import sys\nsys.exit(5)\n", "dies": "import os\nos._exit(6)\n",
        "waits": "import time\ntime.sleep(600)\n", "functions": "value = 3\n",
    }.items():  # fmt: skip
        (tmp_path / f"{name}.py").write_text(source)
    with pytest.raises(Emu3Error) as error:  # noqa: SIM117
        with RewardPool(
            Reward.parse(text.format(folder=tmp_path)), start_timeout=1.0 if "waits" in text else 60
        ) as pool:
            list(pool.score([group("x")]))
    assert line in str(error.value) and "\n" not in str(error.value)


def test_numbers_of_a_pool_are_checked(file):
    for options, line in (
        ({"workers": 0}, "workers is 0: it must be a whole number from 1 to 256"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"timeout": float("nan")}, "timeout is nan: it must be above 0 and at most 1,000,000 seconds"),
        ({"timeout": 1e300}, r"timeout is 1e\+300: it must be above 0 and at most 1,000,000 seconds"),
    ):
        with pytest.raises(Emu3Error, match=line):
            RewardPool(Reward.parse(f"{file}:mean"), **options)


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def samples(tiny_bundle, tmp_path) -> pathlib.Path:
    """Three prompts with three samples each, in two shards."""
    prompts = ("a red star", "a blue heart", "a green cat")
    write_samples(tmp_path / "samples", prompts, (1.0, 1.0, 3.0), bundle_codebook(Bundle.open(tiny_bundle)))
    return tmp_path / "samples"


@pytest.fixture
def score(samples, tiny_bundle, capsys):
    """Runs `emu3-jax score`; returns the exit code and both outputs."""

    def run(*options: str) -> tuple[int, str, str]:
        code = main(["score", str(samples), "--model", str(tiny_bundle), "--quiet", *options])
        return code, *capsys.readouterr()

    return run


def test_rewards_lie_beside_the_samples(score, samples, file):
    before = {path.name: path.read_bytes() for path in samples.iterdir()}
    assert score("--reward", f"{file}:mean")[:2] == (
        0,
        f"{samples}: reward mean of 9 samples of 3 prompts, mean {read_rewards(Samples(samples), 'mean').mean():.4g}, "
        "0 prompts skipped\n",
    )
    assert score("--reward", f"{file}:calls", "--name", "other", "--batch-size", "3")[0] == 0
    assert {path.name: path.read_bytes() for path in samples.iterdir() if path.is_file()} == before
    (samples / "rewards" / "empty").mkdir()  # as a run that was killed at once leaves it
    assert reward_names(samples) == ["mean", "other"]
    assert read_rewards(Samples(samples), "other").tolist() == [3.0] * 9
    assert len(set(read_rewards(Samples(samples), "mean"))) == 9
    # The same again computes nothing: the function would raise.
    again = [path.stat().st_mtime_ns for path in sorted(samples.rglob("*.json"))]
    assert score("--reward", f"{file}:mean")[0] == 0
    assert [path.stat().st_mtime_ns for path in sorted(samples.rglob("*.json"))] == again
    # Another function does not mix with these rewards.
    code, _, error = score("--reward", f"{file}:calls", "--name", "mean")
    assert code == 2 and "holds rewards of another function, or of another version of it" in error
    with pytest.raises(Emu3Error, match=r"has no rewards 'third' \(it has mean, other\): run emu3-jax score"):
        read_rewards(Samples(samples), "third")


def test_skipped_prompts_are_named_counted_and_tried_again(score, samples, file):
    code, out, _ = score("--reward", f"{file}:star")
    line = line_of('raise ValueError("no stars")')
    assert code == 0 and out.splitlines()[0] == (
        f"skipped: prompt 0: reward star: 'a red star': ValueError: no stars (line {line})"
    )
    assert "of 6 samples of 2 prompts" in out and out.endswith(", 1 prompt skipped\n")
    assert np.isnan(read_rewards(Samples(samples), "star")[:3]).all()
    file.with_name("fixed").touch()
    assert score("--reward", f"{file}:star")[1].endswith(", 0 prompts skipped\n")
    assert np.isfinite(read_rewards(Samples(samples), "star")).all()


def test_a_run_goes_on_and_hosts_share_the_shards(score, samples, file):
    assert score("--reward", f"{file}:mean", "--host", "1", "--hosts", "2")[0] == 0
    with pytest.raises(Emu3Error, match="1 of 2 shards have no rewards yet: run the same emu3-jax score again"):
        read_rewards(Samples(samples), "mean")
    first = samples / "rewards" / "mean" / "shard-00001-of-00002.json"
    when = first.stat().st_mtime_ns
    assert score("--reward", f"{file}:mean")[0] == 0 and first.stat().st_mtime_ns == when
    assert np.isfinite(read_rewards(Samples(samples), "mean")).all()


def test_what_cannot_be_scored_leaves_nothing(score, samples, file, tmp_path):
    for options, line in (
        (
            ("--reward", "procedural"),
            "all 3 prompts were skipped; the first: 'a red star': ValueError: the prompt ",
        ),
        (("--reward", f"{file}:missing"), "the file defines no function missing; correct it"),
        (("--reward", f"{file}:mean", "--workers", "0"), "workers is 0"),
        (("--reward", f"{file}:mean", "--name", "../x"), "the name '../x' is no Python name"),
        (("--reward", f"{file}:mean", "--data", "x"), "--data is for the reward judge"),
        (("--reward", "judge", "--data", str(tmp_path)), "items.jsonl: there is no such file"),
    ):
        code, out, error = score(*options)
        assert (code, out, error.count("\n")) == (2, "", 1) and line in error
        assert not [path for path in samples.rglob("*.json") if "rewards" in path.parts]


def test_samples_of_another_vision_tokenizer_are_refused(score, samples, file):
    index = samples / "index.json"
    index.write_text(index.read_text().replace('"sha256": "', '"sha256": "0'))
    code, _, error = score("--reward", f"{file}:mean")
    assert code == 2 and "was drawn with another vision tokenizer: give --model BUNDLE, the model that drew it" in error


def test_damaged_rewards_are_named(score, samples, file):
    assert score("--reward", f"{file}:mean")[0] == 0
    stored = samples / "rewards" / "mean" / "shard-00000-of-00002.json"
    good = json.loads(stored.read_text())
    for change in (
        {"samples": "other"}, {"format": 2}, {"rewards": {"0": ["x"]}}, {"rewards": {"0": [1.0]}}, {"rewards": [1]},
    ):  # fmt: skip
        stored.write_text(json.dumps(good | change))
        with pytest.raises(Emu3Error, match=f"{stored.name}.* delete it and run the same emu3-jax score again"):
            read_rewards(Samples(samples), "mean")


# ------------------------------------------------------------------------------------------------ shipped rewards


def test_procedural_is_the_share_of_attributes_that_are_right():
    still = Still("red", "circle", "small", "gray", "left")
    others = (still, Still("blue", "circle", "small", "gray", "left"), Still("blue", "star", "large", "white", "right"))
    pictures = [rasterise_still(one, 64) for one in others]
    assert procedural([still.caption] * 3, pictures) == [1.0, 0.8, 0.0]
    assert procedural(["A small red circle on a gray background."] * 2, pictures[:2]) == [1.0, 0.75]
    centre = Still("red", "circle", "small", "gray", "center")
    assert procedural([centre.caption, still.caption], [rasterise_still(centre, 64)] * 2) == [1.0, 0.8]
    several = Arrangement.parse("two red circles and one blue square on a white background")
    drawn = rasterise_arrangement(several, 64, np.random.default_rng(0))
    assert procedural([several.caption, several.caption.replace("two", "three")], [drawn] * 2) == [1.0, 0.25]
    with pytest.raises(ValueError, match="the prompt 'a cat' describes no procedural scene"):
        procedural(["a cat"], pictures[:1])
    with pytest.raises(ValueError, match="the picture has 32x64 pixels, it must be square"):
        procedural([still.caption], [pictures[0][:, :32]])


def test_shipped_rewards_run_in_workers_by_their_names():
    still = Still("red", "circle", "small", "gray", "left")
    with RewardPool(Reward.parse("procedural")) as pool:
        (scored,) = pool.score([Group(still.caption, [rasterise_still(still, 64)])])
    assert scored.rewards.tolist() == [1.0]
    assert set(pools.SHIPPED) == {"procedural", "judge"} and os.environ["JAX_PLATFORMS"] == "cpu"

"""Computes rewards of samples and stores them beside the samples. The work of `emu3-jax score`.

The rewards NAME of a directory of samples lie in its folder rewards/NAME. There each shard of samples has a JSON file,
which is written when all its prompts are scored. The samples themselves are never written again.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emu3_jax import storage
from emu3_jax.data import shard_directory
from emu3_jax.data.shards import Codebook, write_json
from emu3_jax.errors import Emu3Error
from emu3_jax.evaluation.config import GROUPS, JudgeConfig
from emu3_jax.evaluation.items import Data
from emu3_jax.evaluation.judge import judge_of
from emu3_jax.evaluation.reconstruction import Reconstructor
from emu3_jax.fields import is_number
from emu3_jax.foreign import reading
from emu3_jax.generation.codec import Vision, decode_picture
from emu3_jax.models.quantizer import CODEBOOK
from emu3_jax.preference.rewards import Group, Reward, RewardPool, Scored
from emu3_jax.preference.samples import DrawnSample, Samples
from emu3_jax.printable import shown
from emu3_jax.progress import Progress

FOLDER = "rewards"
FORMAT = 1
_AGAIN = "delete it and run the same emu3-jax score again"


@dataclasses.dataclass(frozen=True)
class ScoreOutcome:
    """The result of a run, over the shards of this process.

    Attributes:
        prompts: number of prompts that have rewards.
        samples: number of samples that have rewards.
        mean: mean reward of these samples.
        skipped: for each prompt that was skipped, a line that names it and the reward and gives the reason.
    """

    prompts: int
    samples: int
    mean: float
    skipped: tuple[str, ...]


@dataclasses.dataclass
class _ShardRewards:
    """The rewards of a shard: those of each group that has some, and the reason for each group that has none."""

    rewards: dict[int, list[float]]
    skipped: dict[int, str]


def score(
    samples: Samples,
    reward: Reward,
    pool: RewardPool,
    vision: Vision,
    *,
    output: str | Path | None = None,
    host: int = 0,
    hosts: int = 1,
    progress: bool | None = None,
) -> ScoreOutcome:
    """Computes a reward of all samples. Keeps rewards that an earlier run computed, and tries skipped prompts again.

    Args:
        samples: the samples.
        reward: the reward.
        pool: the workers that compute it.
        vision: the vision tokenizer that the samples were drawn with.
        output: directory of the samples, if `samples` is a copy of one in a bucket.
        host: number of this process among those that share the shards, from 0.
        hosts: number of these processes.
        progress: True shows a bar on a terminal and lines in a log, None only the bar, False nothing.

    Raises:
        Emu3Error: the samples are of another vision tokenizer, there are rewards of another function with this name,
            the reward cannot be loaded, or no prompt could be scored; then nothing is written.
    """
    codebook = Codebook.of(np.asarray(vision.params[CODEBOOK[0]][CODEBOOK[1]]))
    if codebook != samples.index.codebook:
        raise Emu3Error(
            f"{samples.directory} was drawn with another vision tokenizer: give --model BUNDLE, the model that drew it"
        )
    root = storage.place(samples.directory if output is None else output)
    folder = _Folder(root, reward.name, samples)
    about = {"function": reward.function, "file": reward.file and Path(reward.file).name, "digest": reward.digest()}
    mine = range(host, len(samples.shards), hosts)
    found: dict[int, _ShardRewards] = {}
    with shard_directory.held(folder.path, host, hosts, "scored"):
        for number in mine:
            found[number] = folder.read(number, about) or _ShardRewards({}, {})
        work = {
            number: [g for g in samples.groups(number) if g[0].group not in found[number].rewards] for number in mine
        }
        total = sum(map(len, work.values()))
        with Progress(progress, total, "prompts", name="score") as bar:
            for number, groups in work.items():
                if not groups:
                    continue
                _fill(found[number], groups, pool, vision, bar)
                if found[number].rewards:
                    folder.write(number, about, found[number])
        if not any(shard.rewards for shard in found.values()) and total:
            first = next(reason for shard in found.values() for reason in shard.skipped.values())
            raise Emu3Error(f"reward {reward.name}: all {total} prompts were skipped; the first: {first}")
        for number, shard in found.items():
            if not shard.rewards:
                folder.write(number, about, shard)
    values = [value for shard in found.values() for group in shard.rewards.values() for value in group]
    skipped = tuple(
        f"prompt {group}: reward {reward.name}: {reason}"
        for shard in found.values()
        for group, reason in shard.skipped.items()
    )
    return ScoreOutcome(sum(len(s.rewards) for s in found.values()), len(values), float(np.mean(values)), skipped)


def _fill(
    shard: _ShardRewards, groups: Sequence[list[DrawnSample]], pool: RewardPool, vision: Vision, bar: Progress
) -> None:
    """Scores groups, and puts the results into `shard`."""

    def decoded() -> Iterator[Group]:
        for group in groups:
            yield Group(group[0].prompt, [np.asarray(decode_picture(vision, one.codes)) for one in group])

    results: Iterator[Scored] = pool.score(decoded())
    for group, result in zip(groups, results, strict=True):
        number = group[0].group
        shard.skipped.pop(number, None)
        if result.rewards is None:
            shard.skipped[number] = f"{shown(group[0].prompt)}: {result.reason}"
        else:
            shard.rewards[number] = result.rewards.tolist()
        bar.update()


def read_rewards(samples: Samples, name: str, directory: str | Path | None = None) -> np.ndarray:
    """The rewards NAME of all samples, float64 [number of samples]; NaN for prompts that were skipped.

    Args:
        samples: the samples.
        name: name of the reward.
        directory: directory of the samples, if `samples` is a copy of one in a bucket.

    Raises:
        Emu3Error: there are no such rewards, shards of them are missing, or a file is damaged or of other samples.
    """
    root = storage.place(samples.directory if directory is None else directory)
    names = reward_names(root)
    if name not in names:
        known = f"it has {', '.join(names)}" if names else "it has none"
        raise Emu3Error(f"{root} has no rewards {shown(name)} ({known}): run emu3-jax score {root} --reward ...")
    folder = _Folder(root, name, samples)
    found = np.full(len(samples), np.nan)
    missing = 0
    for number in range(len(samples.shards)):
        shard = folder.read(number)
        if shard is None:
            missing += 1
            continue
        for group in samples.groups(number):
            values = shard.rewards.get(group[0].group)
            if values is not None:
                folder.check_count(number, group, values)
                found[[one.number for one in group]] = values
    if missing:
        raise Emu3Error(
            f"{folder.path}: {missing} of {len(samples.shards)} shards have no rewards yet: run the same emu3-jax "
            "score again"
        )
    return found


def reward_names(directory: str | Path) -> list[str]:
    """The names of the rewards of a directory of samples, sorted."""
    root = storage.place(directory) / FOLDER
    if storage.is_remote(root):
        return sorted({name.split("/", 1)[0] for name in storage.listing(root) if name.endswith(".json")})
    return sorted(
        {file.parent.name for file in root.glob("*/*.json")}
    )  # a run that was killed may leave an empty folder


class _Folder:
    """The files of one reward."""

    def __init__(self, root: Path, name: str, samples: Samples):
        self.path, self._samples = root / FOLDER / name, samples

    def _file(self, number: int) -> Path:
        return (self.path / self._samples.shards[number].file).with_suffix(".json")

    def read(self, number: int, about: dict[str, Any] | None = None) -> _ShardRewards | None:
        """The rewards of a shard, or None if there are none. With `about`, they must be of this function."""
        file = self._file(number)
        try:
            data = storage.read_json(file, _AGAIN)
        except Emu3Error as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
        with reading(file, _AGAIN):
            if data["format"] != FORMAT or data["samples"] != self._samples.index.job:
                raise Emu3Error(f"{file} is of other samples or of another version: {_AGAIN}")
            if about is not None and data["reward"] != about:
                raise Emu3Error(
                    f"{self.path} holds rewards of another function, or of another version of it: choose another name "
                    "(--name NAME), or delete the folder"
                )
            rewards = {int(group): list(values) for group, values in data["rewards"].items()}
            if not all(is_number(value) for values in rewards.values() for value in values):
                raise Emu3Error(f"{file} is damaged (a reward is no number): {_AGAIN}")
            return _ShardRewards(rewards, {int(group): str(reason) for group, reason in data["skipped"].items()})

    def check_count(self, number: int, group: Sequence[DrawnSample], values: Sequence[float]) -> None:
        """Raises an `Emu3Error` if a group has another number of rewards than of samples."""
        if len(values) != len(group):
            found = f"{len(values)} rewards for {len(group)} samples of prompt {group[0].group}"
            raise Emu3Error(f"{self._file(number)} is damaged ({found}): {_AGAIN}")

    def write(self, number: int, about: dict[str, Any], shard: _ShardRewards) -> None:
        """Writes the rewards of a shard, all or nothing."""
        data = {
            "format": FORMAT,
            "samples": self._samples.index.job,
            "reward": about,
            "rewards": dict(sorted(shard.rewards.items())),
            "skipped": dict(sorted(shard.skipped.items())),
        }
        write_json(self._file(number), data)


def judge_settings(
    directory: str | Path, vision: Vision, config: JudgeConfig | None = None, progress: bool | None = None
) -> dict[str, Any]:
    """The settings of the reward `judge`. Trains the judge if the directory has none yet.

    Args:
        directory: directory of evaluation data, which scripts/build_emoji.py writes.
        vision: the vision tokenizer, whose reconstructions are part of the judge's training.
        config: settings of the judge's training; by default those of `evaluate`.
        progress: as in `progress.Progress`.

    Raises:
        Emu3Error: the directory has no evaluation data, or the judge cannot be stored there.
    """
    data, config, reconstruct = Data(directory), config or JudgeConfig(), Reconstructor(vision, 32, progress)
    judge, pixels = judge_of(data, config, GROUPS, reconstruct, reconstruct.digest(), progress)
    if judge.file is None:
        raise Emu3Error(f"{directory}: the judge cannot be stored there, and its workers read it: make it writable")
    known = set(judge.concepts)
    pictures = [item for item in data.where("picture", None, GROUPS) if item.concept in known]
    # A prompt may ask for a style in which the data have no picture: the judge looks only at the concept.
    styles = sorted({item.style for item in pictures})
    captions = {dataclasses.replace(item, style=style).caption: item.concept for item in pictures for style in styles}
    return {
        "file": str(judge.file.resolve()),
        "width": config.width,
        "side": list(pixels.shape[1:]),
        "concepts": list(judge.concepts),
        "captions": captions,
    }

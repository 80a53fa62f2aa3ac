"""Chooses preference pairs among samples, by rewards or by people's votes. The work of `emu3-jax pairs`."""

import collections
import csv
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from emu3_jax import storage
from emu3_jax.data import pairs as prepared
from emu3_jax.data.pairs import Pair, write_pairs
from emu3_jax.data.shards import Index
from emu3_jax.errors import Emu3Error
from emu3_jax.fields import is_count, is_number
from emu3_jax.foreign import read_bytes, reading
from emu3_jax.preference.samples import DrawnSample, Samples
from emu3_jax.printable import counted, shown

COLUMNS = ("chosen", "rejected")  # of a file of votes
_MAX_VOTES = 256 << 20  # bytes of a file of votes
_CORRECT = "correct the rows"


@dataclasses.dataclass(frozen=True)
class Choice:
    """Two samples of one prompt, by their numbers, and by how much the first is better."""

    chosen: int
    rejected: int
    margin: float


@dataclasses.dataclass(frozen=True)
class Choices:
    """Pairs that were chosen.

    Attributes:
        pairs: the pairs, in the order of the prompts.
        skipped: how many prompts (of rewards) or pairs (of votes) were left out, by reason.
    """

    pairs: tuple[Choice, ...]
    skipped: dict[str, int]


def by_reward(
    samples: Samples,
    rewards: np.ndarray,
    *,
    margin: float = 0.0,
    guidance: float | None = None,
    per_prompt: int = 1,
) -> Choices:
    """Pairs the best sample of each prompt with the worst. Among equal rewards the first sample counts.

    Args:
        samples: the samples.
        rewards: float64 [number of samples], NaN for samples without a reward.
        margin: least difference of the rewards. Equal rewards never make a pair.
        guidance: take only samples of this guidance scale; by default all.
        per_prompt: most pairs of a prompt: the second pair is the second best sample and the second worst, and so on.
            No sample is in two pairs.

    Raises:
        Emu3Error: `margin` or `per_prompt` is not legal, or no sample has this guidance scale.
    """
    _check_margin(margin)
    if not is_count(per_prompt):
        raise Emu3Error(f"per_prompt is {shown(per_prompt)}: it must be a whole number >= 1")
    found, skipped, seen = [], collections.Counter[str](), False
    for group in samples.groups():
        numbers = [one.number for one in group if guidance is None or one.guidance == guidance]
        seen = seen or bool(numbers)
        values = rewards[numbers]
        if np.isnan(values).any() or not numbers:
            skipped["without rewards"] += 1
            continue
        best, worst = np.argsort(-values, kind="stable"), np.argsort(values, kind="stable")
        pairs = [
            Choice(numbers[high], numbers[low], float(values[high] - values[low]))
            for high, low in zip(best[:per_prompt], worst[:per_prompt], strict=True)
        ]
        pairs = [
            pair
            for pair in pairs
            if pair.margin > 0 and pair.margin >= margin and not _equal(samples, pair.chosen, pair.rejected)
        ]
        if not pairs:
            skipped["without spread"] += 1
        found.extend(pairs)
    if not seen:
        raise Emu3Error(f"{samples.directory} has no samples of guidance scale {guidance:g}: choose another scale")
    return Choices(tuple(found), dict(skipped))


def _equal(samples: Samples, one: int, other: int) -> bool:
    return np.array_equal(samples[one].codes, samples[other].codes)


def by_votes(samples: Samples, file: str | Path, *, margin: float = 1.0) -> Choices:
    """Pairs two samples that people compared: the one with more votes is better.

    Args:
        samples: the samples.
        file: a CSV file in UTF-8 with a row for each vote. Its columns `chosen` and `rejected` name two samples of one
            prompt, by their numbers or by the names of their pictures (12, 000012.png, png/000012.png). Other columns
            are ignored.
        margin: least difference of the votes for both samples of a pair.

    Raises:
        Emu3Error: `margin` is not legal, the file is no such file, or names rows that are wrong.
    """
    _check_margin(margin)
    votes = _Votes(samples, Path(file)).count()
    found, skipped = [], collections.Counter[str]()
    for (low, high), lead in sorted(votes.items()):
        if not lead or abs(lead) < margin:
            skipped["tied" if not lead else "below the margin"] += 1
        elif _equal(samples, low, high):
            skipped["of equal pictures"] += 1
        else:
            chosen, rejected = (low, high) if lead > 0 else (high, low)
            found.append(Choice(chosen, rejected, float(abs(lead))))
    return Choices(tuple(found), dict(skipped))


class _Votes:
    """Reads a file of votes."""

    def __init__(self, samples: Samples, file: Path):
        self._samples, self._file = samples, file
        self._read: dict[int, DrawnSample] = {}

    def count(self) -> collections.Counter[tuple[int, int]]:
        """For each pair of samples that was voted on, smaller number first: votes for it minus votes for the other."""
        bad, votes = [], collections.Counter[tuple[int, int]]()
        with reading(self._file, "give a CSV file"):
            text = read_bytes(self._file, _MAX_VOTES, "give a CSV file").decode("utf-8-sig")
        rows = csv.DictReader(io.StringIO(text, newline=""), restval="")
        with reading(self._file, "give a CSV file"):
            missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
        if missing:
            raise Emu3Error(
                f"{self._file} has no column {' and '.join(missing)}: its first line must name the columns "
                f"{' and '.join(COLUMNS)}"
            )
        while True:
            with reading(self._file, "give a CSV file"):
                row = next(rows, None)
            if row is None:
                break
            try:
                chosen, rejected = (self._number(name, row[name]) for name in COLUMNS)
                self._check(chosen, rejected)
            except Emu3Error as error:
                bad.append(f"line {rows.line_num}: {error}")
                continue
            votes[min(chosen, rejected), max(chosen, rejected)] += 1 if chosen < rejected else -1
        if bad:
            more = f"; and {counted(len(bad) - 1, 'more bad row')}" if len(bad) > 1 else ""
            raise Emu3Error(f"{self._file} {bad[0]}{more}: {_CORRECT}")
        if not votes:
            raise Emu3Error(f"{self._file} has no votes: write one vote per row")
        return votes

    def _number(self, column: str, text: str) -> int:
        name = text.strip().removeprefix("png/").removesuffix(".png")
        if not (name.isascii() and name.isdigit() and len(name) < 20):
            raise Emu3Error(
                f"{column} is {shown(text)}: it must be a sample's number, or its picture such as 000012.png"
            )
        number = int(name)
        if number >= len(self._samples):
            raise Emu3Error(f"{column} is sample {number}, but there are samples 0 to {len(self._samples) - 1} only")
        return number

    def _check(self, chosen: int, rejected: int) -> None:
        if chosen == rejected:
            raise Emu3Error(f"both columns name sample {chosen}")
        groups = [self._sample(number).group for number in (chosen, rejected)]
        if groups[0] != groups[1]:
            raise Emu3Error(f"samples {chosen} and {rejected} are of different prompts ({groups[0]} and {groups[1]})")

    def _sample(self, number: int) -> DrawnSample:
        if number not in self._read:
            self._read[number] = self._samples[number]
        return self._read[number]


def write(samples: Samples, choices: Choices, output: str | Path) -> Index:
    """Writes the chosen pairs as data for training, all or nothing: see `data.pairs.write_pairs`.

    Raises:
        Emu3Error: there are no pairs, or `output` exists or cannot be written.
    """
    if not choices.pairs:
        reasons = ", ".join(f"{count} {reason}" for reason, count in choices.skipped.items())
        raise Emu3Error(f"{samples.directory} gives no pairs ({reasons}): lower the margin, or draw more samples")
    return write_pairs(_pairs(samples, choices), storage.place(output), samples.index.codebook)


def _pairs(samples: Samples, choices: Choices) -> Iterator[Pair]:
    for choice in choices.pairs:
        chosen, rejected = (
            prepared.Sample(one.prompt, one.codes) for one in (samples[choice.chosen], samples[choice.rejected])
        )
        yield Pair.of(f"samples {choice.chosen} and {choice.rejected}", chosen, rejected, choice.margin)


def _check_margin(margin: float) -> None:
    if not is_number(margin) or margin < 0:
        raise Emu3Error(f"margin is {shown(margin)}: it must be a number >= 0")

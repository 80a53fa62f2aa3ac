"""Rewards of answers that come with the package. A reward of your own may call them, for example to add two of them."""

import re
from collections.abc import Callable, Sequence

# What `answer_match` ignores at the end of an answer.
_FINAL = ".!?,;: "

AnswerReward = Callable[[Sequence[str], Sequence[str]], list[float]]


def answer_length(words: int) -> AnswerReward:
    """Makes the reward of short answers: 1 up to `words` words, then falling linearly to 0 at twice as many.

    Words are separated by blanks. An empty answer has no word.
    """

    def reward(_: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [min(1.0, max(0.0, 2 - len(answer.split()) / words)) for answer in answers]

    return reward


def answer_format(pattern: str) -> AnswerReward:
    """Makes the reward of a form: 1 if the whole answer matches a regular expression, else 0.

    Blanks at both ends of the answer do not count. "." also matches the end of a line. Some expressions take very long
    for some answers; the time-out of rewards ends them.
    """
    compiled = re.compile(pattern, re.DOTALL)

    def reward(_: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [float(compiled.fullmatch(answer.strip()) is not None) for answer in answers]

    return reward


def answer_match(questions: Sequence[str], answers: Sequence[str], references: Sequence[str | None]) -> list[float]:
    """1 where the answer equals the reference answer, else 0. Case, blanks and final punctuation do not count.

    Raises:
        ValueError: a question has no reference answer.
    """
    found = []
    for question, answer, reference in zip(questions, answers, references, strict=True):
        if reference is None:
            raise ValueError(f"the question {question!r} has no reference answer")
        found.append(float(normalised(answer) == normalised(reference)))
    return found


def normalised(answer: str) -> str:
    """An answer without what `answer_match` ignores."""
    return " ".join(answer.casefold().split()).rstrip(_FINAL)

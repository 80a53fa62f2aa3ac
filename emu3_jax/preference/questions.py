"""Reads the questions of GRPO: a text file with one question a line, or a manifest FILE.jsonl. Each line of a manifest:

    {"text": QUESTION, "image": PATH, "answer": ...}
    {"conversation": [{"role": "user", "text": QUESTION}, {"role": "assistant", "text": ANSWER}], "image": PATH}

Only the question is needed. `answer` is the reference answer, which the reward gets. Paths are relative to the
manifest, as in manifests of `emu3-jax prepare`, see `data.manifest`.
"""

import dataclasses
from pathlib import Path
from typing import Any

from emu3_jax.data.manifest import Entry, Manifest
from emu3_jax.data.records import check_text
from emu3_jax.errors import Emu3Error
from emu3_jax.text.prompt_files import read_prompts


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, the picture that it is about, and the reference answer. The last two may be None."""

    text: str
    image: Path | None = None
    answer: str | None = None

    @property
    def identity(self) -> list[Any]:
        """What tells it from other questions, as JSON values: of the picture only the last names, as data may move."""
        image = self.image and Path(self.image.parent.name, self.image.name).as_posix()
        return [self.text, image, self.answer]


@dataclasses.dataclass(frozen=True)
class QuestionFile:
    """The questions of a file. Attributes and methods are as those of `text.prompt_files.PromptFile`."""

    name: str
    prompts: list[Question]
    lines: list[int]

    def place(self, question: int) -> str:
        """The file and the line of a question, which is given by its index in `prompts`."""
        return f"{self.name} line {self.lines[question]}"


def read_questions(path: str) -> QuestionFile:
    """Reads a file of questions.

    Raises:
        Emu3Error: the file cannot be read, has no question, or a line does not have the form in the module's docstring.
    """
    if Path(path).suffix.lower() != ".jsonl":
        found = read_prompts(path)
        return QuestionFile(found.name, [Question(text) for text in found.prompts], found.lines)
    manifest, questions, lines = Manifest(Path(path)), [], []
    for index in range(len(manifest)):
        entry, beside = manifest.read(index, "answer")
        number = manifest.line(index)
        try:
            questions.append(_question(entry, beside["answer"]))
        except Emu3Error as error:
            raise Emu3Error(f"{path} line {number}: {error}") from error
        lines.append(number)
    return QuestionFile(path, questions, lines)


def _question(entry: Entry, answer: Any) -> Question:
    if entry.clip is not None or entry.document:
        what = "clip" if entry.clip is not None else "document"
        raise Emu3Error(f"has a {what}: GRPO asks about one picture or none; remove the line")
    if answer is not None:
        answer = check_text("answer", answer)
    if not entry.conversation:
        if not entry.text.strip():
            raise Emu3Error("has no question: write it as text")
        return Question(entry.text, entry.image, answer)
    if entry.text or answer is not None:
        raise Emu3Error("has conversation beside text or answer: the conversation has question and answer; remove one")
    if len(entry.conversation) > 2:
        raise Emu3Error(f"the conversation has {len(entry.conversation)} turns: GRPO asks one question; keep two turns")
    asked, answered = entry.conversation
    return Question(asked.text, entry.image, answered.text)

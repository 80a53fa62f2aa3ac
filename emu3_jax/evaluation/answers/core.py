"""Answers to questions about pictures and clips, and how likely given answers are. The adapters share this."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from emu3_jax.errors import Emu3Error, RowError
from emu3_jax.fields import is_count
from emu3_jax.generation import defaults
from emu3_jax.generation.conversation import Showing
from emu3_jax.generation.language import Batching, answer
from emu3_jax.generation.log_probs import TextLogProb, text_log_probs
from emu3_jax.generation.pipeline import Emu3
from emu3_jax.generation.rows import Sampling
from emu3_jax.media.clips import Clip
from emu3_jax.media.inputs import Media, as_media
from emu3_jax.media.sizes import MAX_ELONGATION
from emu3_jax.printable import printable, shown
from emu3_jax.text.prompts import understanding_prompt

_log = logging.getLogger("emu3_jax")

_BATCHES = 16  # batches whose pictures are encoded before they are answered, to batch rows of similar length
_READ = {"max_new_tokens", "until", "do_sample", "temperature", "top_p", "top_k", "num_beams"}
_told: set[str] = set()


@dataclasses.dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        text: the question.
        media: gives the pictures and clips. The model's template shows them in this order, before the text. It is
            called when the question's turn comes, because the pictures of a benchmark would not fit into memory.
        name: what error lines call the question.
    """

    text: str
    media: Callable[[], Sequence[Media]] = tuple
    name: str = "question"


@dataclasses.dataclass(frozen=True)
class AnswerSettings:
    """Settings of an answer, the same for all questions of a call.

    Attributes:
        max_new_tokens: largest number of tokens. Answers also end at the model's last position.
        until: texts that end an answer. The answer has neither them nor what follows.
        temperature: sampling temperature; 0 is greedy.
        top_p: total probability of the likeliest tokens to sample from.
        top_k: number of likeliest tokens to sample from.
    """

    max_new_tokens: int = defaults.MAX_NEW_TOKENS
    until: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = defaults.TOP_P
    top_k: int = defaults.TOP_K

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "AnswerSettings":
        """Settings from the generation arguments of a task, which have the names of transformers'.

        `do_sample=False` is greedy, whatever the temperature. None means the default. A warning names arguments that
        have no effect here, once.

        Raises:
            Emu3Error: `until` is no text, or `num_beams` asks for a beam search.
        """
        known = {name: value for name, value in given.items() if name in _READ and value is not None}
        for name in sorted(given.keys() - _READ - _told):
            _told.add(name)
            _log.warning("generation argument %s has no effect on Emu3's answers", printable(str(name)))
        until = known.pop("until", ())
        until = (until,) if isinstance(until, str) else tuple(until)
        if not all(isinstance(text, str) for text in until):
            raise Emu3Error(f"until is {shown(until)}: it must be a text or a list of texts")
        beams = known.pop("num_beams", 1)
        if beams != 1:
            raise Emu3Error(f"num_beams is {shown(beams)}: there is no beam search here; set it to 1")
        if known.pop("do_sample", True) is False:
            known["temperature"] = 0.0
        # transformers calls "no limit" 0.
        known["top_k"] = known.get("top_k") or cls.top_k
        return cls(until=tuple(text for text in until if text), **known)


class Answerer:
    """Answers questions with a model in memory."""

    def __init__(
        self,
        model: Emu3,
        *,
        batch_size: int = defaults.BATCH_SIZE,
        showing: Showing | None = None,
        seed: int = defaults.SEED,
        parallel: int | str = defaults.PARALLEL,
        progress: bool | None = None,
    ):
        """Checks the settings.

        Args:
            model: a model of Emu3. It needs a vision tokenizer only if something is shown.
            batch_size: number of rows to compute at once.
            showing: how clips are shown; by default as `Emu3.chat` shows them.
            seed: seed of the first answer of a call; each next one adds 1. Greedy answers do not depend on it.
            parallel: number of tokens of a pass; see `Emu3.chat`.
            progress: True shows a progress bar on a terminal and lines in a log, None only the bar, False nothing.

        Raises:
            Emu3Error: a setting is not legal, or the model is of Emu3.5.
        """
        model.language.require_emu3()
        Sampling(seed=seed)
        self._model, self._seed = model, seed
        self._batching = Batching(batch_size, progress, parallel=parallel)
        self._showing = showing or Showing()

    def answers(self, questions: Sequence[Question], settings: AnswerSettings) -> list[str]:
        """Answers questions.

        Returns:
            One answer per question, without control tokens and without what follows a text of `until`.

        Raises:
            Emu3Error: a question is not legal, does not fit into the model's positions, or shows what is no picture;
                the line begins with its name. Or a setting is not legal.
        """
        language = self._model.language
        found: dict[int, str] = {}
        for indices, prompts in self._prompts(questions):
            order = np.argsort([len(ids) for ids in prompts], kind="stable")[::-1]
            sampling = Sampling(
                settings.temperature, settings.top_k, settings.top_p, guidance=1.0,
                seed=[(self._seed + indices[place]) % 2**32 for place in order],
            )  # fmt: skip
            try:
                rows = answer(
                    language, [prompts[place] for place in order], sampling, max_new_tokens=settings.max_new_tokens,
                    batching=self._batching,
                )  # fmt: skip
            except RowError as error:
                raise _named(questions[indices[order[error.row]]], error.reason) from error
            for place, ids in zip(order, rows, strict=True):
                text = language.tokenizer.decode(ids.tolist(), skip_special=True)
                found[indices[place]] = cut(text, settings.until)
        return [found[index] for index in range(len(questions))]

    def log_probs(self, questions: Sequence[Question], continuations: Sequence[str]) -> list[TextLogProb]:
        """Computes how likely each question is answered with its continuation.

        The continuation is encoded apart from the question, as answers are generated and trained. A space at its
        beginning counts.

        Raises:
            Emu3Error: as for `answers`; or a continuation is empty or has a control token.
        """
        language = self._model.language
        found: list[TextLogProb] = []
        for indices, prompts in self._prompts(questions):
            texts = [self._continuation(questions[index], continuations[index]) for index in indices]
            try:
                found += text_log_probs(language, prompts, texts, batch_size=self._batching.batch_size)
            except RowError as error:
                raise _named(questions[indices[error.row]], error.reason) from error
        return found

    def _continuation(self, question: Question, text: str) -> list[int]:
        if not text:
            raise _named(question, "the continuation is empty: give at least one character")
        try:
            return self._model.language.tokenizer.encode(text)
        except Emu3Error as error:
            raise _named(question, f"continuation: {error}") from error

    def _prompts(self, questions: Sequence[Question]) -> Iterator[tuple[range, list[list[int]]]]:
        """Yields the indices and the prompts' ids of several batches at a time: codes of all would not fit."""
        previous: Question | None = None
        ids: list[int] = []
        step = _BATCHES * self._batching.batch_size
        for first in range(0, len(questions), step):
            indices, prompts = range(first, min(first + step, len(questions))), []
            for index in indices:
                if questions[index] is not previous:  # choices of one question follow each other
                    previous, ids = questions[index], self._prompt(questions[index])
                prompts.append(ids)
            yield indices, prompts

    def _prompt(self, question: Question) -> list[int]:
        language = self._model.language
        try:
            codes = [
                part
                for item in question.media()
                for part in self._showing.codes(self._model.vision, fitted(item), language.config.clip_frames)
            ]
            return understanding_prompt(
                language.tokenizer, language.config.tokens, language.templates, question.text, codes
            )
        except Emu3Error as error:
            raise _named(question, str(error)) from error


def _named(question: Question, reason: str) -> Emu3Error:
    return Emu3Error(f"{printable(question.name)}: {reason}")


def cut(text: str, until: Sequence[str]) -> str:
    """`text` before the first place where one of the texts `until` begins."""
    return text[: min((place for end in until if (place := text.find(end)) >= 0), default=len(text))]


def fitted(item: Media) -> Image.Image | Clip:
    """A clip as it is, or a picture in RGB that is not too elongated for the model: black bars are added where needed.

    Raises:
        Emu3Error: the item is neither a picture nor a clip.
    """
    media = as_media(item)
    if isinstance(media, Clip):
        return media
    width, height = media.size
    wanted = max(width, -(-height // MAX_ELONGATION)), max(height, -(-width // MAX_ELONGATION))
    if wanted == media.size:
        return media
    padded = Image.new("RGB", wanted)
    padded.paste(media, ((wanted[0] - width) // 2, (wanted[1] - height) // 2))
    return padded


def whole_number(name: str, value: Any) -> int:
    """A number of a harness's command line, which may come as a text. Raises `Emu3Error` if it is not at least 1."""
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if not is_count(number):
        raise Emu3Error(f"{name} is {shown(value)}: it must be a whole number >= 1")
    return number

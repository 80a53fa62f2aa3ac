"""Rollouts of GRPO: answers that the present model draws to questions, as texts and as rows of a training batch."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from emu3_jax.data.manifest import check_area, resize_to_area
from emu3_jax.errors import Emu3Error
from emu3_jax.generation.codec import Vision
from emu3_jax.generation.language import Batching, Language, answer
from emu3_jax.generation.rows import Sampling
from emu3_jax.media.images import load_image, preprocess, resize
from emu3_jax.models.vision import make_encoder
from emu3_jax.preference.questions import Question, QuestionFile
from emu3_jax.preference.rollouts import right_aligned
from emu3_jax.text.prompts import understanding_prompt
from emu3_jax.training.grpo_config import GrpoConfig

_KEPT = 4096  # pictures whose codes are kept: at 512x512 pixels, 64 MB


@dataclasses.dataclass(frozen=True, eq=False)
class DrawnAnswers:
    """Answers that the model drew.

    Attributes:
        prompts: ids of the prompt of each answer.
        ids: the ids that were drawn, int32 [tokens]. An answer that was not cut off ends with EOS.
        texts: the answers as texts, without control tokens.
        cut: number of answers that were cut off.
    """

    prompts: Sequence[Sequence[int]]
    ids: Sequence[np.ndarray]
    texts: Sequence[str]
    cut: int


class Answerer:
    """Draws the answers of one config. `vision` is called only for questions about pictures."""

    def __init__(self, config: GrpoConfig, vision: Callable[[], Vision], mesh: Mesh):
        assert config.max_new_tokens is not None
        self._config, self._vision, self._most = config, vision, config.max_new_tokens
        self._replicate = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._codes = functools.lru_cache(_KEPT)(self._encode)
        self._shape = functools.cache(self._codes_shape)

    def check(self, language: Language, questions: QuestionFile, length: int) -> None:
        """Raises `Emu3Error` for a question that is not legal, or whose answer does not fit into a row of `length`.

        Opens all pictures, but does not encode them yet.
        """
        language.require_emu3()
        room = min(length, language.config.max_positions)
        if self._config.area is not None and any(question.image for question in questions.prompts):
            check_area(self._config.area, self._vision().config.spatial_factor, "grpo.area")

        @functools.cache  # the same question is often asked about many pictures
        def prompt_length(text: str, shape: tuple[int, int] | None) -> int:
            codes = None if shape is None else np.zeros(shape, np.int32)
            return len(self._prompt(language, text, codes))

        for number, question in enumerate(questions.prompts):
            place = questions.place(number)
            if self._config.reward == "answer_match" and question.answer is None:
                raise Emu3Error(f"{place}: it has no answer, which the reward answer_match needs: write one")
            try:
                shape = None if question.image is None else self._shape(question.image)
                tokens = prompt_length(question.text, shape) + self._most
            except Emu3Error as error:
                raise Emu3Error(f"{place}: {error}") from error
            if tokens > room:
                raise Emu3Error(
                    f"{place}: the question and its answer take up to {tokens} tokens, there is room for {room}: "
                    "shorten the question, raise data.sequence_length, or lower grpo.max_new_tokens or grpo.area"
                )

    def draw(self, language: Language, questions: Sequence[Question], seeds: np.ndarray) -> DrawnAnswers:
        """Draws one answer to each question.

        Args:
            language: the model.
            questions: a question for each answer.
            seeds: uint32 [answers].
        """
        config, count = self._config, len(questions)
        prompts = [
            self._prompt(language, one.text, None if one.image is None else self._codes(one.image)) for one in questions
        ]
        sampling = Sampling(config.temperature, language.config.vocab_size, 1.0, 1.0, seeds.tolist())
        batching = Batching(config.at_once(count), False, parallel=config.parallel)
        made = answer(language, prompts, sampling, max_new_tokens=self._most, batching=batching)
        eos = language.config.tokens.eos
        ends = [np.flatnonzero(ids == eos) for ids in made]
        ids = [ids[: end[0] + 1] if end.size else ids for ids, end in zip(made, ends, strict=True)]
        texts = [language.tokenizer.decode(one.tolist(), skip_special=True) for one in ids]
        return DrawnAnswers(prompts, ids, texts, sum(not end.size for end in ends))

    def samples(self, drawn: DrawnAnswers) -> Sequence[str]:
        """The answers as texts, which the reward gets."""
        return drawn.texts

    def figures(self, drawn: DrawnAnswers) -> dict[str, float]:
        """Further metrics of a step: the mean number of tokens of an answer, and the share that was cut off."""
        return {"answer_tokens": float(np.mean([len(ids) for ids in drawn.ids])), "cut_off": drawn.cut / len(drawn.ids)}

    def batch_rows(
        self, drawn: DrawnAnswers, kept: np.ndarray, mine: Sequence[int], length: int
    ) -> dict[str, np.ndarray]:
        """The rows of a training batch, see `objectives.Groups`. Answers end at the last column.

        Args:
            drawn: the answers.
            kept: bool [N], which answers count.
            mine: numbers of the rows to make.
            length: tokens of a row.
        """

        def row(number: int) -> tuple[Sequence[int], np.ndarray, np.ndarray]:
            ids = drawn.ids[number]
            return drawn.prompts[number], ids, np.full(len(ids), kept[number])

        return right_aligned(map(row, mine), len(mine), length)

    def _prompt(self, language: Language, question: str, codes: np.ndarray | None) -> list[int]:
        """The ids of a question, as `conversation.answer_questions` makes them."""
        tokens = language.config.tokens
        return understanding_prompt(language.tokenizer, tokens, language.templates, question, codes)

    def _picture(self, path: Path) -> Image.Image:
        picture, area = load_image(path), self._config.area
        resized: Any = picture if area is None else resize_to_area(picture, area)
        return resized

    def _codes_shape(self, path: Path) -> tuple[int, int]:
        """Rows and columns of a picture's codes."""
        vision = self._vision()
        factor = vision.config.spatial_factor
        try:
            width, height = resize(self._picture(path), vision.image, factor).size
        except Emu3Error as error:
            raise Emu3Error(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error
        return height // factor, width // factor

    def _encode(self, path: Path) -> np.ndarray:
        """A picture's codes, int32 [h, w], on every process."""
        vision = self._vision()
        # A NumPy array: to the programs of several processes it is the same on all of them.
        pixels: Any = preprocess(self._picture(path), vision.image, vision.config.spatial_factor)[None]
        return np.asarray(self._replicate(make_encoder(vision.config)(vision.params, pixels)))[0]

"""From a prepared record to one training sequence: the tasks that a model is trained on. Pure functions.

A sequence's `loss_mask` says which of its tokens are targets: token i, predicted from the tokens before it. What the
three losses select:

    "vision"  the visual tokens; not the ends of lines, frames and pictures between them, as in the reference
    "text"    the text that the task is about: captions, documents, and of a conversation the answers, with the EOS
              after a document or an answer
    "all"     every token
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Protocol

import numpy as np

from emu3_jax.config import SpecialTokens
from emu3_jax.data.records import Record, Turn
from emu3_jax.errors import Emu3Error
from emu3_jax.text.prompts import PromptTemplates, clip_ids, image_ids, next_turn_prompt, understanding_prompt
from emu3_jax.text.tokenizer import Tokenizer

LOSSES = ("vision", "text", "all")


@dataclasses.dataclass(frozen=True, eq=False)
class TokenSequence:
    """Tokens, int32 [S], and which of them are targets, bool [S]."""

    tokens: np.ndarray
    loss_mask: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


class Task(Protocol):
    """How records become sequences. `prompt_dropout` is how often training asks for `drop_prompt`."""

    prompt_dropout: float

    def sequence(
        self, record: Record, tokenizer: Tokenizer, templates: PromptTemplates, drop_prompt: bool = False
    ) -> TokenSequence:
        """The record's sequence. Raises `Emu3Error` if the record is not of the task's kind."""


@dataclasses.dataclass(frozen=True)
class TextToImage:
    """BOS, caption, BOI, size, IMG, rows each with EOL, EOF, EOI: what the reference trains Emu3-Gen on.

    Attributes:
        loss: one of `LOSSES`.
        prompt_dropout: share of sequences without caption, which classifier-free guidance needs.
        eos: ends sequences with EOS, which the reference does not.
    """

    loss: str = "vision"
    prompt_dropout: float = 0.05
    eos: bool = False

    def __post_init__(self) -> None:
        _check_loss(self.loss)
        _check_dropout(self.prompt_dropout)

    def sequence(
        self, record: Record, tokenizer: Tokenizer, templates: PromptTemplates, drop_prompt: bool = False
    ) -> TokenSequence:
        codes = _codes(record, 2, "text to image needs a picture")
        media = image_ids(tokenizer, tokenizer.special, codes)
        return _captioned(record, media, tokenizer, loss=self.loss, eos=self.eos, drop_prompt=drop_prompt)


@dataclasses.dataclass(frozen=True)
class NextFrame:
    """BOS, caption, BOI, the size as `frames*rows*columns`, IMG, the frames of latents, EOI.

    How frames stand in the row is the model's `clip_layout`, see `text.prompts.clip_ids`. A model that is trained so
    also goes on from given frames: those are the row's beginning.

    Attributes:
        loss: one of `LOSSES`.
        prompt_dropout: share of sequences without caption.
        eos: ends sequences with EOS.
    """

    loss: str = "vision"
    prompt_dropout: float = 0.05
    eos: bool = False

    def __post_init__(self) -> None:
        _check_loss(self.loss)
        _check_dropout(self.prompt_dropout)

    def sequence(
        self, record: Record, tokenizer: Tokenizer, templates: PromptTemplates, drop_prompt: bool = False
    ) -> TokenSequence:
        codes = _codes(record, 3, "next frame needs a clip")
        media = clip_ids(tokenizer, tokenizer.special, codes, templates.clip_layout)
        return _captioned(record, media, tokenizer, loss=self.loss, eos=self.eos, drop_prompt=drop_prompt)


@dataclasses.dataclass(frozen=True)
class ImageToText:
    """The model's chat template with the picture or clip and a question, the answer and EOS; more turns follow in kind.

    A record without conversation is its text as the answer to `question`. An answer is encoded by itself, because it
    begins where the prompt's tokens end when the model is asked. Records of text alone are plain conversations.

    Attributes:
        loss: one of `LOSSES`.
        question: what captions answer.
    """

    loss: str = "text"
    question: str = "Please describe the image"

    prompt_dropout: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        _check_loss(self.loss)

    def sequence(
        self, record: Record, tokenizer: Tokenizer, templates: PromptTemplates, drop_prompt: bool = False
    ) -> TokenSequence:
        special = tokenizer.special
        turns = record.conversation or (Turn("user", self.question), Turn("assistant", record.text))
        pieces = []
        for number, (question, answer) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
            if number == 0:
                prompt = understanding_prompt(tokenizer, special, templates, question.text, record.codes)
            else:
                prompt = next_turn_prompt(tokenizer, special, templates, question.text)
            pieces += [(prompt, False), ([*tokenizer.encode(answer.text), special.eos], True)]
        return _assemble(pieces, special, self.loss)


@dataclasses.dataclass(frozen=True)
class TextOnly:
    """BOS, the text, EOS. `loss` is one of `LOSSES`."""

    loss: str = "text"

    prompt_dropout: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        _check_loss(self.loss)

    def sequence(
        self, record: Record, tokenizer: Tokenizer, templates: PromptTemplates, drop_prompt: bool = False
    ) -> TokenSequence:
        if not record.text:
            raise Emu3Error("has no text: take the record out, or train on its conversation with ImageToText")
        special = tokenizer.special
        pieces = [([special.bos], False), ([*tokenizer.encode(record.text), special.eos], True)]
        return _assemble(pieces, special, self.loss)


TASKS = (TextToImage, NextFrame, ImageToText, TextOnly)


def padded_row(
    sequence: TokenSequence, length: int, pad: int, *, loss_on_padding: bool = False
) -> dict[str, np.ndarray]:
    """One sequence alone in a row: `tokens`, `segment_ids` (1, and 0 on padding), `positions`, `loss_mask`; each [S].

    Args:
        sequence: no longer than `length`.
        length: S.
        pad: id that fills the row on the right.
        loss_on_padding: makes padding a target, a defect of the reference outside its vision-only loss. Only for
            reproducing its numbers.
    """
    # By assignment, not by np.pad, which takes ten times as long: this is done for every record.
    size = len(sequence)
    tokens, loss_mask = np.full(length, pad, np.int32), np.full(length, loss_on_padding)
    segment_ids, positions = np.zeros(length, np.int32), np.zeros(length, np.int32)
    tokens[:size], loss_mask[:size] = sequence.tokens, sequence.loss_mask
    segment_ids[:size], positions[:size] = 1, np.arange(size)
    return {"tokens": tokens, "segment_ids": segment_ids, "positions": positions, "loss_mask": loss_mask}


def _captioned(
    record: Record, media: list[int], tokenizer: Tokenizer, *, loss: str, eos: bool, drop_prompt: bool
) -> TokenSequence:
    special = tokenizer.special
    caption = [] if drop_prompt else tokenizer.encode(record.text)
    end = [special.eos] if eos else []
    return _assemble([([special.bos], False), (caption, True), ([*media, *end], False)], special, loss)


def _assemble(pieces: Sequence[tuple[list[int], bool]], special: SpecialTokens, loss: str) -> TokenSequence:
    """Joins pieces of ids; each is marked if it is the text that the task is about."""
    tokens = np.array([i for ids, _ in pieces for i in ids], np.int32)
    if loss == "vision":
        mask = (tokens >= special.visual_start) & (tokens < special.visual_end)
    elif loss == "text":
        mask = np.repeat([about for _, about in pieces], [len(ids) for ids, _ in pieces])
    else:
        mask = np.ones(len(tokens), bool)
    return TokenSequence(tokens, mask)


def _codes(record: Record, axes: int, needed: str) -> np.ndarray:
    if record.codes is None or record.codes.ndim != axes:
        kind = "plain text" if record.codes is None else {2: "a picture", 3: "a clip"}[record.codes.ndim]
        raise Emu3Error(f"is {kind}, and {needed}: prepare such records apart, or choose another task")
    return record.codes


def _check_loss(loss: str) -> None:
    if loss not in LOSSES:
        raise Emu3Error(f"loss is {loss!r}: it must be one of {', '.join(LOSSES)}")


def _check_dropout(share: float) -> None:
    if not isinstance(share, int | float) or not 0 <= share <= 1:
        raise Emu3Error(f"prompt_dropout is {share!r}: it must be a share from 0 to 1")

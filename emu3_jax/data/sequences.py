"""Tasks: pure functions that convert a prepared record to a training sequence.

The `loss_mask` of a sequence marks its targets. A target is a token that the model learns to predict from all earlier
tokens. The loss of a task selects the targets:

    "vision"  visual tokens, without the EOL, EOF and EOI between them, as in the reference
    "text"    captions, documents with their EOS, and in conversations the answers with their EOS
    "all"     every token
    "answers" of documents: all that the model writes by itself, texts and pictures, with EOS
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np

from emu3_jax.config import SpecialTokens
from emu3_jax.data.records import PAIRS, Record, Turn
from emu3_jax.errors import Emu3Error
from emu3_jax.text.prompts import PromptTemplates, clip_ids, image_ids, next_turn_prompt, understanding_prompt
from emu3_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from emu3_jax.data.pairs import Pair  # it needs ArrayRecord, which configs must not

LOSSES = ("vision", "text", "all")
DOCUMENT_LOSSES = ("answers", *LOSSES)


@dataclasses.dataclass(frozen=True, eq=False)
class TokenSequence:
    """A training sequence: `tokens` int32 [S], and `loss_mask` bool [S], which marks the targets."""

    tokens: np.ndarray
    loss_mask: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True, eq=False)
class PairSequence:
    """The training sequences of a preference pair's two sides. Its length is that of the longer one."""

    chosen: TokenSequence
    rejected: TokenSequence

    def __len__(self) -> int:
        return max(len(self.chosen), len(self.rejected))


class Task(Protocol):
    """Interface of tasks for records.

    `prompt_dropout` is the share of sequences that training builds with `drop_prompt`.
    """

    prompt_dropout: float

    def sequence(
        self, record: Record, tokenizer: Tokenizer, templates: PromptTemplates, drop_prompt: bool = False
    ) -> TokenSequence:
        """Builds the record's sequence. Raises an `Emu3Error` if the record does not suit the task."""


@dataclasses.dataclass(frozen=True)
class TextToImage:
    """Text to picture: BOS, caption, BOI, size, IMG, each row followed by EOL, then EOF, EOI.

    The reference trains Emu3-Gen on these sequences.

    Attributes:
        loss: one of `LOSSES`.
        prompt_dropout: share of sequences without caption. Classifier-free guidance needs some.
        eos: end sequences with EOS. The reference does not.
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
    """Text to clip: BOS, caption, BOI, the size as `frames*rows*columns`, IMG, the latent frames, EOI.

    The model's `clip_layout` determines the order of a frame's tokens, see `text.prompts.clip_ids`. A model trained on
    this task can also continue a clip, because the given frames are the beginning of a sequence.

    Attributes:
        loss: one of `LOSSES`.
        prompt_dropout: share of sequences without caption.
        eos: end sequences with EOS.
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
    """Picture or clip to text: the model's chat template with media and question, the answer, EOS, then further turns.

    A record without conversation becomes a single turn: `question`, answered by the record's text. A record without
    picture and clip becomes a conversation in plain text. Answers are encoded separately from their prompts, because
    a model that generates an answer also starts after the last token of the prompt.

    Attributes:
        loss: one of `LOSSES`.
        question: the question for records without conversation.
    """

    loss: str = "text"
    question: str = "Please describe the image"

    prompt_dropout: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        _check_loss(self.loss)

    def sequence(
        self, record: Record, tokenizer: Tokenizer, templates: PromptTemplates, drop_prompt: bool = False
    ) -> TokenSequence:
        if record.document:
            raise Emu3Error("is a document: train on it with Interleaved")
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
    """Plain text: BOS, the text, EOS. `loss` is one of `LOSSES`."""

    loss: str = "text"

    prompt_dropout: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        _check_loss(self.loss)

    def sequence(
        self, record: Record, tokenizer: Tokenizer, templates: PromptTemplates, drop_prompt: bool = False
    ) -> TokenSequence:
        if not record.text:
            raise Emu3Error("has no text: remove the record, or train on its conversation with ImageToText")
        special = tokenizer.special
        pieces = [([special.bos], False), ([*tokenizer.encode(record.text), special.eos], True)]
        return _assemble(pieces, special, self.loss)


@dataclasses.dataclass(frozen=True)
class Interleaved:
    """Documents of texts and pictures in any order, each ended by EOS. `Emu3.interleave` continues them.

    In a document with roles, the parts of each user's turn fill the model's chat template, as in `Emu3.interleave`:
    pictures first, then the texts, joined by line breaks. What the assistant writes follows in its order, then EOS. A
    document without roles is BOS, its parts, EOS. The losses "text" and "vision" select from what the assistant writes;
    in a document without roles that is everything after BOS.

    Attributes:
        loss: one of `DOCUMENT_LOSSES`.
        prompt_dropout: share of sequences without any text, for guidance of visual tokens: the unconditional prompt of
            `Emu3.interleave` has the pictures alone. Such a sequence has visual targets only. Without effect if the
            loss selects no visual tokens.
    """

    loss: str = "answers"
    prompt_dropout: float = 0.1

    def __post_init__(self) -> None:
        _check_loss(self.loss, DOCUMENT_LOSSES)
        _check_dropout(self.prompt_dropout)

    def sequence(
        self, record: Record, tokenizer: Tokenizer, templates: PromptTemplates, drop_prompt: bool = False
    ) -> TokenSequence:
        if not record.document:
            raise Emu3Error("is no document: prepare such records separately, or choose another task")
        drop = drop_prompt and self.loss != "text"
        special = tokenizer.special
        pieces: list[tuple[list[int], bool]] = []
        turns = [(role, list(parts)) for role, parts in itertools.groupby(record.document, lambda part: part.role)]
        if turns[0][0] is None:
            pieces.append(([special.bos], False))
        for role, parts in turns:
            if role == "user":
                prompt = next_turn_prompt if pieces else understanding_prompt
                codes = [part.codes for part in parts if part.codes is not None]
                text = "" if drop else "\n".join(part.text for part in parts if part.codes is None)
                pieces.append((prompt(tokenizer, special, templates, text, codes), False))
                continue
            for part in parts:
                if part.codes is not None:
                    pieces.append((image_ids(tokenizer, special, part.codes), True))
                elif not drop:
                    pieces.append((tokenizer.encode(part.text), True))
            pieces.append(([special.eos], True))
        wanted = "vision" if drop else self.loss
        whole = _assemble(pieces, special, "all" if wanted == "all" else "text")
        if wanted in ("answers", "all"):
            return whole
        visual = (whole.tokens >= special.visual_start) & (whole.tokens < special.visual_end)
        return TokenSequence(whole.tokens, whole.loss_mask & (visual if wanted == "vision" else ~visual))


@dataclasses.dataclass(frozen=True)
class Preference:
    """Preference pairs, which `emu3-jax pairs` wrote: the sequence of each side. Training needs a `PreferenceConfig`.

    The sequences are those of `TextToImage`, `NextFrame` and `ImageToText`, so prompts are the ones that the model saw
    when it drew the samples. The targets are the tokens that the model drew: visual tokens, or all ids of an answer.
    """

    prompt_dropout: ClassVar[float] = 0.0
    reads: ClassVar[str] = PAIRS

    def sequence(
        self, pair: "Pair", tokenizer: Tokenizer, templates: PromptTemplates, drop_prompt: bool = False
    ) -> PairSequence:
        """Builds the sequences of both sides. Raises an `Emu3Error` if the model has no such code or token id."""
        chosen, rejected = (self._side(pair, tokens, tokenizer, templates) for tokens in (pair.chosen, pair.rejected))
        return PairSequence(chosen, rejected)

    def _side(
        self, pair: "Pair", tokens: np.ndarray, tokenizer: Tokenizer, templates: PromptTemplates
    ) -> TokenSequence:
        if tokens.ndim > 1:
            task = TextToImage(prompt_dropout=0.0) if tokens.ndim == 2 else NextFrame(prompt_dropout=0.0)
            return task.sequence(Record(pair.name, pair.prompt, tokens), tokenizer, templates)
        if tokens.max() >= tokenizer.vocab_size:
            raise Emu3Error(
                f"token id {tokens.max()} of an answer is out of range, the model has {tokenizer.vocab_size} ids: "
                "give pairs that this model drew"
            )
        special = tokenizer.special
        prompt = understanding_prompt(tokenizer, special, templates, pair.prompt, pair.pictures)
        return _assemble([(prompt, False), (tokens.tolist(), True)], special, "text")


TASKS = (TextToImage, NextFrame, ImageToText, TextOnly, Interleaved, Preference)


def padded_row(
    sequence: TokenSequence, length: int, pad: int, *, loss_on_padding: bool = False
) -> dict[str, np.ndarray]:
    """Pads one sequence to a row.

    Args:
        sequence: at most `length` tokens.
        length: S, the length of the row.
        pad: id that fills the row on the right.
        loss_on_padding: makes padding tokens targets. The reference does so by mistake, except with its vision-only
            loss. Use it only to reproduce the reference's numbers. Then padding sees the sequence and goes on counting
            positions, as in the reference.

    Returns:
        `tokens`, `segment_ids` (1, and on padding 0, or -1 with `loss_on_padding`), `positions` and `loss_mask`, each
        [S].
    """
    # Assignments take a tenth of the time of np.pad. This function runs for every record.
    size = len(sequence)
    tokens, loss_mask = np.full(length, pad, np.int32), np.full(length, loss_on_padding)
    segment_ids, positions = np.zeros(length, np.int32), np.zeros(length, np.int32)
    tokens[:size], loss_mask[:size] = sequence.tokens, sequence.loss_mask
    segment_ids[:size], positions[:size] = 1, np.arange(size)
    if loss_on_padding:
        segment_ids[size:], positions[size:] = -1, np.arange(size, length)
    return {"tokens": tokens, "segment_ids": segment_ids, "positions": positions, "loss_mask": loss_mask}


def padded_pair(pair: PairSequence, length: int, pad: int) -> dict[str, np.ndarray]:
    """Pads both sides of a pair to rows: arrays [2, S] as of `padded_row`, the chosen side first."""
    sides = [padded_row(side, length, pad) for side in (pair.chosen, pair.rejected)]
    return {name: np.stack([side[name] for side in sides]) for name in sides[0]}


def _captioned(
    record: Record, media: list[int], tokenizer: Tokenizer, *, loss: str, eos: bool, drop_prompt: bool
) -> TokenSequence:
    special = tokenizer.special
    caption = [] if drop_prompt else tokenizer.encode(record.text)
    end = [special.eos] if eos else []
    return _assemble([([special.bos], False), (caption, True), ([*media, *end], False)], special, loss)


def _assemble(pieces: Sequence[tuple[list[int], bool]], special: SpecialTokens, loss: str) -> TokenSequence:
    """Concatenates pieces of ids. The flag of a piece says whether the loss "text" selects it."""
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
        kind = "a document" if record.document else "plain text"
        if record.codes is not None:
            kind = {2: "a picture", 3: "a clip"}[record.codes.ndim]
        raise Emu3Error(f"is {kind}, but {needed}: prepare such records separately, or choose another task")
    return record.codes


def _check_loss(loss: str, legal: Sequence[str] = LOSSES) -> None:
    if loss not in legal:
        raise Emu3Error(f"loss is {loss!r}: it must be one of {', '.join(legal)}")


def _check_dropout(share: float) -> None:
    if not isinstance(share, int | float) or not 0 <= share <= 1:
        raise Emu3Error(f"prompt_dropout is {share!r}: it must be a share from 0 to 1")

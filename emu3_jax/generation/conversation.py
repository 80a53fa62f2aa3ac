"""Answers questions about pictures and clips, alone or as turns of a conversation."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from emu3_jax.errors import Emu3Error
from emu3_jax.generation import defaults
from emu3_jax.generation.codec import Vision, encode
from emu3_jax.generation.kept import Kept
from emu3_jax.generation.language import Batching, Language, answer
from emu3_jax.generation.rows import Sampling, texts_per_row
from emu3_jax.media.clips import Clip, resample
from emu3_jax.media.frames import check_resampling
from emu3_jax.media.inputs import Media, as_media
from emu3_jax.printable import shown
from emu3_jax.text.prompts import next_turn_prompt, understanding_prompt

CLIPS_AS = ("auto", "clip", "images")
_FRAMES_SHOWN = 8  # default frames of a clip shown as pictures: each frame takes as many tokens as a picture


@dataclasses.dataclass(frozen=True)
class Showing:
    """How a clip is shown in a prompt.

    Attributes:
        clips_as: "clip" shows latent frames of one clip, for models that were trained on clips. "images" shows frames
            as pictures; published models know only this. "auto" chooses what suits the model.
        frames: number of frames, spread over the clip; with `fps`, the largest number from its start. By default all
            frames, but at most the training length of clips, or at most 8 pictures.
        fps: frames to show per second.
    """

    clips_as: str = "auto"
    frames: int | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        if self.clips_as not in CLIPS_AS:
            raise Emu3Error(f"clips_as is {shown(self.clips_as)}: it must be one of {', '.join(CLIPS_AS)}")
        check_resampling(self.fps, self.frames)  # checked even if only pictures are shown

    def codes(self, vision: Vision, item: Media, trained: int | None) -> list[np.ndarray]:
        """The codes of a picture or clip, as a list: [h, w] for each picture, or one [t, h, w] for a clip.

        Args:
            vision: vision tokenizer that encodes.
            item: the picture or clip.
            trained: frames per clip in the decoder's training (`DecoderConfig.clip_frames`), or None.

        Raises:
            Emu3Error: the item is neither a picture nor a clip, or `frames` or `fps` does not fit it.
        """
        media = as_media(item)
        if not isinstance(media, Clip):
            return [encode(vision, item)]
        together = self.clips_as == "clip" or (self.clips_as == "auto" and trained is not None)
        most = (trained or len(media.frames)) if together else _FRAMES_SHOWN
        if self.frames is None and self.fps is None and len(media.frames) > most:
            media = resample(media, None, most)
        else:
            media = resample(media, self.fps, self.frames)
        return [encode(vision, media)] if together else [encode(vision, frame) for frame in media.frames]


@dataclasses.dataclass(frozen=True)
class Asking:
    """Settings of questions and answers, the same for all turns of a conversation.

    Attributes:
        showing: how clips are shown in a prompt.
        sampling: sampling settings of answers.
        batching: batching of rows.
        max_new_tokens: largest number of tokens of an answer.
        allow_special: whether control tokens in questions take effect.
    """

    showing: Showing
    sampling: Sampling
    batching: Batching
    max_new_tokens: int = defaults.MAX_NEW_TOKENS
    allow_special: bool = False

    def answer(self, language: Language, inputs: Sequence[Sequence[int]], kept: Kept | None = None) -> list[np.ndarray]:
        """The ids of each row's answer; see `language.answer`."""
        return answer(
            language, inputs, self.sampling, max_new_tokens=self.max_new_tokens, batching=self.batching, kept=kept
        )


def _codes(
    language: Language, vision: Callable[[], Vision], showing: Showing, media: Media | Sequence[Media]
) -> list[np.ndarray]:
    """The codes of all pictures and clips of one question."""
    return [codes for item in _several(media) for codes in showing.codes(vision(), item, language.config.clip_frames)]


def _several(value: Any) -> list[Any]:
    """The entries of a list or tuple. Any other value becomes a list of one."""
    return list(value) if isinstance(value, list | tuple) else [value]


def answer_questions(
    language: Language,
    vision: Callable[[], Vision],
    media: Media | Sequence[Media | Sequence[Media]],
    questions: str | Sequence[str],
    asking: Asking,
) -> list[str]:
    """Answers one question per picture, clip or sequence of them; see `Emu3.chat`.

    `vision` is called only if something is shown, so questions alone need no vision tokenizer.
    """
    rows = _several(media)
    if not rows:
        raise Emu3Error("there is no picture: give at least one")
    inputs = [
        understanding_prompt(
            language.tokenizer, language.config.tokens, language.templates, text,
            _codes(language, vision, asking.showing, shown), allow_special=asking.allow_special,
        )
        for text, shown in zip(texts_per_row("prompts", questions, len(rows), "item"), rows, strict=True)
    ]  # fmt: skip
    answers = asking.answer(language, inputs)
    return [language.tokenizer.decode(ids.tolist(), skip_special=True) for ids in answers]


def dialogue_prompt(
    language: Language, history: Sequence[tuple[str, str]], text: str, codes: Sequence[np.ndarray]
) -> list[int]:
    """The ids of a question after earlier turns, as `Conversation` builds them. Control tokens in texts are refused.

    Args:
        language: the decoder.
        history: earlier turns, (question, answer) each, oldest first.
        text: the question.
        codes: codes [h, w] of pictures, which belong to the first turn.
    """
    tokens, prompt = language.config.tokens, understanding_prompt
    ids: list[int] = []
    for question, answered in history:
        ids += prompt(language.tokenizer, tokens, language.templates, question, [] if ids else codes)
        ids += [*language.tokenizer.encode(answered), tokens.eos]
        prompt = next_turn_prompt
    return ids + prompt(language.tokenizer, tokens, language.templates, text, [] if ids else codes)


class Conversation:
    """A conversation with a model; made by `Emu3.converse`.

    Later turns compute only what is new, because the keys and values of earlier turns are kept.

    Attributes:
        turns: the questions and answers so far.
    """

    def __init__(self, language: Language, vision: Callable[[], Vision], asking: Asking):
        """`vision` is called only if something is shown, so questions alone need no vision tokenizer."""
        self.turns: list[tuple[str, str]] = []
        self._language, self._vision, self._asking = language, vision, asking
        self._ids: list[int] = []
        self._kept = Kept()

    def ask(self, text: str, media: Media | Sequence[Media] = ()) -> str:
        """Answers a question about everything shown so far.

        Args:
            text: the question.
            media: pictures and clips to show with this question.

        Returns:
            The answer.

        Raises:
            Emu3Error: bad input, or the conversation no longer fits into the model's positions. The conversation does
                not change then.
        """
        language, asking = self._language, self._asking
        codes = _codes(language, self._vision, asking.showing, media)
        prompt = next_turn_prompt if self._ids else understanding_prompt
        turn = prompt(
            language.tokenizer, language.config.tokens, language.templates, text, codes,
            allow_special=asking.allow_special,
        )  # fmt: skip
        (generated,) = asking.answer(language, [[*self._ids, *turn]], self._kept)
        eos = language.config.tokens.eos
        ids = generated.tolist()
        ids = ids[: ids.index(eos)] if eos in ids else ids
        self._ids += [*turn, *ids, eos]
        self.turns.append((text, language.tokenizer.decode(ids, skip_special=True)))
        return self.turns[-1][1]

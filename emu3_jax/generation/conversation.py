"""Answers questions about pictures and clips, alone or as turns of a conversation."""

# `help(Emu3)` shows annotations as they are written here, `Media` and not the union that it stands for.
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

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


class Model(Protocol):
    """What a conversation needs of an `Emu3`."""

    @property
    def language(self) -> Language:
        """The decoder."""

    @property
    def vision(self) -> Vision:
        """The vision tokenizer."""


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


def chat(
    self: Model,
    images: Media | Sequence[Media | Sequence[Media]],
    prompts: str | Sequence[str],
    *,
    clips_as: str = "auto",
    frames: int | None = None,
    fps: float | None = None,
    max_new_tokens: int = defaults.MAX_NEW_TOKENS,
    temperature: float | Sequence[float] = 0.0,
    top_k: int | Sequence[int] = defaults.TOP_K,
    top_p: float | Sequence[float] = defaults.TOP_P,
    seed: int | Sequence[int] = defaults.SEED,
    allow_special: bool = False,
    batch_size: int = defaults.BATCH_SIZE,
    deterministic: bool = False,
    parallel: int | str = defaults.PARALLEL,
    progress: bool | None = None,
) -> list[str]:
    """Answers one prompt per picture or clip (upstream `multimodal_understanding.py`).

    Args:
        images: one picture or clip (PIL image, `Clip` or file), or a sequence with one entry per row. An entry may
            be a sequence of pictures and clips, which are shown in order, or an empty sequence.
        prompts: one question for all rows, or one per row.
        clips_as: "clip" shows a clip as a clip, "images" shows its frames as pictures, "auto" does what the model
            was trained for.
        frames: number of frames to show per clip; by default the training length, or 8 if shown as pictures.
        fps: frames to show per second of a clip; by default `frames` frames are spread over the whole clip.
        max_new_tokens: largest number of tokens of an answer. Answers also end at the model's last position.
        temperature: sampling temperature. 0, the default, always takes the likeliest token, as the reference does.
        top_k: sample from this number of likeliest tokens.
        top_p: sample from the smallest set of likeliest tokens with this total probability.
        seed: seed of the first row; each next row adds 1. Or one seed per row.
        allow_special: whether control tokens in prompts, such as `<|image start|>`, take effect. If False, such
            prompts are refused.
        batch_size: number of rows to compute at once, at most 4096. Device memory grows with it.
        deterministic: whether a row's result must not depend on the other rows, in any dtype. Each batch is padded
            to `batch_size` rows, which takes time. Results still depend on `batch_size`, `parallel`, the device,
            and the versions of JAX and XLA.
        parallel: number of tokens, 2 to 128, that a pass of the decoder checks per row. "off" decodes one token per
            pass. "auto" chooses a number on NVIDIA GPUs from Ampere on, and is "off" elsewhere. In float32 the
            result is that of "off", up to rounding.
        progress: True shows a progress bar on a terminal and lines in a log, None shows only the bar, False
            nothing.

    Returns:
        The answers, one per row.

    Raises:
        Emu3Error: bad input. The message says what is wrong and what to do.
    """
    asking = Asking(
        Showing(clips_as, frames, fps),
        Sampling(temperature, top_k, top_p, guidance=1.0, seed=seed),
        Batching(batch_size, progress, deterministic, parallel),
        max_new_tokens,
        allow_special,
    )
    return answer_questions(self.language, lambda: self.vision, images, prompts, asking)


def converse(
    self: Model,
    *,
    clips_as: str = "auto",
    frames: int | None = None,
    fps: float | None = None,
    max_new_tokens: int = defaults.MAX_NEW_TOKENS,
    temperature: float = 0.0,
    top_k: int = defaults.TOP_K,
    top_p: float = defaults.TOP_P,
    seed: int = defaults.SEED,
    allow_special: bool = False,
    parallel: int | str = defaults.PARALLEL,
    progress: bool | None = None,
) -> Conversation:
    """Starts a conversation of several turns, each with any number of pictures and clips.

    Call `conversation = model.converse()`, then `conversation.ask(text, media)` for each turn. Each answer is
    computed in a batch of its own, so other rows cannot change it.

    Args:
        clips_as: "clip" shows a clip as a clip, "images" shows its frames as pictures, "auto" does what the model
            was trained for.
        frames: number of frames to show per clip; by default the training length, or 8 if shown as pictures.
        fps: frames to show per second of a clip; by default `frames` frames are spread over the whole clip.
        max_new_tokens: largest number of tokens of an answer. Answers also end at the model's last position.
        temperature: sampling temperature. 0, the default, always takes the likeliest token, as the reference does.
        top_k: sample from this number of likeliest tokens.
        top_p: sample from the smallest set of likeliest tokens with this total probability.
        seed: seed of the answers.
        allow_special: control tokens in prompts, such as `<|image start|>`, act as such. By default they are
            refused.
        parallel: see `chat`.
        progress: True shows a progress bar on a terminal and lines in a log, None shows only the bar, False
            nothing.

    Raises:
        Emu3Error: bad input. The message says what is wrong and what to do.
    """
    asking = Asking(
        Showing(clips_as, frames, fps),
        Sampling(temperature, top_k, top_p, guidance=1.0, seed=seed),
        Batching(1, progress, parallel=parallel),
        max_new_tokens,
        allow_special,
    )
    return Conversation(self.language, lambda: self.vision, asking)

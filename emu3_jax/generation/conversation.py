"""Questions about pictures and clips, one after the other, each answered in the light of what came before."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from emu3_jax.errors import Emu3Error
from emu3_jax.generation import defaults
from emu3_jax.generation.codec import Vision, encode
from emu3_jax.generation.language import Batching, Language, answer
from emu3_jax.generation.rows import Sampling, per_row
from emu3_jax.media.clips import Clip, resample
from emu3_jax.media.frames import check_resampling
from emu3_jax.media.inputs import Media, as_media
from emu3_jax.printable import shown
from emu3_jax.text.prompts import next_turn_prompt, understanding_prompt

CLIPS_AS = ("auto", "clip", "images")
_FRAMES_SHOWN = 8  # of a clip as pictures, where nobody says: each takes as many tokens as a picture


@dataclasses.dataclass(frozen=True)
class Showing:
    """How a clip stands in a prompt.

    Attributes:
        clips_as: "clip", the latent frames of one clip, for models that were trained on such; "images", its frames as
            pictures one after the other, which is all that published models know; "auto", what suits the model.
        frames: so many are spread over the clip; with `fps`, at most so many from its beginning. By default all of
            them, but no more than the clips of the model's training have, and of pictures no more than 8.
        fps: frames per second that are shown.
    """

    clips_as: str = "auto"
    frames: int | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        if self.clips_as not in CLIPS_AS:
            raise Emu3Error(f"clips_as is {shown(self.clips_as)}: it must be one of {', '.join(CLIPS_AS)}")
        check_resampling(self.fps, self.frames)  # also where only pictures are shown

    def codes(self, vision: Vision, item: Media, trained: int | None) -> list[np.ndarray]:
        """Codes of a picture, [h, w], or of a clip: [t, h, w], or a list of [h, w].

        Args:
            vision: what encodes.
            item: the picture or clip.
            trained: frames of the clips that the decoder was trained on (`DecoderConfig.clip_frames`), or None.

        Raises:
            Emu3Error: the item is neither, or a number is not legal.
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
    """How questions are put and answered, the same for all turns of a conversation.

    Attributes:
        showing: how clips stand in a prompt.
        sampling: how tokens of answers are sampled.
        batching: how rows are computed.
        max_new_tokens: an answer's longest length.
        allow_special: lets control tokens in questions act as such.
    """

    showing: Showing
    sampling: Sampling
    batching: Batching
    max_new_tokens: int = defaults.MAX_NEW_TOKENS
    allow_special: bool = False

    def answer(self, language: Language, inputs: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """The ids of each row's answer; see `language.answer`."""
        return answer(language, inputs, self.sampling, max_new_tokens=self.max_new_tokens, batching=self.batching)


def _codes(
    language: Language, vision: Callable[[], Vision], showing: Showing, media: Media | Sequence[Media]
) -> list[np.ndarray]:
    """Codes of all that is shown with one question."""
    return [codes for item in _several(media) for codes in showing.codes(vision(), item, language.config.clip_frames)]


def _several(value: Any) -> list[Any]:
    """The entries of a list or tuple; anything else alone."""
    return list(value) if isinstance(value, list | tuple) else [value]


def answer_questions(
    language: Language,
    vision: Callable[[], Vision],
    media: Media | Sequence[Media | Sequence[Media]],
    questions: str | Sequence[str],
    asking: Asking,
) -> list[str]:
    """One answer for each picture, clip or sequence of such; see `Emu3.chat`. `vision` is called to show something."""
    rows = _several(media)
    if not rows:
        raise Emu3Error("there is no picture: give at least one")
    inputs = [
        understanding_prompt(
            language.tokenizer, language.config.tokens, language.templates, text,
            _codes(language, vision, asking.showing, shown), allow_special=asking.allow_special,
        )
        for text, shown in zip(per_row("prompts", questions, len(rows)), rows, strict=True)
    ]  # fmt: skip
    answers = asking.answer(language, inputs)
    return [language.tokenizer.decode(ids.tolist(), skip_special=True) for ids in answers]


class Conversation:
    """A conversation with a model; made by `Emu3.converse`.

    Attributes:
        turns: the questions and answers so far.
    """

    def __init__(self, language: Language, vision: Callable[[], Vision], asking: Asking):
        """`vision` is called when something is to be shown: questions alone need no vision tokenizer."""
        self.turns: list[tuple[str, str]] = []
        self._language, self._vision, self._asking = language, vision, asking
        self._ids: list[int] = []

    def ask(self, text: str, media: Media | Sequence[Media] = ()) -> str:
        """The answer to a question about all that was shown so far, and `media`, which are shown with the question.

        Raises:
            Emu3Error: on bad input, or where the conversation fills the model's positions. It stays as it was.
        """
        language, asking = self._language, self._asking
        codes = _codes(language, self._vision, asking.showing, media)
        prompt = next_turn_prompt if self._ids else understanding_prompt
        turn = prompt(
            language.tokenizer, language.config.tokens, language.templates, text, codes,
            allow_special=asking.allow_special,
        )  # fmt: skip
        (generated,) = asking.answer(language, [[*self._ids, *turn]])
        eos = language.config.tokens.eos
        ids = generated.tolist()
        ids = ids[: ids.index(eos)] if eos in ids else ids
        self._ids += [*turn, *ids, eos]
        self.turns.append((text, language.tokenizer.decode(ids, skip_special=True)))
        return self.turns[-1][1]

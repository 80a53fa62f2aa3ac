"""Questions about pictures and clips, one after the other, each answered in the light of what came before."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from emu3_jax.errors import Emu3Error
from emu3_jax.generation.codec import encode
from emu3_jax.media.clips import Clip, resample
from emu3_jax.media.inputs import Media, as_media
from emu3_jax.text.prompts import next_turn_prompt, understanding_prompt

if TYPE_CHECKING:
    from emu3_jax.generation.pipeline import Emu3

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

    def __post_init__(self):
        if self.clips_as not in CLIPS_AS:
            raise Emu3Error(f"clips_as is {self.clips_as!r}: it must be one of {', '.join(CLIPS_AS)}")

    def codes(self, model: "Emu3", item: Media) -> list[np.ndarray]:
        """Codes of a picture, [h, w], or of a clip: [t, h, w], or a list of [h, w].

        Raises:
            Emu3Error: the item is neither, or a number is not legal.
        """
        vision, media = model.vision, as_media(item)
        if not isinstance(media, Clip):
            return [encode(vision, item)]
        trained = model.language.config.clip_frames
        together = self.clips_as == "clip" or (self.clips_as == "auto" and trained is not None)
        most = (trained or len(media.frames)) if together else _FRAMES_SHOWN
        if self.frames is None and self.fps is None and len(media.frames) > most:
            media = resample(media, None, most)
        else:
            media = resample(media, self.fps, self.frames)
        return [encode(vision, media)] if together else [encode(vision, frame) for frame in media.frames]


class Conversation:
    """A conversation with a model; made by `Emu3.converse`.

    Attributes:
        turns: the questions and answers so far.
    """

    def __init__(self, model: "Emu3", showing: Showing, allow_special: bool, options: dict[str, Any]):
        """`options`: of `Emu3._answer`."""
        self.turns: list[tuple[str, str]] = []
        self._model, self._showing, self._allow_special, self._options = model, showing, allow_special, options
        self._ids: list[int] = []

    def ask(self, text: str, media: Media | Sequence[Media] = ()) -> str:
        """The answer to a question about all that was shown so far, and `media`, which are shown with the question.

        Raises:
            Emu3Error: on bad input, or where the conversation fills the model's positions. It stays as it was.
        """
        model = self._model
        media = media if isinstance(media, list | tuple) else [media]
        codes = [shown for item in media for shown in self._showing.codes(model, item)]
        language = model.language
        prompt = next_turn_prompt if self._ids else understanding_prompt
        turn = prompt(
            language.tokenizer, language.config.tokens, language.templates, text, codes,
            allow_special=self._allow_special,
        )  # fmt: skip
        (answer,) = model._answer([[*self._ids, *turn]], **self._options)
        eos = language.config.tokens.eos
        ids = answer.tolist()
        ids = ids[: ids.index(eos)] if eos in ids else ids
        self._ids += [*turn, *ids, eos]
        self.turns.append((text, language.tokenizer.decode(ids, skip_special=True)))
        return self.turns[-1][1]

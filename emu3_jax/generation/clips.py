"""Clips as they are generated: decoded while later frames are sampled, in passes that fit the model's positions."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from emu3_jax.errors import Emu3Error
from emu3_jax.generation.codec import Vision
from emu3_jax.generation.schedule import TokenClass
from emu3_jax.media.images import postprocess
from emu3_jax.models.vision import Stream, check_codes
from emu3_jax.text.prompts import generation_prompt

if TYPE_CHECKING:
    from emu3_jax.generation.pipeline import Language

# Told of frames: the row, the number of the first in its clip, and they themselves, uint8 [n, H, W, 3].
OnFrames = Callable[[int, int, np.ndarray], None]


class GrowingClip:
    """A clip whose new frames are decoded while later ones are sampled, each latent frame when its codes are complete.

    Decoding is queued behind the call of the decode loop that is under way, and the host takes the pixels when it is
    told of that call's tokens. So neither the device nor the host waits for the other.
    """

    def __init__(
        self,
        vision: Vision,
        visual_start: int,
        given: np.ndarray,
        count: int,
        shown: Callable[[int, np.ndarray], None] | None = None,
    ):
        """The clip begins as `given` (uint8 [T, H, W, 3], T may be 0).

        Args:
            vision: what decodes.
            visual_start: the id of code 0.
            given: the first frames.
            count: new frames; what latent frames bring beyond these is cut off.
            shown: called with the number of the first of some new frames in the clip, and these.
        """
        self._vision, self._visual_start, self._shown = vision, visual_start, shown
        self._frames = np.empty((len(given) + count, *given.shape[1:]), np.uint8)
        self._frames[: len(given)] = given
        self._length = len(given)
        self._drawn: list[jax.Array] = []  # pixels [1, T, H, W, 3] that the device was asked for

    @property
    def frames(self) -> np.ndarray:
        """uint8 [T, H, W, 3]: those there are."""
        return self._frames[: self._length]

    def begin(self, context: np.ndarray | None, schedule: np.ndarray) -> None:
        """Begins a pass of the decoder.

        Args:
            context: codes [t, h, w] of its first frames, which the clip has already, or None.
            schedule: the token classes that follow them.
        """
        config = self._vision.config
        height, width = (side // config.spatial_factor for side in self._frames.shape[1:3])
        self._context = np.zeros((0, height, width), np.int32) if context is None else context
        self._visual = schedule == TokenClass.VISUAL
        self._stream = Stream(config, self._vision.params, "decode", self._vision.fast)
        self._asked = 0  # latent frames of this pass, the context's included

    def take(self, ids: np.ndarray) -> None:
        """Takes the pass's ids (int [S]) as far as they are sampled; each time all from its beginning.

        Raises:
            Emu3Error: a code is outside the codebook.
        """
        self._collect()
        new = ids[self._visual[: len(ids)]] - self._visual_start
        codes = np.concatenate([self._context.ravel(), new]).astype(np.int32)
        height, width = self._context.shape[1:]
        whole = codes[: len(codes) // (height * width) * height * width].reshape(-1, height, width)
        for latent in whole[self._asked :]:
            check_codes(latent, self._vision.config)
            pixels = self._stream(latent[None, None])
            if self._asked >= len(self._context):
                self._drawn.append(pixels)
            self._asked += 1
        if len(new) == self._visual.sum():  # the pass is over: there will be no next call to wait for
            self._collect()

    def _collect(self) -> None:
        for pixels in self._drawn:
            first, room = self._length, len(self._frames) - self._length
            frames = postprocess(np.asarray(pixels)[0], self._vision.image)[:room]
            self._length += len(frames)
            self._frames[first : self._length] = frames
            if self._shown is not None:
                self._shown(first, frames)
        self._drawn = []


def latents_of_a_pass(
    language: "Language",
    factor: int,
    window: int | None,
    texts: Sequence[str],
    size: tuple[int, int],
    missing: int,
    extending: bool,
    allow_special: bool,
) -> int:
    """Latent frames of one pass, old and new.

    Args:
        language: the decoder.
        factor: frames of one latent frame.
        window: frames of one pass, if somebody says; see `Emu3.generate_clips`.
        texts: of all prompts.
        size: rows and columns of a latent frame.
        missing: latent frames that are to be generated.
        extending: whether others come before them.
        allow_special: see `Emu3.generate_clips`.

    Raises:
        Emu3Error: so many do not fit the model's positions, or are too few to slide.
    """
    config = language.config
    window = window or config.clip_frames
    frame = size[0] * (size[1] + (config.clip_layout == "lines")) + 1
    longest = max(
        len(generation_prompt(language.tokenizer, config.tokens, text, 999, *size, allow_special=allow_special))
        for text in texts
    )
    fits = (config.max_positions - longest - 2) // frame
    latents = min(fits, missing + missing * extending) if window is None else -(-window // factor)
    least = 1 + (extending or latents < missing > 1)  # where passes follow each other, each has old and new frames
    if fits < least:
        raise Emu3Error(
            f"beside the longest prompt the model's {config.max_positions} positions hold {max(fits, 0) * factor} "
            f"frames of {size[0]}x{size[1]} tokens, {least * factor} are needed: choose a smaller area or a shorter "
            "prompt"
        )
    if latents < least or latents > fits:
        needed = f"{least * factor} frames or more" if latents < least else f"{fits * factor} frames or less"
        raise Emu3Error(
            f"a window of {latents * factor} frames of {size[0]}x{size[1]} tokens does not do: with the longest "
            f"prompt the model's {config.max_positions} positions and the task call for {needed}; change the "
            "window, choose a smaller area or a shorter prompt"
        )
    return latents

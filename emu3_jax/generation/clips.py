"""Generates clips. Frames are decoded while later ones are sampled. Long clips take several passes of the decoder."""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from emu3_jax.errors import Emu3Error
from emu3_jax.fields import is_count
from emu3_jax.generation import defaults
from emu3_jax.generation.codec import Vision, encode_end
from emu3_jax.generation.language import Batching, Grid, Language, generate_grids
from emu3_jax.generation.rows import Sampling, per_row, prompt_list, texts_per_row
from emu3_jax.generation.sampling import RowSettings
from emu3_jax.generation.schedule import TokenClass, clip_schedule, frames_that_fit
from emu3_jax.media.clips import Clip, check_fps, resize_frames
from emu3_jax.media.images import postprocess
from emu3_jax.media.inputs import Media, as_media
from emu3_jax.media.sizes import generate_size
from emu3_jax.media.videos import MAX_FRAMES
from emu3_jax.models.vision import Stream, check_codes
from emu3_jax.printable import shown
from emu3_jax.text.prompts import generation_prompt

MOST_BYTES = 2**34  # largest total size of the new frames of all clips, which are held in memory

# A function that gets (row, index of the first frame in its clip, frames uint8 [n, H, W, 3]).
OnFrames = Callable[[int, int, np.ndarray], None]


class ClipTooLarge(Emu3Error):
    """The frames do not fit into the model's positions, or the window does not."""


class GrowingClip:
    """A clip that grows while it is generated. Each latent frame is decoded as soon as its codes are complete.

    Decoding is queued behind the running call of the decode loop. The host fetches the pixels when it gets the tokens
    of that call. So neither the device nor the host waits for the other.
    """

    def __init__(
        self,
        vision: Vision,
        visual_start: int,
        given: np.ndarray,
        count: int,
        shown: Callable[[int, np.ndarray], None] | None = None,
    ):
        """Starts a clip.

        Args:
            vision: vision tokenizer that decodes.
            visual_start: token id of code 0.
            given: first frames of the clip, uint8 [T, H, W, 3]; T may be 0.
            count: number of new frames. Surplus frames of the last latent frame are cut off.
            shown: function that gets new frames and the index of the first of them.
        """
        self._vision, self._visual_start, self._shown = vision, visual_start, shown
        self._frames = np.empty((len(given) + count, *given.shape[1:]), np.uint8)
        self._frames[: len(given)] = given
        self._length = len(given)
        self._pending: list[jax.Array] = []  # pixels [1, T, H, W, 3] that the device is decoding

    @property
    def frames(self) -> np.ndarray:
        """The frames so far, uint8 [T, H, W, 3]."""
        return self._frames[: self._length]

    @property
    def waiting(self) -> bool:
        """Whether the device was asked for frames that `collect` has not fetched."""
        return bool(self._pending)

    def begin(self, context: np.ndarray | None, schedule: np.ndarray) -> None:
        """Starts a pass of the decoder.

        Args:
            context: codes [t, h, w] of the pass's first frames, which the clip already has, or None.
            schedule: token classes after the context.
        """
        config = self._vision.clips()
        height, width = (side // config.spatial_factor for side in self._frames.shape[1:3])
        self._context = np.zeros((0, height, width), np.int32) if context is None else context
        self._visual = schedule == TokenClass.VISUAL
        self._stream = Stream(config, self._vision.params, "decode", self._vision.fast)
        self._asked = 0  # latent frames of this pass that were sent to decoding, including the context

    def take(self, ids: np.ndarray) -> None:
        """Takes all ids of the pass that are sampled so far, int [S], from the start of the pass.

        Raises:
            Emu3Error: a code is outside the codebook.
        """
        self.collect()
        self.send(ids)
        if np.count_nonzero(self._visual[: len(ids)]) == self._visual.sum():  # complete: there is no further call
            self.collect()

    def send(self, ids: np.ndarray) -> None:
        """As `take`, but only asks the device for the new frames. `collect` waits for them."""
        new = ids[self._visual[: len(ids)]] - self._visual_start
        codes = np.concatenate([self._context.ravel(), new]).astype(np.int32)
        height, width = self._context.shape[1:]
        whole = codes[: len(codes) // (height * width) * height * width].reshape(-1, height, width)
        for latent in whole[self._asked :]:
            check_codes(latent, self._vision.config)
            pixels = self._stream(latent[None, None])
            if self._asked >= len(self._context):
                self._pending.append(pixels)
            self._asked += 1

    def collect(self) -> None:
        """Waits for the frames that the device was asked for."""
        for pixels in self._pending:
            first, room = self._length, len(self._frames) - self._length
            frames = postprocess(np.asarray(pixels)[0], self._vision.image)[:room]
            self._length += len(frames)
            self._frames[first : self._length] = frames
            if self._shown is not None:
                self._shown(first, frames)
        self._pending = []


def generate_clips(
    language: Language,
    vision: Vision,
    prompts: str | Sequence[str],
    sampling: Sampling,
    *,
    frames: int,
    fps: float | None,
    extend: Media | Sequence[Media] | None,
    window: int | None,
    ratio: str | None,
    area: int | None,
    negative: str | Sequence[str],
    batching: Batching,
    allow_special: bool,
    on_frames: OnFrames | None,
) -> list[Clip]:
    """Generates one clip per prompt; see `Emu3.generate_clips`."""
    prompts = prompt_list(prompts)
    for name, number in {"frames": frames, **({} if window is None else {"window": window})}.items():
        if not is_count(number):
            raise Emu3Error(f"{name} is {shown(number)}: it must be a whole number >= 1")
    check_fps(fps)
    config, factor = language.config, vision.clips().temporal_factor
    media = [as_media(item) for item in per_row("extend", extend, len(prompts))] if extend is not None else []
    rates = [fps or (item.fps if isinstance(item, Clip) else defaults.FPS) for item in media or prompts]
    given = [item.frames if isinstance(item, Clip) else np.asarray(item)[None] for item in media]
    area = config.image_area if area is None else area
    size = generate_size(_common_ratio(given) if ratio is None else ratio, area, vision.config.spatial_factor)
    height, width = (side * vision.config.spatial_factor for side in size)
    most = min(MAX_FRAMES, MOST_BYTES // (height * width * 3 * len(prompts)))
    if frames > most:
        raise Emu3Error(
            f"frames is {shown(frames)}: it must be at most {most} for {len(prompts)} clips of {width}x{height} "
            "pixels; ask for fewer frames or clips"
        )
    settings = sampling.settings(len(prompts))
    negatives = texts_per_row("negative", negative, len(prompts))
    nothing = np.zeros((0, height, width, 3), np.uint8)
    missing = [-(-frames // factor)] * len(prompts)
    latents = [
        latents_of_a_pass(
            language, texts, size, factor=factor, window=window, missing=missing[0], extending=bool(given),
            allow_special=allow_special,
        )
        for texts in zip(prompts, negatives, strict=True)
    ]  # fmt: skip
    clips = [
        GrowingClip(
            vision,
            config.tokens.visual_start,
            resize_frames(given[row], height, width) if given else nothing,
            frames,
            on_frames and functools.partial(on_frames, row),
        )
        for row in range(len(prompts))
    ]
    while any(missing):
        # The passes of a row depend only on its own prompt and clip, not on other rows.
        rows = [row for row, count in enumerate(missing) if count]
        grids = []
        for row in rows:
            clip = clips[row]
            old, new = next_latents(latents[row], -(-len(clip.frames) // factor), missing[row])
            missing[row] -= new
            context = encode_end(vision, clip.frames, old) if old else None
            clip.begin(context, clip_schedule(old + new, *size, config.clip_layout, given=old))
            grids.append(Grid(prompts[row], negatives[row], (old + new, *size), context))
        on_tokens = functools.partial(_take, [clips[row] for row in rows])
        generate_grids(
            language, grids, settings.take(np.asarray(rows)), batching=batching, allow_special=allow_special,
            on_tokens=on_tokens,
        )  # fmt: skip
        settings = next_seeds(settings)
    return [Clip(clip.frames, rate) for clip, rate in zip(clips, rates, strict=True)]


def next_latents(latents: int, there: int, missing: int) -> tuple[int, int]:
    """The numbers of old and of new latent frames of the next pass.

    Args:
        latents: latent frames of a pass, from `latents_of_a_pass`.
        there: latent frames that the clip has.
        missing: latent frames that it lacks.
    """
    old = min(latents // 2, there)
    return old, min(latents - old, missing)


def next_seeds(settings: RowSettings) -> RowSettings:
    """The settings of the next pass: with equal seeds, each pass would resemble the previous one."""
    return settings.replace(seed=settings.seed + np.uint32(0x9E3779B9))


def _take(clips: Sequence[GrowingClip], batch: Sequence[int], ids: Sequence[np.ndarray]) -> None:
    """Passes the ids of a batch on to its clips; see `language.OnTokens`."""
    for index, row in zip(batch, ids, strict=True):
        clips[index].take(row)


def _common_ratio(given: Sequence[np.ndarray]) -> str:
    """The ratio of given frames [T, H, W, 3], or 1:1 without any. Raises `Emu3Error` if their sizes differ."""
    shapes = {frames.shape[1:3] for frames in given}
    if len(shapes) > 1:
        raise Emu3Error("the clips to extend differ in size: give one ratio, or extend them one by one")
    return "{1}:{0}".format(*shapes.pop()) if shapes else "1:1"


def latents_of_a_pass(
    language: Language,
    texts: Sequence[str],
    size: tuple[int, int],
    *,
    factor: int,
    window: int | None,
    missing: int,
    extending: bool,
    allow_special: bool,
) -> int:
    """The number of latent frames of one pass, old and new.

    Args:
        language: the decoder.
        texts: the prompt and the negative prompt.
        size: rows and columns of a latent frame.
        factor: frames per latent frame.
        window: frames per pass, or None; see `Emu3.generate_clips`.
        missing: number of latent frames to generate.
        extending: whether given frames come before them.
        allow_special: see `Emu3.generate_clips`.

    Raises:
        ClipTooLarge: the frames do not fit into the model's positions, or the window is too small for several passes.
    """
    config = language.config
    window = window or config.clip_frames
    longest = max(
        len(generation_prompt(language.tokenizer, config.tokens, text, 999, *size, allow_special=allow_special))
        for text in texts
    )
    fits = frames_that_fit(config.max_positions - longest, *size, config.clip_layout)
    latents = min(fits, missing + missing * extending) if window is None else -(-window // factor)
    least = 1 + (extending or latents < missing > 1)  # with several passes, each needs old and new frames
    if fits < least:
        raise ClipTooLarge(
            f"the model's {config.max_positions} positions hold the prompt and {max(fits, 0) * factor} frames of "
            f"{size[0]}x{size[1]} tokens, but {least * factor} frames are needed: choose a smaller area or a shorter "
            "prompt"
        )
    if latents < least or latents > fits:
        needed = f"{least * factor} frames or more" if latents < least else f"{fits * factor} frames or less"
        raise ClipTooLarge(
            f"a window of {latents * factor} frames of {size[0]}x{size[1]} tokens is not possible: with this prompt "
            f"and the model's {config.max_positions} positions it must have {needed}; change the window, or choose a "
            "smaller area or a shorter prompt"
        )
    return latents

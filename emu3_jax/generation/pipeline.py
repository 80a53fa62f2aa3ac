"""`Emu3`: a loaded model that generates pictures and clips, answers questions, and encodes and decodes codes."""

# `help(Emu3)` shows annotations as they are written here, `Media` and not the union that it stands for.
from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from emu3_jax.errors import Emu3Error
from emu3_jax.generation import conversation, defaults, documents, turns
from emu3_jax.generation.clips import OnFrames, generate_clips
from emu3_jax.generation.codec import Vision, decode, encode
from emu3_jax.generation.language import Batching, Language
from emu3_jax.generation.pictures import Generation, stream_pictures
from emu3_jax.generation.rows import Sampling
from emu3_jax.media.clips import Clip
from emu3_jax.media.inputs import Media


class Emu3:
    """A model in memory: a decoder, a vision tokenizer, or both. `emu3_jax.load` makes it.

    A row is one picture, clip or answer. In float32 a row's result does not depend on the other rows of its batch. In
    bfloat16 and float16 the number of rows and of tokens per pass (`parallel`) may change the rounding of products, and
    so change single tokens. `deterministic=True` makes rows independent of each other in these dtypes too.

    `Media` is a picture or a clip: a path, a PIL image, a `Clip`, or a uint8 array [H, W, 3] (picture) or [T, H, W, 3]
    (clip).
    """

    def __init__(self, name: str, language: Language | None = None, vision: Vision | None = None):
        self.name = name
        self._language = language
        self._vision = vision

    @property
    def language(self) -> Language:
        """The decoder. Raises `Emu3Error` if the bundle has none."""
        if self._language is None:
            raise Emu3Error(f"model {self.name} has no decoder: convert one into the bundle (emu3-jax convert)")
        return self._language

    @property
    def vision(self) -> Vision:
        """The vision tokenizer. Raises `Emu3Error` if the bundle has none."""
        if self._vision is None:
            raise Emu3Error(
                f"model {self.name} has no vision tokenizer: convert one into the bundle (emu3-jax convert), or load "
                "with vision=..."
            )
        return self._vision

    def tokenize(
        self,
        media: Sequence[Media],
        *,
        independent: bool = False,
        fps: float | None = None,
        frames: int | None = None,
        tile: int | None = None,
        area: int | None = None,
    ) -> list[np.ndarray]:
        """Encodes pictures to int32 codes [h, w], and clips to int32 codes [t, h, w] with t latent frames.

        A latent frame stands for `temporal_factor` frames (Emu3: 4). Codes hold no frame rate.

        A clip file is read and encoded in parts: memory does not grow with its length.

        Args:
            media: pictures (PIL images or files) and clips (`Clip`, animated files, videos or folders of frames). If
                the number of a clip's frames is no multiple of the temporal factor, its last frame is repeated.
            independent: cut clips into pieces of `temporal_factor` frames and encode each piece on its own, as
                the reference's script does. The codes differ.
            fps: resample clips to this frame rate first. Pictures do not change.
            frames: with `fps`, take at most the first `frames` frames of a clip; without it, take `frames` frames that
                are spread over the clip.
            tile: side of a tile in pixels, a multiple of the spatial factor. Larger frames are encoded in overlapping
                tiles, with the memory of one tile. The codes differ, because norms and attention see only one tile.
            area: only for the vision tokenizer of Emu3.5: resize pictures to about this number of pixels. By default
                the bundle's area, 1024 * 1024 after a conversion.

        Returns:
            The codes of each item, int32 [h, w] or [t, h, w].

        Raises:
            Emu3Error: bad input. The message says what is wrong and what to do.
        """
        vision = self.vision
        return [encode(vision, item, independent, fps=fps, frames=frames, tile=tile, area=area) for item in media]

    def detokenize(
        self,
        codes: Sequence[np.ndarray],
        *,
        independent: bool = False,
        frames: int | None = None,
        tile: int | None = None,
    ) -> list[Image.Image | Clip]:
        """Decodes codes: [h, w] to a picture, [t, h, w] to a clip of t * `temporal_factor` frames (Emu3: 4 * t).

        Codes hold no frame rate. The clips have 8 frames per second; make `Clip(clip.frames, fps)` for another rate.

        Args:
            codes: integer arrays, as `tokenize` returns them.
            independent: pass True for codes that `tokenize` made with `independent=True`, and for no others.
            frames: end clips after this many frames, to remove the frames that `tokenize` repeated.
            tile: side of a tile in pixels. Larger frames are decoded in overlapping tiles, which are blended. The
                pixels differ. The codes need not have been made in tiles.

        Returns:
            A picture or a clip for each array.

        Raises:
            Emu3Error: bad input. The message says what is wrong and what to do.
        """
        vision = self.vision
        return [decode(vision, np.asarray(item), independent, frames=frames, tile=tile) for item in codes]

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        n: int = 1,
        ratio: str | Sequence[str] = "1:1",
        area: int | None = None,
        negative: str | Sequence[str] = "",
        guidance: float | Sequence[float] = defaults.GUIDANCE,
        temperature: float | Sequence[float] = defaults.TEMPERATURE,
        top_k: int | Sequence[int] = defaults.TOP_K,
        top_p: float | Sequence[float] = defaults.TOP_P,
        seed: int | Sequence[int] = defaults.SEED,
        greedy: bool = False,
        allow_special: bool = False,
        batch_size: int = defaults.BATCH_SIZE,
        deterministic: bool = False,
        parallel: int | str = defaults.PARALLEL,
        zipar: int | None = None,
        progress: bool | None = None,
    ) -> list[Image.Image]:
        """Generates pictures for the prompts (upstream `image_generation.py`).

        Args:
            prompts: one prompt, or several.
            n: number of pictures per prompt. Each has its own seed.
            ratio: width:height, from 1:5 to 5:1. One for all prompts, or one per prompt.
            area: area of a picture in pixels, or None for the area that the model was trained for.
            negative: negative prompt: what to avoid. Guidance uses it as the unconditional prompt. One for all
                prompts, or one per prompt.
            guidance: classifier-free guidance scale. 1 means no guidance, and halves the work if all prompts have it.
                One for all prompts, or one per prompt.
            temperature: sampling temperature; 0 always takes the likeliest token. One for all prompts, or one per
                prompt.
            top_k: sample from this number of likeliest tokens. One for all prompts, or one per prompt.
            top_p: sample from the smallest set of likeliest tokens with this total probability. One for all prompts,
                or one per prompt.
            seed: seed of the first picture. Each next picture of the result adds 1. With one seed per prompt, the
                pictures of a prompt count up from its seed.
            greedy: the same as `temperature=0`.
            allow_special: whether control tokens in prompts, such as `<|image start|>`, take effect. If False, such
                prompts are refused.
            batch_size: number of rows to compute at once, at most 4096. Device memory grows with it.
            deterministic: whether a row's result must not depend on the other rows, in any dtype. Each batch is padded
                to `batch_size` rows, which takes time. Results still depend on `batch_size`, `parallel`, the device,
                and the versions of JAX and XLA.
            parallel: number of tokens, 2 to 128, that a pass of the decoder checks per row. "off" decodes one token per
                pass. "auto" chooses a number on NVIDIA GPUs from Ampere on, and is "off" elsewhere. In float32 the
                result is that of "off", up to rounding.
            zipar: number of tokens that a row of the picture is ahead of the next row. Rows are then computed
                together, in fewer passes. This changes the picture; small numbers give rough previews. None, or the
                number of columns and more, gives the exact picture. Not together with a number as `parallel`.
            progress: True shows a progress bar on a terminal and lines in a log, None shows only the bar, False
                nothing.

        Returns:
            The pictures, grouped by prompt: the first `n` pictures belong to prompt 0. `image.info` holds the
            prompt, the seed and all settings.

        Raises:
            Emu3Error: bad input. The message says what is wrong and what to do.
        """
        generations = self.stream_sequences(
            prompts, n=n, ratio=ratio, area=area, negative=negative, guidance=guidance, temperature=temperature,
            top_k=top_k, top_p=top_p, seed=seed, greedy=greedy, allow_special=allow_special, batch_size=batch_size,
            deterministic=deterministic, parallel=parallel, zipar=zipar, progress=progress,
        )  # fmt: skip
        images = {row: generation.image for row, generation in generations}
        return [images[row] for row in range(len(images))]

    def generate_sequences(
        self,
        prompts: str | Sequence[str],
        *,
        n: int = 1,
        ratio: str | Sequence[str] = "1:1",
        area: int | None = None,
        negative: str | Sequence[str] = "",
        guidance: float | Sequence[float] = defaults.GUIDANCE,
        temperature: float | Sequence[float] = defaults.TEMPERATURE,
        top_k: int | Sequence[int] = defaults.TOP_K,
        top_p: float | Sequence[float] = defaults.TOP_P,
        seed: int | Sequence[int] = defaults.SEED,
        greedy: bool = False,
        allow_special: bool = False,
        batch_size: int = defaults.BATCH_SIZE,
        deterministic: bool = False,
        parallel: int | str = defaults.PARALLEL,
        zipar: int | None = None,
        progress: bool | None = None,
    ) -> list[Generation]:
        """Generates pictures as `generate` does, and returns them with their tokens.

        Args:
            prompts: one prompt, or several.
            n: number of pictures per prompt. Each has its own seed.
            ratio: width:height, from 1:5 to 5:1. One for all prompts, or one per prompt.
            area: area of a picture in pixels, or None for the area that the model was trained for.
            negative: negative prompt: what to avoid. Guidance uses it as the unconditional prompt. One for all
                prompts, or one per prompt.
            guidance: classifier-free guidance scale. 1 means no guidance, and halves the work if all prompts have it.
                One for all prompts, or one per prompt.
            temperature: sampling temperature; 0 always takes the likeliest token. One for all prompts, or one per
                prompt.
            top_k: sample from this number of likeliest tokens. One for all prompts, or one per prompt.
            top_p: sample from the smallest set of likeliest tokens with this total probability. One for all prompts,
                or one per prompt.
            seed: seed of the first picture. Each next picture of the result adds 1. With one seed per prompt, the
                pictures of a prompt count up from its seed.
            greedy: the same as `temperature=0`.
            allow_special: whether control tokens in prompts, such as `<|image start|>`, take effect. If False, such
                prompts are refused.
            batch_size: number of rows to compute at once, at most 4096. Device memory grows with it.
            deterministic: whether a row's result must not depend on the other rows, in any dtype. Each batch is padded
                to `batch_size` rows, which takes time. Results still depend on `batch_size`, `parallel`, the device,
                and the versions of JAX and XLA.
            parallel: number of tokens, 2 to 128, that a pass of the decoder checks per row. "off" decodes one token per
                pass. "auto" chooses a number on NVIDIA GPUs from Ampere on, and is "off" elsewhere. In float32 the
                result is that of "off", up to rounding.
            zipar: number of tokens that a row of the picture is ahead of the next row. Rows are then computed
                together, in fewer passes. This changes the picture; small numbers give rough previews. None, or the
                number of columns and more, gives the exact picture. Not together with a number as `parallel`.
            progress: True shows a progress bar on a terminal and lines in a log, None shows only the bar, False
                nothing.

        Returns:
            A `Generation` for each picture, grouped by prompt.

        Raises:
            Emu3Error: bad input. The message says what is wrong and what to do.
        """
        generations = self.stream_sequences(
            prompts, n=n, ratio=ratio, area=area, negative=negative, guidance=guidance, temperature=temperature,
            top_k=top_k, top_p=top_p, seed=seed, greedy=greedy, allow_special=allow_special, batch_size=batch_size,
            deterministic=deterministic, parallel=parallel, zipar=zipar, progress=progress,
        )  # fmt: skip
        made = dict(generations)
        return [made[row] for row in range(len(made))]

    def stream_sequences(
        self,
        prompts: str | Sequence[str],
        *,
        n: int = 1,
        ratio: str | Sequence[str] = "1:1",
        area: int | None = None,
        negative: str | Sequence[str] = "",
        guidance: float | Sequence[float] = defaults.GUIDANCE,
        temperature: float | Sequence[float] = defaults.TEMPERATURE,
        top_k: int | Sequence[int] = defaults.TOP_K,
        top_p: float | Sequence[float] = defaults.TOP_P,
        seed: int | Sequence[int] = defaults.SEED,
        greedy: bool = False,
        allow_special: bool = False,
        batch_size: int = defaults.BATCH_SIZE,
        deterministic: bool = False,
        parallel: int | str = defaults.PARALLEL,
        zipar: int | None = None,
        progress: bool | None = None,
    ) -> Iterator[tuple[int, Generation]]:
        """Generates pictures as `generate_sequences` does, but yields the pictures of each batch when it is done.

        Memory does not grow with the number of pictures. Errors of bad input are raised at the first
        `next()`, not by this call. A batch starts only after all pictures of the previous batch were taken.

        Args:
            prompts: one prompt, or several.
            n: number of pictures per prompt. Each has its own seed.
            ratio: width:height, from 1:5 to 5:1. One for all prompts, or one per prompt.
            area: area of a picture in pixels, or None for the area that the model was trained for.
            negative: negative prompt: what to avoid. Guidance uses it as the unconditional prompt. One for all
                prompts, or one per prompt.
            guidance: classifier-free guidance scale. 1 means no guidance, and halves the work if all prompts have it.
                One for all prompts, or one per prompt.
            temperature: sampling temperature; 0 always takes the likeliest token. One for all prompts, or one per
                prompt.
            top_k: sample from this number of likeliest tokens. One for all prompts, or one per prompt.
            top_p: sample from the smallest set of likeliest tokens with this total probability. One for all prompts,
                or one per prompt.
            seed: seed of the first picture. Each next picture of the result adds 1. With one seed per prompt, the
                pictures of a prompt count up from its seed.
            greedy: the same as `temperature=0`.
            allow_special: whether control tokens in prompts, such as `<|image start|>`, take effect. If False, such
                prompts are refused.
            batch_size: number of rows to compute at once, at most 4096. Device memory grows with it.
            deterministic: whether a row's result must not depend on the other rows, in any dtype. Each batch is padded
                to `batch_size` rows, which takes time. Results still depend on `batch_size`, `parallel`, the device,
                and the versions of JAX and XLA.
            parallel: number of tokens, 2 to 128, that a pass of the decoder checks per row. "off" decodes one token per
                pass. "auto" chooses a number on NVIDIA GPUs from Ampere on, and is "off" elsewhere. In float32 the
                result is that of "off", up to rounding.
            zipar: number of tokens that a row of the picture is ahead of the next row. Rows are then computed
                together, in fewer passes. This changes the picture; small numbers give rough previews. None, or the
                number of columns and more, gives the exact picture. Not together with a number as `parallel`.
            progress: True shows a progress bar on a terminal and lines in a log, None shows only the bar, False
                nothing.

        Yields:
            (row, generation): the picture's index in the result of `generate_sequences`, and its `Generation`. Rows
            come in order, unless `deterministic=True` groups rows of equal shapes.

        Raises:
            Emu3Error: bad input. The message says what is wrong and what to do.
        """
        return stream_pictures(
            self.language, self.vision, prompts, Sampling(0.0 if greedy else temperature, top_k, top_p, guidance, seed),
            n=n, ratio=ratio, area=area, negative=negative, allow_special=allow_special, name=self.name,
            batching=Batching(batch_size, progress, deterministic, parallel, zipar),
        )  # fmt: skip

    def generate_clips(
        self,
        prompts: str | Sequence[str],
        *,
        frames: int = defaults.FRAMES,
        fps: float | None = None,
        extend: Media | Sequence[Media] | None = None,
        window: int | None = None,
        ratio: str | None = None,
        on_frames: OnFrames | None = None,
        area: int | None = None,
        negative: str | Sequence[str] = "",
        guidance: float | Sequence[float] = defaults.GUIDANCE,
        temperature: float | Sequence[float] = defaults.TEMPERATURE,
        top_k: int | Sequence[int] = defaults.TOP_K,
        top_p: float | Sequence[float] = defaults.TOP_P,
        seed: int | Sequence[int] = defaults.SEED,
        greedy: bool = False,
        allow_special: bool = False,
        batch_size: int = defaults.BATCH_SIZE,
        deterministic: bool = False,
        parallel: int | str = defaults.PARALLEL,
        zipar: int | None = None,
        progress: bool | None = None,
    ) -> list[Clip]:
        """Generates one clip per prompt, frame after frame, in the format of `data.sequences.NextFrame`.

        No published weights generate clips. Use the embedded model, or a model that you trained on clips. A clip longer
        than `window` is generated in several passes. Each pass continues from the last half of the window, which is
        tokenized again.

        Args:
            prompts: one prompt, or several.
            frames: number of new frames per clip. Frames are generated `temporal_factor` at a time (Emu3: 4). Extra
                frames are cut off.
            fps: frames per second of the clips, or None for the rate of the clip in `extend`, or 8.
            extend: clip or picture that the new frames continue: one for all prompts, or one per prompt. The result
                starts with it, scaled to the generated size.
            window: number of frames of one pass, old and new; by default as in the model's training, or as many as fit
                into its positions.
            ratio: width:height of all clips, or None for the ratio of `extend`, or 1:1.
            on_frames: function that gets new frames as soon as they are decoded. It is called with (row, index of the
                first frame in the clip, frames uint8 [N, H, W, 3]). It gets each new frame once, in order per row. It
                gets no frames of `extend`.
            area: area of a frame in pixels, or None for the area that the model was trained for.
            negative: negative prompt: what to avoid. Guidance uses it as the unconditional prompt. One for all
                prompts, or one per prompt.
            guidance: classifier-free guidance scale. 1 means no guidance, and halves the work if all prompts have it.
                One for all prompts, or one per prompt.
            temperature: sampling temperature; 0 always takes the likeliest token. One for all prompts, or one per
                prompt.
            top_k: sample from this number of likeliest tokens. One for all prompts, or one per prompt.
            top_p: sample from the smallest set of likeliest tokens with this total probability. One for all prompts,
                or one per prompt.
            seed: seed of the first clip; each next clip adds 1. Or one seed per clip.
            greedy: the same as `temperature=0`.
            allow_special: whether control tokens in prompts, such as `<|image start|>`, take effect. If False, such
                prompts are refused.
            batch_size: number of rows to compute at once, at most 4096. Device memory grows with it.
            deterministic: whether a row's result must not depend on the other rows, in any dtype. Each batch is padded
                to `batch_size` rows, which takes time. Results still depend on `batch_size`, `parallel`, the device,
                and the versions of JAX and XLA.
            parallel: number of tokens, 2 to 128, that a pass of the decoder checks per row. "off" decodes one token per
                pass. "auto" chooses a number on NVIDIA GPUs from Ampere on, and is "off" elsewhere. In float32 the
                result is that of "off", up to rounding.
            zipar: number of tokens that a row of a frame is ahead of the next row. Rows are then computed
                together, in fewer passes. This changes the clip; small numbers give rough previews. None, or the
                number of columns and more, gives the exact clip. Not together with a number as `parallel`.
            progress: True shows a progress bar on a terminal and lines in a log, None shows only the bar, False
                nothing.

        Raises:
            Emu3Error: bad input. The message says what is wrong and what to do.
        """
        return generate_clips(
            self.language, self.vision, prompts, Sampling(0.0 if greedy else temperature, top_k, top_p, guidance, seed),
            frames=frames, fps=fps, extend=extend, window=window, ratio=ratio, area=area, negative=negative,
            batching=Batching(batch_size, progress, deterministic, parallel, zipar), allow_special=allow_special,
            on_frames=on_frames,
        )  # fmt: skip

    # Methods that live beside what they call.
    chat = conversation.chat
    converse = conversation.converse
    interleave = documents.interleave
    interleave_turns = turns.interleave_turns

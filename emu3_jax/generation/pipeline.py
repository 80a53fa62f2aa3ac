"""`Emu3`: a loaded model that generates pictures and clips, answers questions, and encodes and decodes codes."""

# `help(Emu3)` shows annotations as they are written here, `Media` and not the union that it stands for.
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from emu3_jax.errors import Emu3Error
from emu3_jax.generation import defaults, turns
from emu3_jax.generation.clips import OnFrames, generate_clips
from emu3_jax.generation.codec import Vision, decode, encode
from emu3_jax.generation.conversation import Asking, Conversation, Showing, answer_questions
from emu3_jax.generation.documents import OnPiece, OnRows, OnText, Writing, stream_documents
from emu3_jax.generation.language import Batching, Language
from emu3_jax.generation.pictures import Generation, stream_pictures
from emu3_jax.generation.pieces import Document, check_callbacks, deliver
from emu3_jax.generation.rows import Sampling, prompt_list
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

    def chat(
        self,
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
        self,
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

    interleave_turns = turns.interleave_turns

    def interleave(
        self,
        texts: str | Sequence[str],
        images: Media | Sequence[Media] | Sequence[Sequence[Media]] = (),
        *,
        task: str | None = None,
        size: tuple[int, int] | None = None,
        max_size: tuple[int, int] | None = None,
        guidance: float | None = None,
        image_guidance: float | None = None,
        max_new_tokens: int | None = None,
        text_temperature: float | None = None,
        text_top_k: int | None = None,
        text_top_p: float | None = None,
        temperature: float = defaults.TEMPERATURE,
        top_k: int | None = None,
        top_p: float = defaults.TOP_P,
        seed: int = defaults.SEED,
        batch_size: int = defaults.BATCH_SIZE,
        parallel: int | str = defaults.PARALLEL,
        clips_as: str = "auto",
        frames: int | None = None,
        fps: float | None = None,
        allow_special: bool = False,
        on_piece: OnPiece | None = None,
        on_rows: OnRows | None = None,
        on_text: OnText | None = None,
        progress: bool | None = None,
    ) -> list[Document]:
        """Writes texts and pictures in turn: one document per text.

        The model decides where a picture begins, what size it has and when the document ends. In float32 a document
        does not depend on the other rows of its batch.

        Args:
            texts: prompts.
            images: pictures and clips to show with every prompt, or one list of them per prompt. Models of Emu3.5 know
                no clips.
            task: "t2i", "x2i", "story", "howto" or "explore": decides on the prompt of a model of Emu3.5, which needs
                one, and on its settings. None below stands for the task's value.
            size: rows and columns of visual tokens of all pictures. None: the size of the last of `images`, or else
                the model chooses.
            max_size: largest rows and columns that the model may choose. None: what fits into
                `max_new_tokens`.
            guidance: classifier-free guidance scale of visual tokens; 1 means no guidance. Without a task, None is 3.
            image_guidance: scale of guidance towards the given pictures, or None for guidance with one scale.
            max_new_tokens: largest number of new tokens of a document. Without a task, None is 1,024.
            text_temperature: temperature of text and of sizes; 0 is greedy. Without a task, None is 1.
            text_top_k: number of likeliest text tokens to sample from. Without a task, None is all.
            text_top_p: total probability of the likeliest text tokens to sample from. Without a task, None is 1.
            temperature: temperature of visual tokens; 0 is greedy.
            top_k: number of likeliest visual tokens to sample from. Without a task, None is 2,048.
            top_p: total probability of the likeliest visual tokens to sample from.
            seed: seed of the first document; each next one adds 1.
            batch_size: number of documents to compute at once.
            parallel: number of tokens that a pass of the decoder checks per row within pictures, from 2 to 128, or
                "off" or "auto"; see `generate`.
            clips_as: "clip", "images" or "auto": how a clip is shown, see `chat`.
            frames: number of frames to show per clip, see `chat`.
            fps: frames to show per second of a clip, see `chat`.
            allow_special: whether control tokens in texts take effect. By default they are refused.
            on_piece: called with a row's number and a text or picture (`Piece`) as soon as it is complete.
            on_rows: called with a row's number and a picture that is being written (`Growing`) when it has more
                finished rows. Each time, the picture is decoded.
            on_text: called with a row's number and a text that is being written, as far as it is written.
            progress: True shows a progress bar on a terminal and lines in a log, None only the bar, False nothing.

        Returns:
            A document for each text.

        Raises:
            Emu3Error: bad input. The message says what is wrong and what to do.
        """
        check_callbacks(on_piece=on_piece, on_rows=on_rows, on_text=on_text)
        prompts = prompt_list(texts)
        given: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
        each = given if given and isinstance(given[0], list | tuple) else [given] * len(prompts)
        if len(each) != len(prompts):
            raise Emu3Error(f"{len(each)} lists of images for {len(prompts)} texts: give one list for each text")
        writing = Writing(
            task, size, guidance, image_guidance, max_new_tokens, text_temperature, text_top_k, text_top_p, temperature,
            top_k, top_p, seed, batch_size, allow_special, progress, parallel, Showing(clips_as, frames, fps),
            max_size,
        )  # fmt: skip
        found: dict[int, Document] = {}
        growing = on_rows is not None
        for row, item in stream_documents(self.language, lambda: self.vision, prompts, each, writing, growing):
            if isinstance(item, Document):
                found[row] = item
            else:
                deliver(item, on_piece, on_rows, on_text, row)
        return [found[row] for row in range(len(found))]

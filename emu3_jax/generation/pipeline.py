"""`Emu3`: a loaded model that generates pictures, answers about them, and turns them into codes and back."""

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from emu3_jax.errors import Emu3Error
from emu3_jax.generation import defaults
from emu3_jax.generation.clips import OnFrames, generate_clips
from emu3_jax.generation.codec import Vision, decode, encode
from emu3_jax.generation.conversation import Asking, Conversation, Showing, answer_questions
from emu3_jax.generation.language import Batching, Language
from emu3_jax.generation.pictures import Generation, stream_pictures
from emu3_jax.generation.rows import Sampling
from emu3_jax.media.clips import Clip
from emu3_jax.media.inputs import Media


class Emu3:
    """A model in memory: a decoder, a vision tokenizer, or both. `emu3_jax.load` makes it.

    A row is one picture, clip or answer. In float32 a row's result does not depend on the rows beside it. In bfloat16
    and float16 the number of rows may change how products round, and so a token here and there. `deterministic=True`
    rules that out.
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
    ) -> list[np.ndarray]:
        """Encodes pictures to int32 codes [h, w] and clips to [t, h, w].

        A clip file is read and encoded in parts: memory does not grow with its length.

        Args:
            media: pictures (PIL images or files) and clips (`Clip`, animated files, videos or folders of frames). Where
                the temporal factor does not divide a clip's frames, its last frame is repeated.
            independent: cut clips into pieces of the temporal factor's frames and encode each by itself, as upstream's
                script does. The codes differ.
            fps: resample clips to this rate first; pictures stay as they are.
            frames: with `fps`, end each clip after this many frames; without, take this many spread over each clip.
            tile: encode frames larger than this side, in pixels, in overlapping square tiles, in the memory of one
                tile. An approximation with other codes: the tokenizer's norms and attention see one tile, not the whole
                frame. A multiple of the spatial factor.

        Raises:
            Emu3Error: on bad input; the message says what is wrong and what to do.
        """
        vision = self.vision
        return [encode(vision, item, independent, fps=fps, frames=frames, tile=tile) for item in media]

    def detokenize(
        self,
        codes: Sequence[np.ndarray],
        *,
        independent: bool = False,
        frames: int | None = None,
        tile: int | None = None,
    ) -> list[Image.Image | Clip]:
        """Decodes int codes: [h, w] to a picture, [t, h, w] to a clip of t times the temporal factor frames.

        Args:
            codes: as `tokenize` returns them.
            independent: for codes that were made with `independent`.
            frames: end clips after this many frames, which cuts off those that `tokenize` repeated.
            tile: decode large frames in overlapping tiles, as for `tokenize`; neighbours are blended where they
                overlap. The pixels differ. Codes need not have been made in tiles.

        Raises:
            Emu3Error: on bad input; the message says what is wrong and what to do.
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
        progress: bool | None = None,
    ) -> list[Image.Image]:
        """Generates pictures for the prompts (upstream `image_generation.py`).

        Args:
            prompts: what to show: one prompt, or several.
            n: pictures per prompt, each with a seed of its own.
            ratio: width:height, at most 5:1 or 1:5. One for all, or one per prompt.
            area: pixels of a picture; by default as many as the model was trained for.
            negative: a prompt for what to avoid: the unconditional branch of guidance. One for all, or one per prompt.
            guidance: classifier-free guidance scale. 1 is none, and halves the work if all prompts have it. One for
                all, or one per prompt; so have the next four.
            temperature: divides the logits before sampling; 0 always takes the likeliest token.
            top_k: how many of the likeliest tokens can be sampled.
            top_p: the smallest set of likeliest tokens with this probability mass can be sampled.
            seed: of the first picture. Each next picture, in the order of the result, adds 1. With one seed per prompt,
                a prompt's pictures count up from its own.
            greedy: the same as `temperature=0`.
            allow_special: control tokens in prompts, such as `<|image start|>`, act as such. By default they are
                refused.
            batch_size: rows that are computed at once, 4096 at most. Memory of the device grows with it.
            deterministic: in every dtype a row's result is the same beside any other rows. Each batch is filled up to
                `batch_size` rows, which takes time. Results still depend on `batch_size`, the device, and the versions
                of JAX and XLA.
            progress: True shows a bar on a terminal and lines in a log, None only the bar, False nothing.

        Returns:
            The pictures, those of a prompt together: prompt 0 has the first `n`. `image.info` says how each was made.

        Raises:
            Emu3Error: on bad input; the message says what is wrong and what to do.
        """
        generations = self.stream_sequences(
            prompts, n=n, ratio=ratio, area=area, negative=negative, guidance=guidance, temperature=temperature,
            top_k=top_k, top_p=top_p, seed=seed, greedy=greedy, allow_special=allow_special, batch_size=batch_size,
            deterministic=deterministic, progress=progress,
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
        progress: bool | None = None,
    ) -> list[Generation]:
        """Generates pictures as `generate` does, and returns them with their tokens.

        Args:
            prompts: what to show: one prompt, or several.
            n: pictures per prompt, each with a seed of its own.
            ratio: width:height, at most 5:1 or 1:5. One for all, or one per prompt.
            area: pixels of a picture; by default as many as the model was trained for.
            negative: a prompt for what to avoid: the unconditional branch of guidance. One for all, or one per prompt.
            guidance: classifier-free guidance scale. 1 is none, and halves the work if all prompts have it. One for
                all, or one per prompt; so have the next four.
            temperature: divides the logits before sampling; 0 always takes the likeliest token.
            top_k: how many of the likeliest tokens can be sampled.
            top_p: the smallest set of likeliest tokens with this probability mass can be sampled.
            seed: of the first picture. Each next picture, in the order of the result, adds 1. With one seed per prompt,
                a prompt's pictures count up from its own.
            greedy: the same as `temperature=0`.
            allow_special: control tokens in prompts, such as `<|image start|>`, act as such. By default they are
                refused.
            batch_size: rows that are computed at once, 4096 at most. Memory of the device grows with it.
            deterministic: in every dtype a row's result is the same beside any other rows. Each batch is filled up to
                `batch_size` rows, which takes time. Results still depend on `batch_size`, the device, and the versions
                of JAX and XLA.
            progress: True shows a bar on a terminal and lines in a log, None only the bar, False nothing.

        Returns:
            A `Generation` for each picture, those of a prompt together.

        Raises:
            Emu3Error: on bad input; the message says what is wrong and what to do.
        """
        generations = self.stream_sequences(
            prompts, n=n, ratio=ratio, area=area, negative=negative, guidance=guidance, temperature=temperature,
            top_k=top_k, top_p=top_p, seed=seed, greedy=greedy, allow_special=allow_special, batch_size=batch_size,
            deterministic=deterministic, progress=progress,
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
        progress: bool | None = None,
    ) -> Iterator[tuple[int, Generation]]:
        """Generates pictures as `generate_sequences` does, and yields those of a batch as soon as it is done.

        So memory does not grow with the number of pictures. Bad input is told when the first picture is asked for, and
        the next batch begins when the pictures of the last one were taken.

        Args:
            prompts: what to show: one prompt, or several.
            n: pictures per prompt, each with a seed of its own.
            ratio: width:height, at most 5:1 or 1:5. One for all, or one per prompt.
            area: pixels of a picture; by default as many as the model was trained for.
            negative: a prompt for what to avoid: the unconditional branch of guidance. One for all, or one per prompt.
            guidance: classifier-free guidance scale. 1 is none, and halves the work if all prompts have it. One for
                all, or one per prompt; so have the next four.
            temperature: divides the logits before sampling; 0 always takes the likeliest token.
            top_k: how many of the likeliest tokens can be sampled.
            top_p: the smallest set of likeliest tokens with this probability mass can be sampled.
            seed: of the first picture. Each next picture, in the order of the result, adds 1. With one seed per prompt,
                a prompt's pictures count up from its own.
            greedy: the same as `temperature=0`.
            allow_special: control tokens in prompts, such as `<|image start|>`, act as such. By default they are
                refused.
            batch_size: rows that are computed at once, 4096 at most. Memory of the device grows with it.
            deterministic: in every dtype a row's result is the same beside any other rows. Each batch is filled up to
                `batch_size` rows, which takes time. Results still depend on `batch_size`, the device, and the versions
                of JAX and XLA.
            progress: True shows a bar on a terminal and lines in a log, None only the bar, False nothing.

        Yields:
            A picture's row in the list that `generate_sequences` returns, and its `Generation`. Rows come in order,
            unless `deterministic` computes rows of equal shapes together.

        Raises:
            Emu3Error: on bad input; the message says what is wrong and what to do.
        """
        return stream_pictures(
            self.language, self.vision, prompts, Sampling(0.0 if greedy else temperature, top_k, top_p, guidance, seed),
            n=n, ratio=ratio, area=area, negative=negative, batching=Batching(batch_size, progress, deterministic),
            allow_special=allow_special, name=self.name,
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
        progress: bool | None = None,
    ) -> list[Clip]:
        """Generates one clip per prompt, frame after frame, as `data.sequences.NextFrame` trains it.

        No published weights generate clips: this is for models that this project trained. A clip longer than `window`
        is made in several passes. Each pass sees the last half of the window, tokenized anew.

        Args:
            prompts: what to show: one prompt, or several.
            frames: new frames of each clip. A number that the temporal factor does not divide is filled up, and the
                frames too many are cut off.
            fps: frames per second of the clips; by default those of the clip in `extend`, or 8.
            extend: a clip or picture that the new frames continue, for all prompts, or one per prompt. The result
                begins with it, scaled to the generated size.
            window: frames of one pass, old and new; by default as in the model's training, or as many as its positions
                hold.
            ratio: width:height of all clips; by default that of `extend`, or 1:1.
            on_frames: called with the row, a frame's number in the clip, and the frames from there on (uint8
                [N, H, W, 3]) as soon as they are there, while later ones are still sampled. Each new frame comes once,
                a row's frames in order. Frames of `extend` do not come.
            area: pixels of a frame; by default as many as the model was trained for.
            negative: a prompt for what to avoid: the unconditional branch of guidance. One for all, or one per prompt.
            guidance: classifier-free guidance scale. 1 is none, and halves the work if all prompts have it. One for
                all, or one per prompt; so have the next four.
            temperature: divides the logits before sampling; 0 always takes the likeliest token.
            top_k: how many of the likeliest tokens can be sampled.
            top_p: the smallest set of likeliest tokens with this probability mass can be sampled.
            seed: of the first clip; each next clip adds 1. A sequence gives each clip its own.
            greedy: the same as `temperature=0`.
            allow_special: control tokens in prompts, such as `<|image start|>`, act as such. By default they are
                refused.
            batch_size: rows that are computed at once, 4096 at most. Memory of the device grows with it.
            deterministic: in every dtype a row's result is the same beside any other rows. Each batch is filled up to
                `batch_size` rows, which takes time. Results still depend on `batch_size`, the device, and the versions
                of JAX and XLA.
            progress: True shows a bar on a terminal and lines in a log, None only the bar, False nothing.

        Raises:
            Emu3Error: on bad input; the message says what is wrong and what to do.
        """
        return generate_clips(
            self.language, self.vision, prompts, Sampling(0.0 if greedy else temperature, top_k, top_p, guidance, seed),
            frames=frames, fps=fps, extend=extend, window=window, ratio=ratio, area=area, negative=negative,
            batching=Batching(batch_size, progress, deterministic), allow_special=allow_special, on_frames=on_frames,
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
        progress: bool | None = None,
    ) -> list[str]:
        """Answers one prompt per picture or clip (upstream `multimodal_understanding.py`).

        Args:
            images: one picture or clip (PIL images, `Clip` or files), or a sequence with one per row. A row may be a
                sequence of them, shown in order, or empty.
            prompts: the question: one for all rows, or one per row.
            clips_as: "clip" shows a clip as one, "images" its frames as pictures, "auto" as the model was trained.
            frames: frames that are shown of a clip; by default as many as the training's clips have, and 8 as pictures.
            fps: frames per second that are shown of a clip; by default `frames` are spread over all of it.
            max_new_tokens: the longest answer, in tokens. Answers also end where the model's positions do.
            temperature: divides the logits before sampling; 0, the default, always takes the likeliest token, as the
                reference does.
            top_k: how many of the likeliest tokens can be sampled.
            top_p: the smallest set of likeliest tokens with this probability mass can be sampled.
            seed: of the first row; each next row adds 1. A sequence gives each row its own.
            allow_special: control tokens in prompts, such as `<|image start|>`, act as such. By default they are
                refused.
            batch_size: rows that are computed at once, 4096 at most. Memory of the device grows with it.
            deterministic: in every dtype a row's result is the same beside any other rows. Each batch is filled up to
                `batch_size` rows, which takes time. Results still depend on `batch_size`, the device, and the versions
                of JAX and XLA.
            progress: True shows a bar on a terminal and lines in a log, None only the bar, False nothing.

        Returns:
            The answers, one per row.

        Raises:
            Emu3Error: on bad input; the message says what is wrong and what to do.
        """
        asking = Asking(
            Showing(clips_as, frames, fps),
            Sampling(temperature, top_k, top_p, guidance=1.0, seed=seed),
            Batching(batch_size, progress, deterministic),
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
        progress: bool | None = None,
    ) -> Conversation:
        """Begins a conversation of several turns, each with any number of pictures and clips.

        `conversation = model.converse()`, then `conversation.ask(text, media)` for each turn. An answer is computed
        alone, so that no other row can change it.

        Args:
            clips_as: "clip" shows a clip as one, "images" its frames as pictures, "auto" as the model was trained.
            frames: frames that are shown of a clip; by default as many as the training's clips have, and 8 as pictures.
            fps: frames per second that are shown of a clip; by default `frames` are spread over all of it.
            max_new_tokens: the longest answer, in tokens. Answers also end where the model's positions do.
            temperature: divides the logits before sampling; 0, the default, always takes the likeliest token, as the
                reference does.
            top_k: how many of the likeliest tokens can be sampled.
            top_p: the smallest set of likeliest tokens with this probability mass can be sampled.
            seed: of the answers' random numbers.
            allow_special: control tokens in prompts, such as `<|image start|>`, act as such. By default they are
                refused.
            progress: True shows a bar on a terminal and lines in a log, None only the bar, False nothing.

        Raises:
            Emu3Error: on bad input; the message says what is wrong and what to do.
        """
        asking = Asking(
            Showing(clips_as, frames, fps),
            Sampling(temperature, top_k, top_p, guidance=1.0, seed=seed),
            Batching(1, progress),
            max_new_tokens,
            allow_special,
        )
        return Conversation(self.language, lambda: self.vision, asking)

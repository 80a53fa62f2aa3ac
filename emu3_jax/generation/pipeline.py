"""`Emu3`: a loaded model that generates pictures, answers about them, and turns them into codes and back."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from emu3_jax.errors import Emu3Error
from emu3_jax.generation import defaults
from emu3_jax.generation.clips import OnFrames, generate_clips
from emu3_jax.generation.codec import Vision, decode, encode
from emu3_jax.generation.conversation import Asking, Conversation, Showing, answer_questions
from emu3_jax.generation.language import Batching, Language
from emu3_jax.generation.pictures import Generation, generate_pictures
from emu3_jax.generation.rows import Sampling
from emu3_jax.media.clips import Clip
from emu3_jax.media.inputs import Media


class Emu3:
    """A model in memory. Made by `emu3_jax.load`; either part may be absent.

    Every argument of `generate` and `chat` that describes one row takes one value for all rows or a sequence with one
    value per row. In float32 a row's result does not depend on the rows beside it. In bfloat16 and float16 the number
    of rows may change how products round, and so a token here and there; `deterministic` rules that out.
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

        Long clips pass in parts, each of which sees what came before, and files are read as they pass: memory does not
        grow with their length.

        Args:
            media: pictures (PIL images or files) and clips (`Clip`, animated files, videos or folders of frames). A
                clip whose frame count is not a multiple of the temporal factor is filled up with its last frame.
            independent: cuts clips into pieces of the temporal factor's frames that know nothing of each other, as
                upstream's script does. Other codes.
            fps: clips are resampled to this rate first; pictures stay as they are.
            frames: with `fps`, clips end after so many; without, so many are spread over each whole clip.
            tile: frames larger than squares of this side, in pixels, pass in overlapping tiles of it, each by itself,
                in the memory of one tile. An approximation, with other codes: the tokenizer's norms and attention see
                a whole frame. A multiple of the spatial factor.

        Raises:
            Emu3Error: on bad input; the message says which and what to do.
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
            independent: for codes that were made so.
            frames: clips end after so many, where they are longer: what `tokenize` filled up is cut off.
            tile: large frames in overlapping tiles, as for `tokenize`; one fades into the next. Other pixels, but codes
                need not have been made so.

        Raises:
            Emu3Error: on bad input.
        """
        vision = self.vision
        return [decode(vision, np.asarray(item), independent, frames=frames, tile=tile) for item in codes]

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
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
        """Pictures for the prompts; `image.info` says how each was made. Arguments and errors: `generate_sequences`."""
        generations = self.generate_sequences(
            prompts, ratio=ratio, area=area, negative=negative, guidance=guidance, temperature=temperature,
            top_k=top_k, top_p=top_p, seed=seed, greedy=greedy, allow_special=allow_special, batch_size=batch_size,
            deterministic=deterministic, progress=progress,
        )  # fmt: skip
        return [generation.image for generation in generations]

    def generate_sequences(
        self,
        prompts: str | Sequence[str],
        *,
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
        """Generates one picture per prompt, with tokens (upstream `image_generation.py`).

        Args:
            prompts: what to show.
            ratio: width:height.
            area: pixels; by default the area that the model was trained for.
            negative: the unconditional branch of guidance.
            guidance: classifier-free guidance scale; 1 is none, and saves half of the work if it is so for all rows.
            temperature: 0 is greedy.
            top_k: candidates kept.
            top_p: probability mass kept.
            seed: one number counts up over the prompts; a sequence gives each prompt its own.
            greedy: the same as temperature 0.
            allow_special: lets control tokens in prompts act as such.
            batch_size: rows per batch, 4096 at most.
            deterministic: a row's result is the same beside any rows, in every dtype: each batch is filled up to
                `batch_size` rows, which costs time, and rows of other shapes are computed apart. It stays a function
                of `batch_size`, the device and the versions of JAX and XLA.
            progress: True shows a bar on a terminal and lines in a log, None only the bar, False nothing.

        Raises:
            Emu3Error: on bad input; the message says which and what to do.
        """
        return generate_pictures(
            self.language, self.vision, prompts, Sampling(0.0 if greedy else temperature, top_k, top_p, guidance, seed),
            ratio=ratio, area=area, negative=negative, batching=Batching(batch_size, progress, deterministic),
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

        No published weights generate clips: this is for models that this project trained. What is longer than `window`
        is made in several passes, each of which sees the last half of the window, tokenized anew, as a clip that begins
        there. The arguments and errors are those of `generate_sequences`, and:

        Args:
            frames: that are new; what the temporal factor does not divide is filled up, and cut off again.
            fps: frames per second that the clips are labelled with; by default those of the clip in `extend`, or 8.
            extend: what the new frames go on from: a clip, or a picture, for all prompts or one for each. The result
                begins with it, scaled to the generated size. A clip of fewer frames than the temporal factor begins
                with repetitions of its first, which are cut off again.
            window: frames of one pass, old and new; by default those of the clips that the model was trained on, or
                as many as its positions hold.
            ratio: of all clips; by default that of `extend`, or 1:1.
            on_frames: called with the row, a number and frames (uint8 [n, H, W, 3]) as soon as these are there, while
                later ones are still being sampled: the row's clip has them from that number on. Each new frame comes
                once, a row's in their order; those of `extend` do not come.
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
            images: one picture or clip, or one per row; a row may be a sequence of them, shown in order, or empty.
            prompts: one for all rows, or one per row.
            clips_as: how clips stand in the prompt, see `conversation.Showing`; likewise:
            frames: how many of a clip's frames are shown.
            fps: how many per second.
            max_new_tokens: an answer's longest length; answers also end where the model's positions do.
            temperature: 0, the default, is greedy as in the reference.
            top_k: candidates kept.
            top_p: probability mass kept.
            seed: one number counts up over the rows; a sequence gives each row its own.
            allow_special: lets control tokens in prompts act as such.
            batch_size: rows per batch, 4096 at most.
            deterministic: a row's result is the same beside any rows, in every dtype: each batch is filled up to
                `batch_size` rows, which costs time, and rows of other shapes are computed apart. It stays a function
                of `batch_size`, the device and the versions of JAX and XLA.
            progress: True shows a bar on a terminal and lines in a log, None only the bar, False nothing.

        Raises:
            Emu3Error: on bad input; the message says which and what to do.
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
        """A conversation of several turns, each with any number of pictures and clips: `converse().ask(text, media)`.

        The arguments are those of `chat`. An answer is computed alone, so that no other row can change it.
        """
        asking = Asking(
            Showing(clips_as, frames, fps),
            Sampling(temperature, top_k, top_p, guidance=1.0, seed=seed),
            Batching(1, progress),
            max_new_tokens,
            allow_special,
        )
        return Conversation(self.language, lambda: self.vision, asking)

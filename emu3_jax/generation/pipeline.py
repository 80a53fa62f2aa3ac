"""`Emu3`: a loaded model that generates pictures, answers about them, and turns them into codes and back."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image
from tqdm import tqdm

from emu3_jax.config import DecoderConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.generation import engine
from emu3_jax.generation.clips import GrowingClip, OnFrames, latents_of_a_pass
from emu3_jax.generation.codec import Vision, decode, encode, encode_end
from emu3_jax.generation.conversation import Conversation, Showing
from emu3_jax.generation.rows import describe, per_row, prompt_list, row_settings
from emu3_jax.generation.schedule import TokenClass, clip_schedule, image_schedule, text_schedule
from emu3_jax.media.clips import DEFAULT_FPS, Clip, check_fps, resize_frames
from emu3_jax.media.inputs import Media, as_clip
from emu3_jax.media.sizes import generate_size
from emu3_jax.sharding.rules import batch_shards
from emu3_jax.text.prompts import PromptTemplates, frame_ids, generation_prompt, understanding_prompt
from emu3_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Language:
    """The decoder in memory, with the tokenizer and prompt templates that it was trained with.

    `mesh` is what its parameters are spread over, if anything; `narrow_cache`: keys and values are kept as int8.
    """

    config: DecoderConfig
    params: Any
    tokenizer: Tokenizer
    templates: PromptTemplates
    mesh: Mesh | None = None
    narrow_cache: bool = False


@dataclasses.dataclass(frozen=True)
class Generation:
    """One generated picture.

    Attributes:
        ids: int32 [prompt + generated], from BOS to EOS.
        prompt_length: how many of `ids` are the prompt.
        codes: int32 [h, w], the picture's codes.
        image: the picture; `image.info` says how it was made.
    """

    ids: np.ndarray
    prompt_length: int
    codes: np.ndarray
    image: Image.Image


class Emu3:
    """A model in memory. Made by `emu3_jax.load`; either part may be absent.

    Every argument of `generate` and `chat` that describes one row takes one value for all rows or a sequence with one
    value per row. A row's result does not depend on the rows beside it.
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

    def generate(self, prompts: str | Sequence[str], **options) -> list[Image.Image]:
        """Pictures for the prompts; see `generate_sequences` for the options. `image.info` says how each was made."""
        return [generation.image for generation in self.generate_sequences(prompts, **options)]

    def generate_sequences(
        self,
        prompts: str | Sequence[str],
        *,
        ratio: str | Sequence[str] = "1:1",
        area: int | None = None,
        negative: str | Sequence[str] = "",
        guidance: float | Sequence[float] = 3.0,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int] = 2048,
        top_p: float | Sequence[float] = 1.0,
        seed: int | Sequence[int] = 0,
        greedy: bool = False,
        allow_special: bool = False,
        batch_size: int = 8,
        progress: bool | None = None,
    ) -> list[Generation]:
        """Generates one picture per prompt, with tokens (upstream `image_generation.py`).

        Args:
            prompts: what to draw.
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
            batch_size: rows per batch.
            progress: a bar on stderr; by default if that is a terminal.

        Raises:
            Emu3Error: on bad input; the message says which and what to do.
        """
        language, vision = self.language, self.vision
        prompts = prompt_list(prompts)
        area = language.config.image_area if area is None else area
        ratios = per_row("ratio", ratio, len(prompts))
        sizes = [generate_size(r, area, vision.config.spatial_factor) for r in ratios]
        settings = row_settings(len(prompts), 0.0 if greedy else temperature, top_k, top_p, guidance, seed)
        negatives = per_row("negative", negative, len(prompts))
        schedules = [image_schedule(*size) for size in sizes]
        drawn = self._draw(prompts, negatives, sizes, schedules, settings, allow_special, batch_size, progress)
        results = []
        for index, (full, prompt_length, codes) in enumerate(drawn):
            image = decode(vision, codes)
            image.info = {
                "prompt": prompts[index],
                "negative": negatives[index],
                "size": f"{image.width}x{image.height}",
                "ratio": ratios[index],
                **describe(settings, index),
                "model": self.name,
                "software": "emu3-jax",
            }
            results.append(Generation(full, prompt_length, codes, image))
        return results

    def generate_clips(
        self,
        prompts: str | Sequence[str],
        *,
        frames: int = 8,
        fps: float | None = None,
        extend: Media | Sequence[Media] | None = None,
        window: int | None = None,
        ratio: str | None = None,
        on_frames: OnFrames | None = None,
        area: int | None = None,
        negative: str | Sequence[str] = "",
        guidance: float | Sequence[float] = 3.0,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int] = 2048,
        top_p: float | Sequence[float] = 1.0,
        seed: int | Sequence[int] = 0,
        greedy: bool = False,
        allow_special: bool = False,
        batch_size: int = 8,
        progress: bool | None = None,
    ) -> list[Clip]:
        """Generates one clip per prompt, frame after frame, as `data.sequences.NextFrame` trains it.

        No published weights generate clips: this is for models that this project trained. What is longer than `window`
        is made in several passes, each of which sees the last half of the window, tokenized anew, as a clip that begins
        there. The arguments and errors are those of `generate_sequences`, and:

        Args:
            frames: that are new; what the temporal factor does not divide is filled up, and cut off again.
            fps: frames per second that the clips are labelled with; by default those of `extend`, or 24.
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
        language, vision = self.language, self.vision
        prompts = prompt_list(prompts)
        if not isinstance(frames, int) or frames < 1:
            raise Emu3Error(f"frames is {frames!r}: it must be a whole number >= 1")
        if window is not None and (not isinstance(window, int) or window < 1):
            raise Emu3Error(f"window is {window!r}: it must be a whole number >= 1")
        check_fps(fps)
        config, factor = language.config, vision.config.temporal_factor
        given = [as_clip(item) for item in per_row("extend", extend, len(prompts))] if extend is not None else []
        if ratio is None:
            shapes = {clip.frames.shape[1:3] for clip in given}
            if len(shapes) > 1:
                raise Emu3Error("the clips to extend differ in size: give one ratio, or extend them one by one")
            ratio = "{1}:{0}".format(*shapes.pop()) if shapes else "1:1"
        rates = [fps or clip.fps for clip in given] or [fps or DEFAULT_FPS] * len(prompts)
        area = config.image_area if area is None else area
        size = generate_size(ratio, area, vision.config.spatial_factor)
        settings = row_settings(len(prompts), 0.0 if greedy else temperature, top_k, top_p, guidance, seed)
        negatives = per_row("negative", negative, len(prompts))
        height, width = (side * vision.config.spatial_factor for side in size)
        given_frames = [resize_frames(clip.frames, height, width) for clip in given]
        made = [
            GrowingClip(
                vision, config.tokens.visual_start, old, frames, on_frames and functools.partial(on_frames, row)
            )
            for row, old in enumerate(given_frames or [np.zeros((0, height, width, 3), np.uint8)] * len(prompts))
        ]
        missing = -(-frames // factor)
        texts = [*prompts, *negatives]
        latents = latents_of_a_pass(language, factor, window, texts, size, missing, bool(given), allow_special)

        def on_tokens(first: int, ids: np.ndarray) -> None:
            for clip, row in zip(made[first : first + len(ids)], ids, strict=True):
                clip.take(row)

        while missing:
            old = min(latents // 2, -(-min(len(clip.frames) for clip in made) // factor))
            new = min(latents - old, missing)
            sizes, schedule = [(old + new, *size)] * len(prompts), clip_schedule(old + new, *size, config.clip_layout)
            schedule = schedule[len(clip_schedule(old, *size, config.clip_layout)) - 2 :]  # of the new: EOI, EOS follow
            contexts = [encode_end(vision, clip.frames, old) if old else None for clip in made]
            for clip, context in zip(made, contexts, strict=True):
                clip.begin(context, schedule)
            self._draw(
                prompts, negatives, sizes, [schedule] * len(prompts), settings, allow_special, batch_size, progress,
                contexts, on_tokens,
            )  # fmt: skip
            missing -= new
            # Other random numbers in each pass: the same ones would make it the last one's like.
            settings = settings.replace(seed=settings.seed + np.uint32(0x9E3779B9))
        return [Clip(clip.frames, rate) for clip, rate in zip(made, rates, strict=True)]

    def _draw(
        self, prompts, negatives, sizes, schedules, settings, allow_special, batch_size, progress, contexts=None,
        on_tokens=None,
    ) -> list[tuple[np.ndarray, int, np.ndarray]]:  # fmt: skip
        """For each prompt its ids, how many of them are the prompt, and the codes drawn, in the shape of `sizes`.

        `contexts` are the codes of a clip's first frames, or None: they end the prompt, and begin the codes.
        `on_tokens`: see `_run_batches`.
        """
        language = self.language
        if batch_size < 1:
            raise Emu3Error(f"batch_size is {batch_size}: it must be at least 1")
        special = language.config.tokens
        contexts = contexts or [None] * len(prompts)
        known = [[] if codes is None else frame_ids(special, codes, language.config.clip_layout) for codes in contexts]

        def rows_of(texts):
            return [
                generation_prompt(language.tokenizer, special, text, *size, allow_special=allow_special) + ids
                for text, size, ids in zip(texts, sizes, known, strict=True)
            ]

        conditional, unconditional = rows_of(prompts), rows_of(negatives)
        engine.check_positions(language.config, conditional, schedules, unconditional)
        generated = _run_batches(
            language, conditional, schedules, settings, unconditional, batch_size, progress, on_tokens
        )
        results = []
        for prompt, schedule, size, old, ids in zip(conditional, schedules, sizes, contexts, generated, strict=True):
            codes = (ids[schedule == TokenClass.VISUAL] - special.visual_start).astype(np.int32)
            if old is not None:
                codes = np.concatenate([old.ravel(), codes])
            results.append((np.concatenate([np.asarray(prompt, np.int32), ids]), len(prompt), codes.reshape(size)))
        return results

    def chat(
        self,
        images: Media | Sequence[Media | Sequence[Media]],
        prompts: str | Sequence[str],
        *,
        clips_as: str = "auto",
        frames: int | None = None,
        fps: float | None = None,
        max_new_tokens: int = 1024,
        temperature: float | Sequence[float] = 0.0,
        top_k: int | Sequence[int] = 2048,
        top_p: float | Sequence[float] = 1.0,
        seed: int | Sequence[int] = 0,
        allow_special: bool = False,
        batch_size: int = 8,
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
            batch_size: rows per batch.
            progress: a bar on stderr; by default if that is a terminal.

        Raises:
            Emu3Error: on bad input; the message says which and what to do.
        """
        language, showing = self.language, Showing(clips_as, frames, fps)
        rows = list(images) if isinstance(images, list | tuple) else [images]
        if not rows:
            raise Emu3Error("there is no picture: give at least one")
        texts = per_row("prompts", prompts, len(rows))
        inputs = []
        for row, text in zip(rows, texts, strict=True):
            media = row if isinstance(row, list | tuple) else [row]
            codes = [shown for item in media for shown in showing.codes(self, item)]
            inputs.append(
                understanding_prompt(
                    language.tokenizer, language.config.tokens, language.templates, text, codes,
                    allow_special=allow_special,
                )
            )  # fmt: skip
        answers = self._answer(inputs, max_new_tokens, temperature, top_k, top_p, seed, batch_size, progress)
        return [language.tokenizer.decode(ids.tolist(), skip_special=True) for ids in answers]

    def converse(
        self,
        *,
        clips_as: str = "auto",
        frames: int | None = None,
        fps: float | None = None,
        max_new_tokens: int = 1024,
        temperature: float = 0.0,
        top_k: int = 2048,
        top_p: float = 1.0,
        seed: int = 0,
        allow_special: bool = False,
        progress: bool | None = None,
    ) -> Conversation:
        """A conversation of several turns, each with any number of pictures and clips: `converse().ask(text, media)`.

        The arguments are those of `chat`.
        """
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "batch_size": 1}
        options |= {"max_new_tokens": max_new_tokens, "progress": progress}
        return Conversation(self, Showing(clips_as, frames, fps), allow_special, options)

    def _answer(
        self, inputs, max_new_tokens, temperature, top_k, top_p, seed, batch_size, progress
    ) -> list[np.ndarray]:
        """The ids that follow each row of ids, which ends where an answer begins; see `chat`."""
        language = self.language
        if max_new_tokens < 1 or batch_size < 1:
            raise Emu3Error(f"max_new_tokens is {max_new_tokens} and batch_size {batch_size}: both must be at least 1")
        settings = row_settings(len(inputs), temperature, top_k, top_p, 1.0, seed)
        schedules = []
        for index, ids in enumerate(inputs):
            room = language.config.max_positions - len(ids)
            if room < 1:
                raise Emu3Error(
                    f"row {index}: what is shown and asked takes {len(ids)} tokens, the model has "
                    f"{language.config.max_positions} positions: shorten the prompt, use smaller or fewer pictures, or "
                    "fewer frames of a clip"
                )
            schedules.append(text_schedule(min(max_new_tokens, room)))
        return _run_batches(language, inputs, schedules, settings, None, batch_size, progress)


def _run_batches(
    language, prompts, schedules, settings, negatives, batch_size, progress, on_tokens=None
) -> list[np.ndarray]:
    """Runs the engine over batches; returns each row's generated ids, cut to its own schedule.

    `on_tokens` is called with the number of a batch's first row and what `engine.run` tells of the batch.
    """
    guided = negatives is not None and bool((settings.guidance != 1.0).any())
    rows: list[np.ndarray] = []
    total = sum(max(len(s) for s in schedules[i : i + batch_size]) for i in range(0, len(prompts), batch_size))
    bar = tqdm(total=total, unit=" tokens", disable=None if progress is None else not progress, leave=False)
    with bar:
        for first in range(0, len(prompts), batch_size):
            batch = slice(first, first + batch_size)
            base = bar.n
            ids = engine.run(
                language.params,
                language.config,
                prompts[batch],
                schedules[batch],
                jax.tree.map(lambda leaf, batch=batch: leaf[batch], settings),
                negatives[batch] if guided else None,
                on_progress=lambda taken, _, base=base: bar.update(base + taken - bar.n),
                on_tokens=on_tokens and functools.partial(on_tokens, first),
                mesh=language.mesh,
                row_multiple=batch_shards(language.mesh),
                narrow_cache=language.narrow_cache,
            )
            rows.extend(row[: len(schedule)] for row, schedule in zip(ids, schedules[batch], strict=True))
            bar.update(base + max(len(s) for s in schedules[batch]) - bar.n)
    return rows

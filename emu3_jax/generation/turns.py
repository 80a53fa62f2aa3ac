"""Conversations of texts and pictures in turn, on both sides; see `Emu3.interleave_turns`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from emu3_jax.errors import Emu3Error, RowError
from emu3_jax.generation import defaults, grammar
from emu3_jax.generation.codec import Vision
from emu3_jax.generation.conversation import Model, Showing
from emu3_jax.generation.documents import (
    Writing,
    encoded,
    grammar_of,
    prompts_of,
    row_of,
    sizes_of,
    stream_rows,
    task_of,
)
from emu3_jax.generation.interleaving import InterleavedRow
from emu3_jax.generation.kept import Kept
from emu3_jax.generation.language import Language
from emu3_jax.generation.pieces import Document, Growing, Piece, check_callbacks, deliver
from emu3_jax.media.inputs import Media
from emu3_jax.printable import shown
from emu3_jax.text.tasks import Prompts


class Turns:
    """A conversation with a model that writes texts and pictures in turn; made by `Emu3.interleave_turns`.

    Later turns compute only what is new, because the keys and values of earlier turns are kept. The result is that of
    the whole conversation as one prompt, up to rounding.

    The unconditional prompt of guidance continues too. It has the frames of all turns and all pictures, shown and
    written, but no other text. The third context of `image_guidance` has neither: it stays that of the first turn.

    Attributes:
        turns: the texts so far, each with the document that the model wrote.
    """

    def __init__(self, language: Language, vision: Callable[[], Vision], writing: Writing):
        """`vision` is called when a picture is read or written.

        Raises:
            Emu3Error: the settings do not fit the model.
        """
        self.turns: list[tuple[str, Document]] = []
        self._language, self._vision, self._writing = language, vision, writing
        self._task, self._rule = task_of(language, writing), grammar_of(language)
        self._kept = Kept()
        self._so_far: Prompts | None = None
        self._sizes: list[tuple[int, int]] = []  # of all pictures so far

    def send(
        self,
        text: str,
        images: Media | Sequence[Media] = (),
        *,
        on_piece: Callable[[Piece], Any] | None = None,
        on_rows: Callable[[Growing], Any] | None = None,
        on_text: Callable[[str], Any] | None = None,
    ) -> Document:
        """Sends a text, with pictures if there are any, and returns what the model writes.

        The seed of a turn is that of the conversation plus the number of turns before it.

        Args:
            text: the text.
            images: a picture or clip to show with it, or several. Models of Emu3.5 know no clips.
            on_piece: called with a text or picture of the answer as soon as it is complete.
            on_rows: called with a picture that is being written (`Growing`) when it has more finished rows. Each time,
                the picture is decoded.
            on_text: called with a text that is being written, as far as it is written.

        Returns:
            The answer. Its `ids` begin with the whole conversation so far.

        Raises:
            Emu3Error: bad input, or the conversation no longer fits into the model's positions. The conversation does
                not change then, nor if a callback raises an error.
        """
        if not isinstance(text, str):
            raise Emu3Error(f"text is {shown(text)}: it must be one text, such as 'make it green'")
        check_callbacks(on_piece=on_piece, on_rows=on_rows, on_text=on_text)
        items: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
        so_far, writing = self._so_far, self._writing
        codes = [
            part
            for item in items
            for part in encoded(self._language, self._vision(), item, self._task, writing.showing)
        ]
        sizes = [*self._sizes, *sizes_of(codes)]
        prompts = prompts_of(
            self._language, self._rule, self._task, text, codes, writing.allow_special, later=so_far is not None
        )
        if so_far is not None:
            prompts = Prompts(
                [*so_far.conditional, *prompts.conditional], [*so_far.unconditional, *prompts.unconditional],
                so_far.empty,
            )  # fmt: skip
        writing = dataclasses.replace(writing, seed=(writing.seed + len(self.turns)) % 2**32)
        try:
            row = row_of(
                0, prompts, sizes, writing, self._task, self._language.config.max_positions, self._rule,
                later=so_far is not None,
            )  # fmt: skip
        except RowError as error:
            raise Emu3Error(error.reason) from error
        document = self._written(row, writing, on_piece, on_rows, on_text)
        self._sizes = [
            *sizes, *sizes_of([p.codes for p in document.pieces if p.codes is not None and p.whole])
        ]  # fmt: skip
        self._so_far = self._after(prompts, document)
        self.turns.append((text, document))
        return document

    def _written(
        self,
        row: InterleavedRow,
        writing: Writing,
        on_piece: Callable[[Piece], Any] | None,
        on_rows: Callable[[Growing], Any] | None,
        on_text: Callable[[str], Any] | None,
    ) -> Document:
        for _, item in stream_rows(
            self._language, self._vision, self._rule, self._task, [row], writing, self._kept, on_rows is not None
        ):
            if isinstance(item, Document):
                document = item
            else:
                deliver(item, on_piece, on_rows, on_text)
        return document

    def _after(self, prompts: Prompts, document: Document) -> Prompts:
        """The contexts after a turn: with the answer and EOS. A picture that was cut off is left out."""
        eos = self._language.config.tokens.eos
        ids = document.ids[document.prompt_length :]
        if document.ended:
            ids = ids[:-1]
        parts = grammar.split(ids.tolist(), self._rule, strict=False)
        inside = grammar.inside_pictures(ids, self._rule)
        if parts and isinstance(parts[-1], grammar.Picture) and not parts[-1].whole:
            opened = len(ids) - 1 - ids[::-1].tolist().index(self._rule.tokens.boi)
            ids, inside = ids[:opened], inside[:opened]
        return Prompts(
            [*prompts.conditional, *ids.tolist(), eos], [*prompts.unconditional, *ids[inside].tolist(), eos],
            prompts.empty,
        )  # fmt: skip


def interleave_turns(
    self: Model,
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
    parallel: int | str = defaults.PARALLEL,
    clips_as: str = "auto",
    frames: int | None = None,
    fps: float | None = None,
    allow_special: bool = False,
    progress: bool | None = None,
) -> Turns:
    """Starts a conversation whose answers are texts and pictures in turn; see `Turns.send`.

    Later turns compute only what is new. `interleave` describes the arguments in full.

    Args:
        task: task of a model of Emu3.5, the same for all turns.
        size: rows and columns of visual tokens of all pictures, or None.
        max_size: largest rows and columns that the model may choose, or None.
        guidance: classifier-free guidance scale of visual tokens.
        image_guidance: scale of guidance towards the pictures that the first turn shows, or None.
        max_new_tokens: largest number of new tokens of an answer.
        text_temperature: temperature of text and of sizes.
        text_top_k: number of likeliest text tokens to sample from.
        text_top_p: total probability of the likeliest text tokens to sample from.
        temperature: temperature of visual tokens.
        top_k: number of likeliest visual tokens to sample from.
        top_p: total probability of the likeliest visual tokens to sample from.
        seed: seed of the first turn; each next one adds 1.
        parallel: number of tokens that a pass of the decoder checks within pictures.
        clips_as: "clip", "images" or "auto": how a clip is shown, see `chat`.
        frames: number of frames to show per clip, see `chat`.
        fps: frames to show per second of a clip, see `chat`.
        allow_special: whether control tokens in texts take effect.
        progress: True shows a progress bar on a terminal and lines in a log, None only the bar, False nothing.

    Raises:
        Emu3Error: bad input. The message says what is wrong and what to do.
    """
    writing = Writing(
        task, size, guidance, image_guidance, max_new_tokens, text_temperature, text_top_k, text_top_p, temperature,
        top_k, top_p, seed, 1, allow_special, progress, parallel, Showing(clips_as, frames, fps),
        max_size,
    )  # fmt: skip
    return Turns(self.language, lambda: self.vision, writing)

"""Documents: texts and pictures in turn, which a model writes from a text and pictures; see `Emu3.interleave`.

`turns` makes conversations of them.
"""

# `help(Emu3)` shows annotations as they are written here, `Media` and not the union that it stands for.
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from emu3_jax.errors import Emu3Error, RowError
from emu3_jax.fields import is_count, is_number
from emu3_jax.generation import defaults, grammar, interleaving
from emu3_jax.generation.codec import Vision, encode
from emu3_jax.generation.conversation import Model, Showing
from emu3_jax.generation.grammar import Grammar
from emu3_jax.generation.interleaving import InterleavedRow
from emu3_jax.generation.kept import Kept
from emu3_jax.generation.language import Language
from emu3_jax.generation.parallel import check_window
from emu3_jax.generation.pieces import Document, Growing, Piece, Reader, check_callbacks, deliver
from emu3_jax.generation.rows import Sampling, prompt_list
from emu3_jax.generation.sampling import RowSettings
from emu3_jax.media.inputs import Media
from emu3_jax.printable import shown
from emu3_jax.progress import Progress
from emu3_jax.text.prompts import next_turn_prompt, understanding_prompt
from emu3_jax.text.tasks import TASKS, Prompts, Task, task_prompts

_MOST_SIDE = 10**grammar.MOST_DIGITS - 1  # rows or columns of visual tokens

OnPiece = Callable[[int, Piece], Any]
OnRows = Callable[[int, Growing], Any]
OnText = Callable[[int, str], Any]


@dataclasses.dataclass(frozen=True)
class Writing:
    """Settings of documents. None stands for the task's value, or without a task for that of `generation.defaults`.

    Attributes:
        task: name of a task of `text.tasks.TASKS`, for models of Emu3.5; they need one.
        size: rows and columns of visual tokens of all pictures, or None to let the model choose.
        guidance: guidance scale of visual tokens; 1 means no guidance.
        image_guidance: scale of guidance towards the given pictures, or None for guidance with one scale.
        max_new_tokens: largest number of new tokens of a row, or None for the task's number, at most what fits.
        text_temperature: temperature of text.
        text_top_k: number of likeliest text tokens to sample from.
        text_top_p: total probability of the likeliest text tokens to sample from.
        temperature: temperature of visual tokens.
        top_k: number of likeliest visual tokens to sample from.
        top_p: total probability of the likeliest visual tokens to sample from.
        seed: seed of the first row; each next one adds 1.
        batch_size: number of rows to compute at once.
        allow_special: whether control tokens in texts take effect.
        progress: see `language.Batching`.
        parallel: number of tokens that a pass of the decoder checks per row within pictures, from 2 to 128, or "off" or
            "auto".
        showing: how clips are shown in a prompt.
        max_size: largest rows and columns of visual tokens that the model may choose, or None for no limit but the
            tokens that are left.
    """

    task: str | None = None
    size: tuple[int, int] | None = None
    guidance: float | None = None
    image_guidance: float | None = None
    max_new_tokens: int | None = None
    text_temperature: float | None = None
    text_top_k: int | None = None
    text_top_p: float | None = None
    temperature: float = defaults.TEMPERATURE
    top_k: int | None = None
    top_p: float = defaults.TOP_P
    seed: int = defaults.SEED
    batch_size: int = defaults.BATCH_SIZE
    allow_special: bool = False
    progress: bool | None = None
    parallel: int | str = defaults.PARALLEL
    showing: Showing = dataclasses.field(default_factory=Showing)
    max_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.task is not None and not (isinstance(self.task, str) and self.task in TASKS):
            raise Emu3Error(f"task is {shown(self.task)}: it must be one of {', '.join(TASKS)}")
        for name in ("size", "max_size"):
            value = getattr(self, name)
            sides = value if isinstance(value, tuple | list) else ()
            if value is not None and not (
                len(sides) == 2 and all(is_count(side) and side <= _MOST_SIDE for side in sides)
            ):
                raise Emu3Error(f"{name} is {shown(value)}: it must be (rows, columns), both from 1 to {_MOST_SIDE}")
        if self.size is not None and self.max_size is not None:
            raise Emu3Error("size and max_size: max_size limits sizes that the model chooses; leave one of them out")
        scale = self.image_guidance
        if scale is not None and not (is_number(scale) and 0 <= scale <= 1e9):
            raise Emu3Error(f"image_guidance is {shown(scale)}: it must be a number from 0 to 1e9")
        check_window(self.parallel)
        for name in ("max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if not (is_count(value) or (value is None and name == "max_new_tokens")):
                raise Emu3Error(f"{name} is {shown(value)}: it must be a whole number from 1 on")


def stream_documents(
    language: Language,
    vision: Callable[[], Vision],
    texts: Sequence[str],
    images: Sequence[Sequence[Media]],
    writing: Writing,
    growing: bool = False,
) -> Iterator[tuple[int, Piece | Growing | str | Document]]:
    """Writes one document per text.

    Args:
        language: the decoder and its tokenizer.
        vision: called when a picture is read or written, so documents of text alone need no vision tokenizer.
        texts: the prompts.
        images: pictures and clips to show with each prompt.
        writing: settings.
        growing: whether to yield pictures that are being written, too. Each time, one is decoded.

    Yields:
        (row, piece) when a piece of a row is complete, in order within a row; (row, text so far) while a text grows;
        with `growing`, (row, growing picture) when more rows of its visual tokens are finished; and (row, document)
        when the row is complete.

    Raises:
        Emu3Error: bad input. The message says what is wrong and what to do.
    """
    task = task_of(language, writing)
    rule = grammar_of(language)
    rows = []
    for index, (text, shown_images) in enumerate(zip(texts, images, strict=True)):
        codes = [part for item in shown_images for part in encoded(language, vision(), item, task, writing.showing)]
        prompts = prompts_of(language, rule, task, text, codes, writing.allow_special)
        rows.append(row_of(index, prompts, sizes_of(codes), writing, task, language.config.max_positions, rule))
    yield from stream_rows(language, vision, rule, task, rows, writing, growing=growing)


def stream_rows(
    language: Language,
    vision: Callable[[], Vision],
    rule: Grammar,
    task: Task | None,
    rows: Sequence[InterleavedRow],
    writing: Writing,
    kept: Kept | None = None,
    growing: bool = False,
) -> Iterator[tuple[int, Piece | Growing | str | Document]]:
    """As `stream_documents`, for rows with prompts of ids. `kept`: see `interleaving.stream`; for one batch only."""
    config = language.config
    text_settings, visual_settings = settings_of_rows(writing, task, len(rows))
    scales = np.full(len(rows), 1.0 if writing.image_guidance is None else writing.image_guidance)
    batches = [
        range(first, min(first + writing.batch_size, len(rows))) for first in range(0, len(rows), writing.batch_size)
    ]
    with Progress(writing.progress, sum(row.steps for row in rows), "tokens", name="interleave") as bar:
        for batch in batches:
            places = np.asarray(batch)
            reading = {index: Reader(language, vision, rule, rows[index], growing) for index in batch}
            before, expected = bar.done, sum(rows[index].steps for index in batch)
            for made in interleaving.stream(
                language.params, config, rule, [rows[index] for index in batch],
                text_settings.take(places), visual_settings.take(places), scales[places],
                mesh=language.mesh, narrow_cache=language.narrow_cache, parallel=writing.parallel, kept=kept,
            ):  # fmt: skip
                bar.update(before + sum(map(len, made.ids)) - bar.done)
                for index, ids, ended in zip(batch, made.ids, made.done, strict=True):
                    if index not in reading:
                        continue
                    for piece in reading[index].read(ids, bool(ended)):
                        yield index, piece
                    if (document := reading[index].document) is not None:
                        yield index, document
                        del reading[index]
            bar.update(before + expected - bar.done)


def grammar_of(language: Language) -> Grammar:
    """The grammar of a model's family, with the ids of its tokenizer."""
    single = {}
    for character in "0123456789*":
        ids = language.tokenizer.encode(character)
        if len(ids) != 1:
            raise Emu3Error(f"the vocabulary has no single token for {character!r}, which sizes of pictures need")
        single[character] = ids[0]
    times = single.pop("*")
    return Grammar.of(language.config, tuple(single.values()), times)


def task_of(language: Language, writing: Writing) -> Task | None:
    """The task of documents: models of Emu3.5 need one, others have none. Raises `Emu3Error` if that does not fit."""
    name = writing.task
    if language.config.family == "emu3.5":
        if name is None:
            raise Emu3Error(f"a model of Emu3.5 needs a task: give one of {', '.join(TASKS)}")
        return TASKS[name]
    if name is not None:
        raise Emu3Error(f"task is {shown(name)}, but this model is of Emu3, which has no tasks: leave it out")
    return None


def encoded(language: Language, vision: Vision, item: Media, task: Task | None, showing: Showing) -> list[np.ndarray]:
    """The codes of a picture or clip to show: int32 [h, w] of pictures, int32 [t, h, w] of a clip.

    Raises:
        Emu3Error: it cannot be read or shown. Prompts of a task have no place for clips.
    """
    if task is not None:
        return [encode(vision, item, area=task.area)]
    return showing.codes(vision, item, language.config.clip_frames)


def sizes_of(codes: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """Rows and columns of the codes of pictures and clips."""
    return [(item.shape[-2], item.shape[-1]) for item in codes]


def prompts_of(
    language: Language,
    rule: Grammar,
    task: Task | None,
    text: str,
    codes: Sequence[np.ndarray],
    allow_special: bool,
    later: bool = False,
) -> Prompts:
    """The prompts of a text with pictures: of a first turn, or those that a later turn appends to the conversation."""
    tokenizer = language.tokenizer
    if allow_special:
        _check_pictures(tokenizer.encode(text, allow_special=True), rule)
    if task is not None:
        pictures = [i for picture in codes for i in grammar.picture_ids(picture, rule)]
        return task_prompts(tokenizer, task, text, pictures, allow_special=allow_special, later=later)

    def prompt(text: str, codes: Sequence[np.ndarray]) -> list[int]:
        make = next_turn_prompt if later else understanding_prompt
        return make(
            tokenizer, language.config.tokens, language.templates, text, list(codes), allow_special=allow_special
        )

    return Prompts(prompt(text, codes), prompt("", codes), prompt("", ()))


def _check_pictures(ids: Sequence[int], rule: Grammar) -> None:
    """Raises `Emu3Error` if the control tokens of a text form anything but whole pictures."""
    try:
        pieces = grammar.split(ids, rule)
    except Emu3Error as error:
        raise Emu3Error(f"the text's control tokens form no whole picture: {error}; correct or remove them") from error
    if pieces and isinstance(pieces[-1], grammar.Picture) and not pieces[-1].whole:
        raise Emu3Error("the text opens a picture with <|image start|> but does not end it: complete or remove it")


def row_of(
    index: int,
    prompts: Prompts,
    sizes: Sequence[tuple[int, int]],
    writing: Writing,
    task: Task | None,
    positions: int,
    rule: Grammar,
    later: bool = False,
) -> InterleavedRow:
    """The row of a request.

    Args:
        index: number of the row, for errors.
        prompts: its whole prompts.
        sizes: rows and columns of the pictures in the prompts.
        writing: settings.
        task: the task, or None.
        positions: number of the model's positions.
        rule: the model's grammar.
        later: whether the prompts are those of a later turn.

    Raises:
        RowError: the prompts do not fit into the positions, or the settings do not fit the prompts.
    """
    guided = _scale(writing, task) != 1.0 or writing.image_guidance is not None
    both = guided and writing.image_guidance is not None
    if both and not sizes:
        raise RowError(index, "image_guidance guides towards given pictures, and there is none: leave it out")
    contexts = [prompts.conditional, *([prompts.unconditional] if guided else []), *([prompts.empty] if both else [])]
    room = positions - max(map(len, contexts))
    what, remedy = ("conversation", "begin a new one") if later else ("prompt", "shorten it")
    if room < 1:
        raise RowError(
            index,
            f"the {what} takes {positions - room} tokens, but the model has {positions} positions: {remedy}, or show "
            "fewer or smaller pictures",
        )
    # As the reference does: without a size, pictures get the size of the last one in the prompt.
    size = writing.size
    if size is None and sizes and rule.same_size:
        size = sizes[-1]
    most_size = writing.max_size
    if most_size is not None and min(most_size) < rule.least_side:
        raise Emu3Error(
            f"max_size is {most_size[0]}*{most_size[1]}: the sides that this model chooses have at least "
            f"{rule.least_side} visual tokens; raise it, or give a size"
        )
    if most_size is not None and size is not None and (size[0] > most_size[0] or size[1] > most_size[1]):
        raise RowError(
            index,
            f"pictures take the size of the last given picture, {size[0]}*{size[1]}, which is more than max_size "
            f"{most_size[0]}*{most_size[1]}: give size, or leave max_size out",
        )
    if size is not None and rule.picture_length(*size) > room:
        raise RowError(
            index, f"a picture of {size[0]}*{size[1]} takes {rule.picture_length(*size)} tokens, but the {what} leaves "
            f"{room} positions: choose a smaller size"
        )  # fmt: skip
    most = writing.max_new_tokens or min(defaults.MAX_NEW_TOKENS if task is None else task.steps, room)
    return InterleavedRow(
        prompts.conditional, prompts.unconditional if guided else None, prompts.empty if both else None, size,
        min(most, room), most_size,
    )  # fmt: skip


def _scale(writing: Writing, task: Task | None) -> float:
    if writing.guidance is not None:
        return writing.guidance
    return defaults.GUIDANCE if task is None else task.guidance


def settings_of_rows(writing: Writing, task: Task | None, count: int) -> tuple[RowSettings, RowSettings]:
    """The settings of text and of visual tokens. Raises `Emu3Error` if one is not legal."""

    def told(name: str, default: Any) -> Any:
        value = getattr(writing, name)
        return value if value is not None else getattr(task, name, default)

    visual = Sampling(
        temperature=writing.temperature,
        top_k=told("top_k", defaults.TOP_K),
        top_p=writing.top_p,
        guidance=_scale(writing, task),
        seed=writing.seed,
    )
    try:
        text = Sampling(
            temperature=told("text_temperature", defaults.TEMPERATURE),
            top_k=told("text_top_k", 2**31 - 1),
            top_p=told("text_top_p", 1.0),
            guidance=1.0,
            seed=writing.seed,
        )
    except Emu3Error as error:
        raise Emu3Error(f"text_{error}") from error  # it begins with the argument's name
    return text.settings(count), visual.settings(count)


def interleave(
    self: Model,
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

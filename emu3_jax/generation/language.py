"""The decoder in memory, and the functions that generate pictures' and clips' codes and answers with it, in batches."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from emu3_jax.config import DecoderConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.fields import is_count
from emu3_jax.generation import defaults, session
from emu3_jax.generation.rows import Sampling
from emu3_jax.generation.sampling import RowSettings
from emu3_jax.generation.schedule import TokenClass, grid_length, grid_schedule, text_schedule
from emu3_jax.generation.session import DecodeSession, Row
from emu3_jax.models.quantization import narrows_cache
from emu3_jax.printable import shown
from emu3_jax.progress import Progress
from emu3_jax.text.prompts import PromptTemplates, frame_ids, generation_prompt
from emu3_jax.text.tokenizer import Tokenizer

# Told of tokens while later ones are sampled: the numbers of a batch's rows, and their ids so far, int32
# [B, steps taken].
OnTokens = Callable[[Sequence[int], np.ndarray], None]

_MOST_AT_ONCE = 4096  # rows of a batch; far more than any device has room for


@dataclasses.dataclass(frozen=True)
class Language:
    """The decoder in memory, with the tokenizer and prompt templates that it was trained with.

    Attributes:
        config: the decoder's.
        params: its parameters.
        tokenizer: of text.
        templates: of prompts.
        mesh: what the parameters are spread over, if anything.
        quantize: how the parameters are quantised, of `models.quantization.KINDS`; None where they are not.
    """

    config: DecoderConfig
    params: Any
    tokenizer: Tokenizer
    templates: PromptTemplates
    mesh: Mesh | None = None
    quantize: str | None = None

    @property
    def narrow_cache(self) -> bool:
        """Whether keys and values are kept as int8."""
        return narrows_cache(self.quantize)


@dataclasses.dataclass(frozen=True)
class Batching:
    """How rows are computed.

    Attributes:
        batch_size: rows at once.
        progress: True shows a bar on a terminal and lines in a log, None only the bar, False nothing.
        deterministic: the program that computes a row is always the same, whatever rows are beside it: rows whose
            programs differ are not computed together, and every batch is filled up to `batch_size` rows.
    """

    batch_size: int = defaults.BATCH_SIZE
    progress: bool | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        if not is_count(self.batch_size) or self.batch_size > _MOST_AT_ONCE:
            raise Emu3Error(
                f"batch_size is {shown(self.batch_size)}: it must be a whole number from 1 to {_MOST_AT_ONCE}"
            )


@dataclasses.dataclass(frozen=True)
class Grid:
    """A grid of codes to generate: a picture's, or a clip's.

    Attributes:
        prompt: what to show.
        negative: the unconditional branch of guidance.
        size: rows and columns; before them, of a clip, its latent frames.
        given: codes [t, h, w] of a clip's first latent frames, which the prompt holds; or None.
    """

    prompt: str
    negative: str
    size: tuple[int, ...]
    given: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class GeneratedGrid:
    """What became of a `Grid`.

    Attributes:
        ids: int32 [prompt + generated].
        prompt_length: how many of `ids` are the prompt.
        codes: int32, in the shape of the grid's size; they begin with what was given.
    """

    ids: np.ndarray
    prompt_length: int
    codes: np.ndarray


def generate_grids(
    language: Language,
    grids: Sequence[Grid],
    settings: RowSettings,
    *,
    batching: Batching,
    allow_special: bool = False,
    on_tokens: OnTokens | None = None,
) -> list[GeneratedGrid]:
    """Generates the codes of pictures or clips. Arguments and errors: `stream_grids`."""
    made = dict(
        stream_grids(language, grids, settings, batching=batching, allow_special=allow_special, on_tokens=on_tokens)
    )
    return [made[row] for row in range(len(grids))]


def stream_grids(
    language: Language,
    grids: Sequence[Grid],
    settings: RowSettings,
    *,
    batching: Batching,
    allow_special: bool = False,
    on_tokens: OnTokens | None = None,
) -> Iterator[tuple[int, GeneratedGrid]]:
    """Generates the codes of pictures or clips, and yields those of a batch, with their rows, when it is done.

    All rows are checked before the first batch. The next batch begins when those of the last one were taken.

    Args:
        language: the decoder.
        grids: one per row.
        settings: how each row samples. Where no row's guidance scale differs from 1, nothing unconditional is computed.
        batching: how rows are computed.
        allow_special: lets control tokens in prompts act as such.
        on_tokens: see `OnTokens`.

    Raises:
        Emu3Error: a control token in a prompt that may have none, or a row that exceeds the model's positions.
    """
    special, layout = language.config.tokens, language.config.clip_layout

    # Many rows may be of one prompt and one size: they share their ids and schedules.
    @functools.cache
    def head(text: str, size: tuple[int, ...]) -> list[int]:
        return generation_prompt(language.tokenizer, special, text, *size, allow_special=allow_special)

    @functools.cache
    def schedule(size: tuple[int, ...], given: int) -> np.ndarray:
        return grid_schedule(size, layout, given=given)

    def prompt_ids(text: str, grid: Grid) -> list[int]:
        ids = head(text, grid.size)
        return ids if grid.given is None else ids + frame_ids(special, grid.given, layout)

    prompts = [(prompt_ids(grid.prompt, grid), prompt_ids(grid.negative, grid)) for grid in grids]
    given = [0 if grid.given is None else len(grid.given) for grid in grids]
    # Before the schedules are made: a size may be of millions of tokens.
    lengths = [
        grid_length((grid.size[0] - count, *grid.size[1:]) if count else grid.size, layout)
        for grid, count in zip(grids, given, strict=True)
    ]
    session.check_positions(language.config, zip((max(map(len, pair)) for pair in prompts), lengths, strict=True))
    rows = [
        Row(prompt, schedule(grid.size, count), negative)
        for (prompt, negative), grid, count in zip(prompts, grids, given, strict=True)
    ]
    plain = settings.guidance == 1.0
    if plain.all() or batching.deterministic:
        rows = [dataclasses.replace(row, negative=None) if one else row for row, one in zip(rows, plain, strict=True)]
    for index, ids in _run_batches(language, rows, settings, batching, on_tokens):
        grid, row = grids[index], rows[index]
        codes = (ids[row.schedule == TokenClass.VISUAL] - special.visual_start).astype(np.int32)
        if grid.given is not None:
            codes = np.concatenate([grid.given.ravel(), codes])
        full = np.concatenate([np.asarray(row.prompt, np.int32), ids])
        yield index, GeneratedGrid(full, len(row.prompt), codes.reshape(grid.size))


def answer(
    language: Language,
    inputs: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    batching: Batching,
) -> list[np.ndarray]:
    """The ids that follow each row of ids.

    Args:
        language: the decoder.
        inputs: rows of ids that end where an answer begins.
        sampling: how tokens are sampled; no row is guided.
        max_new_tokens: an answer's longest length; answers also end where the model's positions do.
        batching: how rows are computed.

    Raises:
        Emu3Error: a row leaves no position for an answer, or a number is not legal.
    """
    if not is_count(max_new_tokens):
        raise Emu3Error(f"max_new_tokens is {shown(max_new_tokens)}: it must be a whole number >= 1")
    positions = language.config.max_positions
    rows = []
    for index, ids in enumerate(inputs):
        room = positions - len(ids)
        if room < 1:
            raise Emu3Error(
                f"row {index}: what is shown and asked takes {len(ids)} tokens, the model has {positions} positions: "
                "shorten the prompt, use smaller or fewer pictures, or fewer frames of a clip"
            )
        rows.append(Row(ids, text_schedule(min(max_new_tokens, room))))
    made = dict(_run_batches(language, rows, sampling.settings(len(rows)), batching))
    return [made[index] for index in range(len(rows))]


def _run_batches(
    language: Language,
    rows: Sequence[Row],
    settings: RowSettings,
    batching: Batching,
    on_tokens: OnTokens | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """The number of each row and its generated ids, cut to its own schedule, batch by batch."""
    batches = _batches(language, rows, settings, batching)
    lengths = [max(len(rows[index].schedule) for index in batch) for batch in batches]
    with Progress(batching.progress, sum(lengths), "tokens", name="generate") as bar:
        for batch, length in zip(batches, lengths, strict=True):
            before = bar.done

            def on_progress(taken: int, _: int, before: int = before) -> None:
                bar.update(before + taken - bar.done)

            ids = session.run(
                language.params,
                language.config,
                [rows[index] for index in batch],
                settings.take(np.asarray(batch)),
                on_progress=on_progress,
                on_tokens=on_tokens and functools.partial(on_tokens, batch),
                mesh=language.mesh,
                narrow_cache=language.narrow_cache,
                least_rows=batching.batch_size if batching.deterministic else 1,
            )
            bar.update(before + length - bar.done)
            for index, row in zip(batch, ids, strict=True):
                yield index, row[: len(rows[index].schedule)]


def _batches(language: Language, rows: Sequence[Row], settings: RowSettings, batching: Batching) -> list[Sequence[int]]:
    """The numbers of the rows that are computed together."""
    groups: dict[Any, list[int]] = {}
    for index, row in enumerate(rows):
        shapes = None
        if batching.deterministic:
            # What the row's programs would be compiled for if it were alone.
            one = settings.take(np.asarray([index]))
            narrow = language.narrow_cache
            alone = DecodeSession(language.params, language.config, [row], one, mesh=language.mesh, narrow_cache=narrow)
            shapes = alone.shapes
        groups.setdefault(shapes, []).append(index)
    size = batching.batch_size
    return [group[first : first + size] for group in groups.values() for first in range(0, len(group), size)]

"""The decoder in memory, and functions that generate codes and answers with it in batches."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from emu3_jax.config import DecoderConfig
from emu3_jax.errors import Emu3Error, RowError
from emu3_jax.fields import is_count
from emu3_jax.generation import defaults, session
from emu3_jax.generation.kept import Kept
from emu3_jax.generation.parallel import check_window
from emu3_jax.generation.rows import Sampling
from emu3_jax.generation.sampling import RowSettings
from emu3_jax.generation.schedule import TokenClass, grid_length, grid_schedule, text_schedule
from emu3_jax.generation.session import DecodeSession
from emu3_jax.generation.session_rows import Row, check_positions
from emu3_jax.generation.zipar import check_zipar
from emu3_jax.models.quantization import narrows_cache
from emu3_jax.printable import shown
from emu3_jax.progress import Progress
from emu3_jax.text.prompts import PromptTemplates, frame_ids, generation_prompt
from emu3_jax.text.tokenizer import SpecialTokenError, Tokenizer

# A function that is called while later tokens are sampled. It gets the indices of a batch's rows, and the ids of each
# so far, int32 [steps of the row].
OnTokens = Callable[[Sequence[int], list[np.ndarray]], None]


@dataclasses.dataclass(frozen=True)
class Language:
    """The decoder in memory, with its text tokenizer and prompt templates.

    Attributes:
        config: config of the decoder.
        params: parameters of the decoder.
        tokenizer: text tokenizer.
        templates: prompt templates.
        mesh: mesh over which the parameters are spread, or None.
        quantize: quantisation of the parameters, from `models.quantization.KINDS`, or None.
    """

    config: DecoderConfig
    params: Any
    tokenizer: Tokenizer
    templates: PromptTemplates
    mesh: Mesh | None = None
    quantize: str | None = None

    def require_emu3(self) -> None:
        """Raises `Emu3Error` if the model is of another family, whose prompts and pictures are not Emu3's."""
        if self.config.family != "emu3":
            raise Emu3Error(
                "this model is of Emu3.5, which writes texts and pictures in turn: use `emu3-jax interleave` "
                "(Emu3.interleave) with a task, for a picture t2i"
            )

    @property
    def narrow_cache(self) -> bool:
        """Whether keys and values are stored as int8."""
        return narrows_cache(self.quantize)


@dataclasses.dataclass(frozen=True)
class Batching:
    """Settings of batching and progress.

    Attributes:
        batch_size: number of rows to compute at once.
        progress: True shows a progress bar on a terminal and lines in a log, None shows only the bar, False nothing.
        deterministic: compute a row always with the same program, whatever the other rows are. Rows with different
            programs are not batched together, and every batch is padded to `batch_size` rows.
        parallel: "auto", "off", or the number of tokens of a pass per row; see `parallel.choose_window`.
        zipar: number of tokens that a row of the grid is ahead of the next one, or None; see `zipar`. Not for answers.
    """

    batch_size: int = defaults.BATCH_SIZE
    progress: bool | None = None
    deterministic: bool = False
    parallel: int | str = defaults.PARALLEL
    zipar: int | None = None

    def __post_init__(self) -> None:
        if not is_count(self.batch_size) or self.batch_size > defaults.MOST_ROWS:
            raise Emu3Error(
                f"batch_size is {shown(self.batch_size)}: it must be a whole number from 1 to {defaults.MOST_ROWS}"
            )
        check_window(self.parallel)
        check_zipar(self.zipar, self.parallel)


@dataclasses.dataclass(frozen=True)
class Grid:
    """A request to generate the codes of a picture or a clip.

    Attributes:
        prompt: the prompt.
        negative: the negative prompt, which guidance uses as the unconditional prompt.
        size: (rows, columns) of a picture, or (latent frames, rows, columns) of a clip.
        given: codes [t, h, w] of a clip's first latent frames, which become part of the prompt, or None.
    """

    prompt: str
    negative: str
    size: tuple[int, ...]
    given: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class GeneratedGrid:
    """The result of a `Grid`.

    Attributes:
        ids: int32 [prompt + generated].
        prompt_length: number of `ids` that belong to the prompt.
        codes: int32, in the shape of the grid's size, including the given codes.
        passes: number of passes of the decoder, with prefill.
    """

    ids: np.ndarray
    prompt_length: int
    codes: np.ndarray
    passes: int


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
    """Generates the codes of pictures or clips, and yields (row, result) for each row of a batch when it is done.

    All rows are checked before the first batch. The next batch starts after all results of the previous one were taken.

    Args:
        language: the decoder.
        grids: one request per row.
        settings: sampling settings of each row. If all guidance scales are 1, no unconditional rows are computed.
        batching: batching of rows.
        allow_special: whether control tokens in prompts take effect.
        on_tokens: see `OnTokens`.

    Raises:
        Emu3Error: a prompt has control tokens without `allow_special`, or a row exceeds the model's positions.
    """
    rows = grid_rows(language, grids, allow_special)
    plain = settings.guidance == 1.0
    if plain.all() or batching.deterministic:
        rows = [dataclasses.replace(row, negative=None) if one else row for row, one in zip(rows, plain, strict=True)]
    for index, ids, passes in _run_batches(language, rows, settings, batching, on_tokens):
        grid, row = grids[index], rows[index]
        codes = visual_codes(language, row, ids)
        if grid.given is not None:
            codes = np.concatenate([grid.given.ravel(), codes])
        full = np.concatenate([np.asarray(row.prompt, np.int32), ids])
        yield index, GeneratedGrid(full, len(row.prompt), codes.reshape(grid.size), passes)


def grid_rows(language: Language, grids: Sequence[Grid], allow_special: bool = False) -> list[Row]:
    """The rows of a session that generate pictures or clips, with their unconditional prompts.

    Raises:
        Emu3Error: a prompt has control tokens without `allow_special`, or a row exceeds the model's positions.
    """
    language.require_emu3()
    special, layout = language.config.tokens, language.config.clip_layout

    # Rows of the same prompt and size share their ids and schedules.
    @functools.cache
    def head(text: str, size: tuple[int, ...]) -> list[int]:
        return generation_prompt(language.tokenizer, special, text, *size, allow_special=allow_special)

    @functools.cache
    def schedule(size: tuple[int, ...], given: int) -> np.ndarray:
        return grid_schedule(size, layout, given=given)

    def prompt_ids(text: str, grid: Grid) -> list[int]:
        ids = head(text, grid.size)
        return ids if grid.given is None else ids + frame_ids(special, grid.given, layout)

    prompts = []
    for row, grid in enumerate(grids):
        try:
            prompt = prompt_ids(grid.prompt, grid)
        except SpecialTokenError as error:
            raise SpecialTokenError(error.token, row) from error
        prompts.append((prompt, prompt_ids(grid.negative, grid)))
    given = [0 if grid.given is None else len(grid.given) for grid in grids]
    # Checked before schedules are made, because a size may have millions of tokens.
    lengths = [
        grid_length((grid.size[0] - count, *grid.size[1:]) if count else grid.size, layout)
        for grid, count in zip(grids, given, strict=True)
    ]
    check_positions(language.config, zip((max(map(len, pair)) for pair in prompts), lengths, strict=True))
    return [
        Row(prompt, schedule(grid.size, count), negative)
        for (prompt, negative), grid, count in zip(prompts, grids, given, strict=True)
    ]


def visual_codes(language: Language, row: Row, ids: np.ndarray) -> np.ndarray:
    """The codes, int32 [N], among the ids that a row has so far, int [S]."""
    visual = ids[row.schedule[: len(ids)] == TokenClass.VISUAL]
    return (visual - language.config.tokens.visual_start).astype(np.int32)


def answer(
    language: Language,
    inputs: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    batching: Batching,
    kept: Kept | None = None,
) -> list[np.ndarray]:
    """Generates answers.

    Args:
        language: the decoder.
        inputs: ids of each row's prompt. They end where the answer begins.
        sampling: sampling settings. Guidance is not used.
        max_new_tokens: largest number of tokens of an answer. Answers also end at the model's last position.
        batching: batching of rows.
        kept: see `session.DecodeSession`; for one batch only.

    Returns:
        The ids of each row's answer.

    Raises:
        Emu3Error: a prompt leaves no position for an answer, or `max_new_tokens` is not legal.
    """
    rows = answer_rows(language, inputs, max_new_tokens)
    settings = sampling.settings(len(rows))
    made = {index: ids for index, ids, _ in _run_batches(language, rows, settings, batching, kept=kept)}
    return [made[index] for index in range(len(rows))]


def answer_rows(language: Language, inputs: Sequence[Sequence[int]], max_new_tokens: int) -> list[Row]:
    """The rows of a session that generate answers. Arguments and errors: `answer`."""
    language.require_emu3()
    if not is_count(max_new_tokens):
        raise Emu3Error(f"max_new_tokens is {shown(max_new_tokens)}: it must be a whole number >= 1")
    positions = language.config.max_positions
    rows = []
    for index, ids in enumerate(inputs):
        room = positions - len(ids)
        if room < 1:
            raise RowError(
                index,
                f"pictures and question take {len(ids)} tokens, but the model has {positions} positions: "
                "shorten the question, or use fewer or smaller pictures, or fewer frames of a clip",
            )
        rows.append(Row(ids, text_schedule(min(max_new_tokens, room))))
    return rows


def _run_batches(
    language: Language,
    rows: Sequence[Row],
    settings: RowSettings,
    batching: Batching,
    on_tokens: OnTokens | None = None,
    kept: Kept | None = None,
) -> Iterator[tuple[int, np.ndarray, int]]:
    """Runs batch by batch, and yields (index, generated ids, passes) of each row.

    The ids have the length of the row's schedule.
    """
    batches = _batches(language, rows, settings, batching)
    lengths = [max(len(rows[index].schedule) for index in batch) for batch in batches]
    with Progress(batching.progress, sum(lengths), "tokens", name="generate") as bar:
        for batch, length in zip(batches, lengths, strict=True):
            before = bar.done

            def on_progress(taken: int, _: int, before: int = before) -> None:
                bar.update(before + taken - bar.done)

            made = session.run(
                language.params,
                language.config,
                [rows[index] for index in batch],
                settings.take(np.asarray(batch)),
                on_progress=on_progress,
                on_tokens=on_tokens and functools.partial(on_tokens, batch),
                mesh=language.mesh,
                narrow_cache=language.narrow_cache,
                least_rows=batching.batch_size if batching.deterministic else 1,
                parallel=batching.parallel,
                zipar=batching.zipar,
                kept=kept,
            )
            bar.update(before + length - bar.done)
            for index, ids, passes in zip(batch, made.ids, made.passes.tolist(), strict=True):
                yield index, ids[: len(rows[index].schedule)], passes


def _batches(language: Language, rows: Sequence[Row], settings: RowSettings, batching: Batching) -> list[Sequence[int]]:
    """Groups the indices of rows to batches."""
    groups: dict[Any, list[int]] = {}
    for index, row in enumerate(rows):
        shapes = None
        if batching.deterministic:
            # The shapes of a session with only this row, and copies of it.
            one = settings.take(np.asarray([index]))
            alone = DecodeSession(
                language.params, language.config, [row], one, mesh=language.mesh, narrow_cache=language.narrow_cache,
                least_rows=batching.batch_size, parallel=batching.parallel, zipar=batching.zipar,
            )  # fmt: skip
            shapes = alone.shapes
        groups.setdefault(shapes, []).append(index)
    size = batching.batch_size
    return [group[first : first + size] for group in groups.values() for first in range(0, len(group), size)]

"""Jobs as rows of a decode session: from fields to prompts and schedules, and from the ids of a row to events."""

import abc
import dataclasses
from collections.abc import Callable

import numpy as np

from emu3_jax.errors import Emu3Error
from emu3_jax.generation.codec import decoding_picture, encode_resized
from emu3_jax.generation.conversation import dialogue_prompt
from emu3_jax.generation.language import Grid, answer_rows, grid_rows, visual_codes
from emu3_jax.generation.pictures import metadata
from emu3_jax.generation.pipeline import Emu3
from emu3_jax.generation.rows import Sampling, describe, prompt_list, texts_per_row
from emu3_jax.generation.sampling import RowSettings
from emu3_jax.generation.session_rows import Row
from emu3_jax.media.images import resize, to_rgb
from emu3_jax.media.sizes import generate_size
from emu3_jax.printable import shown
from emu3_jax.serving.jobs import AnswerJob, AnswerText, Event, Finished, Job, PictureJob, PictureRows

# Waits for the device and returns an event.
Later = Callable[[], Event]


class Work(abc.ABC):
    """A job, checked, on its way through a session. Only `row`, `more` and `finish` use the device.

    Attributes:
        settings: sampling settings, one row.
        prompt: number of tokens of the longer prompt.
        steps: number of tokens of the schedule.
        again: whether the job needs another row, once `finish` was called for the present one.
    """

    settings: RowSettings
    prompt: int
    steps: int
    again: bool = False

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """The `prompt` and `steps` of all rows that the job needs."""
        return [(self.prompt, self.steps)]

    @abc.abstractmethod
    def row(self) -> Row:
        """The row. Pictures of a question are encoded."""

    @abc.abstractmethod
    def more(self, ids: np.ndarray, wanted: Callable[[], bool]) -> list[Later]:
        """What is new, given the ids of the row so far, int32 [S].

        `wanted` says whether someone waits for more of a picture. It is only asked if there is more.
        """

    @abc.abstractmethod
    def finish(self, ids: np.ndarray, ended: bool, passes: int) -> list[Later]:
        """The last events of the row, given all its sampled ids. `ended` is that of `session_rows.Reading`."""


def settings_of(job: Job, guidance: float) -> RowSettings:
    """The sampling settings of a job. Raises `Emu3Error` if one is not legal."""
    for name in ("temperature", "top_k", "top_p", "seed"):
        _one(name, getattr(job, name))
    return Sampling(job.temperature, job.top_k, job.top_p, _one("guidance", guidance), job.seed).settings(1)


def _one(name: str, value: float) -> float:
    """Raises `Emu3Error` for a list of values, which `Sampling` would accept."""
    if not isinstance(value, int | float | np.number):
        raise Emu3Error(f"{name} is {shown(value)}: it must be one number")
    return value


def one_text(name: str, value: str) -> str:
    """Raises `Emu3Error` for anything but one text."""
    if not isinstance(value, str):
        raise Emu3Error(f"{name} is {shown(value)}: it must be a text")
    return value


class PictureWork(Work):
    """A picture."""

    def __init__(self, model: Emu3, job: PictureJob):
        language, self._vision = model.language, model.vision
        language.require_emu3()
        self._language, self._name, self._ratio = language, model.name, one_text("ratio", job.ratio)
        area = language.config.image_area if job.area is None else job.area
        size = generate_size(job.ratio, area, self._vision.config.spatial_factor)
        (prompt,), (negative,) = prompt_list(one_text("prompt", job.prompt)), texts_per_row("negative", job.negative, 1)
        self.settings = settings_of(job, job.guidance)
        self._partial = job.partial
        self._grid = Grid(prompt, one_text("negative", negative), size)
        (row,) = grid_rows(language, [self._grid])
        self._row = Row(row.prompt, row.schedule, None if job.guidance == 1 else row.negative)
        self.prompt, self.steps = max(len(row.prompt), len(self._row.negative or ())), len(row.schedule)
        self._shown = 0  # number of rows of codes that were shown

    def row(self) -> Row:
        """See `Work`."""
        return self._row

    def more(self, ids: np.ndarray, wanted: Callable[[], bool]) -> list[Later]:
        """See `Work`."""
        if not self._partial:
            return []
        rows, columns = self._grid.size
        codes = visual_codes(self._language, self._row, ids)
        count = len(codes) // columns
        if count <= self._shown or count == rows or not wanted():
            return []
        self._shown = count
        codes = codes[: count * columns].reshape(count, columns)
        # Decoded at its whole size, with the program of whole pictures. The last row stands for later ones.
        picture = decoding_picture(self._vision, np.pad(codes, ((0, rows - count), (0, 0)), mode="edge"))

        def event() -> Event:
            image = picture()
            return PictureRows(np.asarray(image)[: image.height * count // rows], image.size)

        return [event]

    def finish(self, ids: np.ndarray, ended: bool, passes: int) -> list[Later]:
        """See `Work`."""
        codes = visual_codes(self._language, self._row, ids).reshape(self._grid.size)
        picture = decoding_picture(self._vision, codes)

        def event() -> Event:
            image = picture()
            drawn = describe(self.settings, 0) | {"passes": str(passes)}
            image.info = metadata(image, self._grid, self._ratio, drawn, self._name)
            return Finished(
                picture=image, prompt_tokens=len(self._row.prompt), tokens=len(self._row.schedule), passes=passes
            )

        return [event]


class AnswerWork(Work):
    """An answer to a question, with or without pictures."""

    def __init__(self, model: Emu3, job: AnswerJob):
        self._model, self._language = model, model.language
        self._job = dataclasses.replace(job, pictures=())  # only the resized pixels are kept
        self._language.require_emu3()
        one_text("prompt", job.prompt)
        for turn in job.history:
            for text in turn:
                one_text("history", text)
        self.settings = settings_of(job, 1.0)
        self._pixels = []
        if job.pictures:
            vision = model.vision
            factor = vision.config.spatial_factor
            self._pixels = [np.asarray(resize(to_rgb(picture), vision.image, factor)) for picture in job.pictures]
            shapes = [(len(pixels) // factor, pixels.shape[1] // factor) for pixels in self._pixels]
            row = self._row_of([np.zeros(shape, np.int32) for shape in shapes])
        else:
            row = self._row_of([])
        self.prompt, self.steps = len(row.prompt), len(row.schedule)
        self._sent = ""

    def _row_of(self, codes: list[np.ndarray]) -> Row:
        ids = dialogue_prompt(self._language, self._job.history, self._job.prompt, codes)
        return answer_rows(self._language, [ids], self._job.max_new_tokens)[0]

    def row(self) -> Row:
        """See `Work`."""
        return self._row_of([encode_resized(self._model.vision, pixels) for pixels in self._pixels])

    def _decoded(self, ids: np.ndarray) -> str:
        return self._language.tokenizer.decode(ids.tolist(), skip_special=True)

    def more(self, ids: np.ndarray, wanted: Callable[[], bool]) -> list[Later]:
        """See `Work`."""
        return self._new(self._decoded(ids).rstrip("\N{REPLACEMENT CHARACTER}"))  # the first bytes of a character

    def _new(self, text: str) -> list[Later]:
        new = text[len(self._sent) :]
        if not new:
            return []
        self._sent = text
        return [lambda: AnswerText(new)]

    def finish(self, ids: np.ndarray, ended: bool, passes: int) -> list[Later]:
        """See `Work`."""
        whole = self._decoded(ids)
        last = self._new(whole)
        finished = Finished(text=whole, ended=ended, prompt_tokens=self.prompt, tokens=len(ids), passes=passes)
        return [*last, lambda: finished]

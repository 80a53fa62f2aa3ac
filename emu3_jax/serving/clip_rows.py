"""Clips as rows of a decode session: one row after the other, until the clip has all its frames."""

import dataclasses
from collections.abc import Callable

import numpy as np

from emu3_jax.errors import Emu3Error
from emu3_jax.fields import is_count
from emu3_jax.generation.clips import (
    MOST_BYTES,
    ClipTooLarge,
    GrowingClip,
    latents_of_a_pass,
    next_latents,
    next_seeds,
)
from emu3_jax.generation.codec import encode_end
from emu3_jax.generation.language import Grid, grid_rows
from emu3_jax.generation.pipeline import Emu3
from emu3_jax.generation.session_rows import Row
from emu3_jax.media.clips import check_fps, resize_frames
from emu3_jax.media.images import to_rgb
from emu3_jax.media.sizes import generate_size
from emu3_jax.media.videos import MAX_FRAMES
from emu3_jax.printable import shown
from emu3_jax.serving.jobs import ClipFrames, ClipJob, Finished
from emu3_jax.serving.rows import Later, Work, one_text, settings_of


class ClipWork(Work):
    """A clip; see `Emu3.generate_clips`, whose passes are rows here.

    A row begins with the last frames of the row before it, so it can only begin when these are decoded.
    """

    def __init__(self, model: Emu3, job: ClipJob):
        language, self._vision = model.language, model.vision
        language.require_emu3()
        self._language, self._factor = language, self._vision.clips().temporal_factor
        self._job = dataclasses.replace(job, picture=None)  # only the resized pixels are kept
        one_text("prompt", job.prompt)
        one_text("negative", job.negative)
        if not is_count(job.frames):
            raise Emu3Error(f"frames is {shown(job.frames)}: it must be a whole number >= 1")
        check_fps(job.fps)
        self.settings = settings_of(job, job.guidance)
        ratio = job.ratio
        if ratio is None:
            ratio = "1:1" if job.picture is None else f"{job.picture.width}:{job.picture.height}"
        area = language.config.image_area if job.area is None else job.area
        self._size = generate_size(one_text("ratio", ratio), area, self._vision.config.spatial_factor)
        self._height, self._width = (side * self._vision.config.spatial_factor for side in self._size)
        most = min(MAX_FRAMES, MOST_BYTES // (self._height * self._width * 3))
        if job.frames > most:
            raise ClipTooLarge(
                f"frames is {shown(job.frames)}: it must be at most {most} for a clip of {self._width}x{self._height} "
                "pixels; ask for fewer frames"
            )
        self._given = np.zeros((0, self._height, self._width, 3), np.uint8)  # the picture, as the first frame
        if job.picture is not None:
            self._given = resize_frames(np.asarray(to_rgb(job.picture))[None], self._height, self._width)
        # Latent frames that the clip has or that rows were begun for, and those that no row was begun for.
        self._there, self._missing = len(self._given), -(-job.frames // self._factor)
        self._latents = latents_of_a_pass(
            language, (job.prompt, job.negative), self._size, factor=self._factor, window=None, missing=self._missing,
            extending=job.picture is not None, allow_special=False,
        )  # fmt: skip
        self._kinds = self._plan()
        self.prompt, self.steps = self.lengths[0]
        self._clip: GrowingClip | None = None
        self._new: list[tuple[int, np.ndarray]] = []  # frames that no event has told, with the index of the first
        self._tokens = self._passes = 0

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """See `Work`."""
        return list(self._kinds.values())

    def _next(self) -> tuple[int, int]:
        """The numbers of old and of new latent frames of the next row."""
        return next_latents(self._latents, self._there, self._missing)

    def _plan(self) -> dict[tuple[int, int], tuple[int, int]]:
        """The lengths of rows of all kinds that the clip needs, given `_next`. Begins with the first row."""
        there, missing = self._there, self._missing
        kinds: dict[tuple[int, int], tuple[int, int]] = {}
        while missing:
            old, new = next_latents(self._latents, there, missing)
            if (old, new) not in kinds:
                row = self._row_of(old, new, np.zeros((old, *self._size), np.int32))
                kinds[old, new] = max(len(row.prompt), len(row.negative or ())), len(row.schedule)
            there, missing = there + new, missing - new
        return kinds

    def _row_of(self, old: int, new: int, context: np.ndarray | None) -> Row:
        grid = Grid(self._job.prompt, self._job.negative, (old + new, *self._size), context if old else None)
        (row,) = grid_rows(self._language, [grid])
        return Row(row.prompt, row.schedule, None if self._job.guidance == 1 else row.negative)

    def row(self) -> Row:
        """See `Work`. The frames that the row continues are encoded."""
        clip = self._clip
        if clip is None:
            special = self._language.config.tokens
            clip = GrowingClip(self._vision, special.visual_start, self._given, self._job.frames, self._shown)
            self._clip = clip
        else:
            clip.collect()
            self.settings = next_seeds(self.settings)
        old, new = self._next()
        context = encode_end(self._vision, clip.frames, old) if old else None
        row = self._row_of(old, new, context)
        clip.begin(context, row.schedule)
        self._there, self._missing = self._there + new, self._missing - new
        self.again = self._missing > 0
        self._tokens += len(row.schedule)
        return row

    def _shown(self, first: int, frames: np.ndarray) -> None:
        self._new.append((first, frames))

    def more(self, ids: np.ndarray, wanted: Callable[[], bool]) -> list[Later]:
        """See `Work`. All frames are decoded, because each is needed."""
        clip = self._started()
        clip.send(ids)
        return [self._frames] if clip.waiting else []

    def _frames(self) -> ClipFrames:
        """The frames that are new. Frames of the job's picture count, so the first new one may have index 1."""
        self._started().collect()
        new, self._new = self._new, []
        return ClipFrames(new[0][0], np.concatenate([frames for _, frames in new]))

    def finish(self, ids: np.ndarray, ended: bool, passes: int) -> list[Later]:
        """See `Work`."""
        clip = self._started()
        clip.send(ids)
        self._passes += passes
        if not self.again:
            return [self._frames, self._finished]
        self.prompt, self.steps = self._kinds[self._next()]
        return [self._frames]

    def _finished(self) -> Finished:
        return Finished(
            clip=self._started().frames, prompt_tokens=self.lengths[0][0], tokens=self._tokens, passes=self._passes
        )

    def _started(self) -> GrowingClip:
        assert self._clip is not None  # `row` comes first
        return self._clip

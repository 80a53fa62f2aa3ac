"""Documents, which are texts and pictures in turn. Each has a session of its own, outside the pools.

Some passes of a document are taken between the passes of the pools, so other jobs go on.
"""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from emu3_jax.generation import interleaving
from emu3_jax.generation.codec import encode_resized
from emu3_jax.generation.documents import Writing, grammar_of, prompts_of, row_of, settings_of_rows, sizes_of
from emu3_jax.generation.interleaving import InterleavedRow, Reading
from emu3_jax.generation.language import Language
from emu3_jax.generation.pieces import Piece, Reader
from emu3_jax.generation.pipeline import Emu3
from emu3_jax.media.images import resize, to_rgb
from emu3_jax.media.sizes import generate_size
from emu3_jax.models.cache import KVCache
from emu3_jax.serving.jobs import AnswerText, DocumentJob, DocumentPicture, Event, Finished
from emu3_jax.serving.pool import Options
from emu3_jax.serving.rows import one_text, settings_of
from emu3_jax.serving.tickets import QueuedTicket


class DocumentWork:
    """A document, checked; see `Emu3.interleave`, whose document it is in float32."""

    lengths: tuple[()] = ()  # it needs no row of a pool

    def __init__(self, model: Emu3, job: DocumentJob):
        self._model, self._language = model, model.language
        self._job = dataclasses.replace(job, pictures=())  # only the resized pixels are kept
        self._language.require_emu3()
        one_text("prompt", job.prompt)
        self._settings = settings_of(job, job.guidance)
        vision, config = model.vision, self._language.config
        factor = vision.config.spatial_factor
        size = None if job.ratio is None else generate_size(one_text("ratio", job.ratio), config.image_area, factor)
        tokens = job.max_new_tokens
        if tokens is None and job.most_pictures is not None:
            tokens = config.max_positions  # those that do not fit are cut off
        self._writing = Writing(
            size=size, guidance=job.guidance, max_new_tokens=tokens, seed=job.seed, batch_size=1,
            text_temperature=job.text_temperature, temperature=job.temperature, top_k=job.top_k, top_p=job.top_p,
        )  # fmt: skip
        self._text, self._visual = settings_of_rows(self._writing, None, 1)
        self._rule = grammar_of(self._language)
        self._pixels = [np.asarray(resize(to_rgb(picture), vision.image, factor)) for picture in job.pictures]
        shapes = [(len(pixels) // factor, pixels.shape[1] // factor) for pixels in self._pixels]
        row = self._row_of([np.zeros(shape, np.int32) for shape in shapes])
        self._prompt_tokens, self._picture_tokens = len(row.prompt), sum(h * w for h, w in shapes)
        self._stream: Iterator[Reading] | None = None
        self._pieces: list[Piece] = []
        self._sent = ""  # what was told of the text that is growing

    def _row_of(self, codes: list[np.ndarray]) -> InterleavedRow:
        prompts = prompts_of(self._language, self._rule, None, self._job.prompt, codes, False)
        positions = self._language.config.max_positions
        return row_of(0, prompts, sizes_of(codes), self._writing, None, positions, self._rule)

    def begin(self, options: Options, passes: int) -> None:
        """Encodes the pictures. The device's thread calls it, and `step` until that says that the document is done.

        Args:
            options: options of the session.
            passes: largest number of passes of a step.
        """
        row = self._row_of([encode_resized(self._model.vision, pixels) for pixels in self._pixels])
        language = self._language
        self._reader = Reader(language, lambda: self._model.vision, self._rule, row, growing=False)
        self._stream = interleaving.stream(
            language.params, language.config, self._rule, [row], self._text, self._visual, mesh=language.mesh,
            narrow_cache=language.narrow_cache, kernels=options.kernels, parallel=options.parallel, call_passes=passes,
        )  # fmt: skip

    def step(self) -> list[Event]:
        """Takes some passes. Returns what is new; the last event of a document is `Finished`."""
        assert self._stream is not None  # `begin` comes first
        reading = next(self._stream)
        events: list[Event] = []
        ids, done, passes = reading.ids[0], bool(reading.done[0]), int(reading.passes[0])
        for item in self._reader.read(ids, done):
            if isinstance(item, str):
                events += self._more_text(item)
            elif isinstance(item, Piece):
                self._pieces.append(item)
                events += self._more_text(item.text) if item.picture is None else self._picture(item, passes)
                self._sent = ""
                if self._pictures() == self._job.most_pictures:
                    done = True
                    break
        if done:
            self._stream = None
            events.append(self._finished(len(ids), passes))
        return events

    def _more_text(self, text: str) -> list[Event]:
        new = text[len(self._sent) :]
        self._sent = text
        return [AnswerText(new)] if new else []

    def _picture(self, piece: Piece, passes: int) -> list[Event]:
        assert piece.picture is not None
        piece.picture.info = self._about(piece.picture, passes)
        return [DocumentPicture(piece.picture, piece.whole)]

    def _about(self, picture: Image.Image, passes: int) -> dict[Any, Any]:
        job = self._job
        about = {"prompt": job.prompt, "seed": job.seed, "guidance": job.guidance, "temperature": job.temperature,
                 "top-k": job.top_k, "top-p": job.top_p, "text-temperature": job.text_temperature,
                 "size": f"{picture.width}x{picture.height}", "model": self._model.name, "passes": passes}  # fmt: skip
        return {name: str(value) for name, value in about.items()}

    def _pictures(self) -> int:
        return sum(piece.picture is not None and piece.whole for piece in self._pieces)

    def _finished(self, tokens: int, passes: int) -> Finished:
        document, most = self._reader.document, self._job.most_pictures
        whole = [piece.picture for piece in self._pieces if piece.picture is not None and piece.whole]
        return Finished(
            picture=whole[0] if most == 1 and whole else None,
            pictures=tuple(whole),
            text="".join(piece.text for piece in self._pieces),
            ended=len(whole) == most or (document is not None and document.ended),
            prompt_tokens=self._prompt_tokens, picture_tokens=self._picture_tokens, tokens=tokens, passes=passes,
        )  # fmt: skip


def document_bytes(language: Language) -> int:
    """The largest number of bytes that the cache of a document takes, with the old one while it grows."""
    slots = interleaving.roomy_slots(language.config.max_positions)
    # With guidance, two rows.
    cache = jax.eval_shape(
        lambda: KVCache.create(language.config, jnp.zeros((2,), jnp.int32), slots, language.narrow_cache)
    )
    return 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


class Lane:
    """Writes one document at a time. All methods belong to the device's thread.

    Attributes:
        owner: the job whose document is being written, or None.
    """

    def __init__(self, options: Options, passes: int):
        self.owner: QueuedTicket | None = None
        self._options, self._passes = options, passes

    def begin(self, ticket: QueuedTicket) -> None:
        """Begins a document. The lane must be free."""
        ticket.work.begin(self._options, self._passes)
        self.owner = ticket

    def step(self) -> tuple[list[Event], float]:
        """Takes some passes of the document. Returns its new events, and the time that they took in seconds."""
        assert self.owner is not None
        began = time.perf_counter()
        events = self.owner.work.step()
        if events and isinstance(events[-1], Finished):
            self.owner = None
        return events, time.perf_counter() - began

    def warm_up(self, model: Emu3, size: tuple[int, int]) -> None:
        """Compiles what the first passes of a document need, and those of an edit of a picture of `size` codes."""
        factor = model.vision.config.spatial_factor
        picture = Image.new("RGB", (size[1] * factor, size[0] * factor))
        for pictures in ((), (picture,)):
            work = DocumentWork(model, DocumentJob(prompt="a", pictures=pictures, most_pictures=1))
            work.begin(self._options, self._passes)
            work.step()

    def forget(self) -> list[QueuedTicket]:
        """Gives up the document. Returns its job, if there is one."""
        owner, self.owner = self.owner, None
        return [] if owner is None else [owner]

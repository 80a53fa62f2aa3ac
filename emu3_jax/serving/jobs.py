"""What the parts of the server tell each other: jobs, what becomes of them, and the interface of the batcher.

The HTTP side knows nothing of arrays of tokens, and the batcher nothing of HTTP. Both know this module.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from PIL import Image

from emu3_jax.errors import Emu3Error
from emu3_jax.generation import defaults


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What all jobs have. Illegal values are refused by `Jobs.submit`.

    Attributes:
        prompt: the prompt, or the question.
        temperature, top_k, top_p: see `generation.rows.Sampling`.
        seed: seed of the row.
        client: who asks. Rows are shared evenly among clients.
    """

    prompt: str
    temperature: float = defaults.TEMPERATURE
    top_k: int = defaults.TOP_K
    top_p: float = defaults.TOP_P
    seed: int = defaults.SEED
    client: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureJob(Job):
    """A picture; see `Emu3.generate` for the fields.

    Attributes:
        partial: whether more of the picture may be told as it is generated, which takes some of the device's time.
    """

    negative: str = ""
    guidance: float = defaults.GUIDANCE
    ratio: str = "1:1"
    area: int | None = None
    partial: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipJob(Job):
    """A clip; see `Emu3.generate_clips` for the fields.

    Attributes:
        ratio: the ratio, or None for that of `picture`, or 1:1.
        picture: the first frame of the clip, which the new ones continue, or None.
        fps: frames per second of the file. It changes no frame.
    """

    negative: str = ""
    guidance: float = defaults.GUIDANCE
    ratio: str | None = None
    area: int | None = None
    frames: int = defaults.FRAMES
    picture: Image.Image | None = None
    fps: float = defaults.FPS


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerJob(Job):
    """An answer to a question about pictures; see `Emu3.chat` for the fields.

    Attributes:
        pictures: the pictures, of any size. Without any, the question is answered as plain text.
        history: earlier turns, (question, answer) each, oldest first. The pictures belong to the first turn.
    """

    pictures: tuple[Image.Image, ...] = ()
    history: tuple[tuple[str, str], ...] = ()
    max_new_tokens: int = defaults.MAX_NEW_TOKENS


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentJob(Job):
    """A text with pictures in it; see `Emu3.interleave` for the fields.

    Attributes:
        pictures: the pictures that are shown with the prompt, of any size.
        ratio: the ratio of all pictures, at the model's area, or None to let the model choose their sizes.
        max_new_tokens: largest number of tokens. None: that of `Emu3.interleave`, or with `most_pictures` all that fit.
        most_pictures: the document ends after so many pictures, or None to let the model end it.
    """

    pictures: tuple[Image.Image, ...] = ()
    guidance: float = defaults.GUIDANCE
    text_temperature: float = defaults.TEMPERATURE
    ratio: str | None = None
    max_new_tokens: int | None = None
    most_pictures: int | None = None


@dataclasses.dataclass(frozen=True)
class Started:
    """The job has left the queue and has a row. `waited` is the time in the queue, in seconds."""

    waited: float


@dataclasses.dataclass(frozen=True)
class PictureRows:
    """More of a picture: its first rows are there.

    Attributes:
        pixels: the rows so far, uint8 [height, width, 3].
        size: (width, height) of the whole picture, in pixels.
    """

    pixels: np.ndarray
    size: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class ClipFrames:
    """New frames of a clip: uint8 [N, height, width, 3], and the index of the first."""

    first: int
    frames: np.ndarray


@dataclasses.dataclass(frozen=True)
class AnswerText:
    """New text of an answer."""

    text: str


@dataclasses.dataclass(frozen=True)
class DocumentPicture:
    """A picture of a document. `whole` is False if the largest number of tokens cut it off."""

    picture: Image.Image
    whole: bool = True


@dataclasses.dataclass(frozen=True)
class Finished:
    """The job is done; nothing follows.

    Attributes:
        picture: the picture, with the metadata of `Emu3.generate` in `info`; None unless the job is a `PictureJob`.
        clip: all frames, uint8 [N, height, width, 3]; None unless the job is a `ClipJob`.
        text: the whole answer, or all texts of a document; None for pictures and clips.
        pictures: the whole pictures of a document. With one at most, it is `picture`, too.
        ended: whether an answer ended by itself. If not, `max_new_tokens` cut it off.
        prompt_tokens: number of tokens of the prompt.
        picture_tokens: number of visual tokens among these; 0 unless the job is a `DocumentJob`.
        tokens: number of tokens made.
        passes: passes of the decoder that the row took part in.
    """

    picture: Image.Image | None = None
    clip: np.ndarray | None = None
    text: str | None = None
    pictures: tuple[Image.Image, ...] = ()
    ended: bool = True
    prompt_tokens: int = 0
    picture_tokens: int = 0
    tokens: int = 0
    passes: int = 0


@dataclasses.dataclass(frozen=True)
class Failed:
    """The server could not do the job, by no fault of the request; nothing follows. `message` is for the client."""

    message: str


Event = Started | PictureRows | ClipFrames | AnswerText | DocumentPicture | Finished | Failed


class Busy(Exception):
    """The queue has no room for this client. `retry_after` is when to try again, in whole seconds."""

    def __init__(self, retry_after: int, reason: str = "the queue is full"):
        super().__init__(f"{reason}: try again in {retry_after} seconds")
        self.retry_after = retry_after


class Closing(Busy):
    """The server shuts down, and takes no more jobs."""

    def __init__(self) -> None:
        super().__init__(5, "the server shuts down")


NO_DOCUMENTS = (
    "this server makes no edits and no answers with pictures: start it with emu3-jax serve --documents and a model "
    "that was trained on documents"
)


class Unsupported(Emu3Error):
    """The server does no jobs of this kind."""


class TooLarge(Emu3Error):
    """The job can never run here, because it needs more tokens or memory than the server has."""


class Ticket(Protocol):
    """A job that was taken."""

    def events(self) -> Iterator[Event]:
        """Yields what becomes of the job, and waits for it. The last event is `Finished` or `Failed`.

        One thread may read, another than those that submit. After `cancel`, the events end without a last one.
        """

    def cancel(self) -> None:
        """Gives up the job. Its row or its place in the queue is free soon. Does nothing after the last event."""


class Jobs(Protocol):
    """Does jobs: several at a time, in one batch. All methods may be called from any thread."""

    def submit(self, job: Job) -> Ticket:
        """Takes a job.

        Raises:
            Emu3Error: a field is illegal. The message is one line for the client.
            TooLarge: the job does not fit, however long it waits.
            Busy: the queue is full, or this client's share of it.
            Closing: the server shuts down.
        """

    def figures(self) -> Mapping[str, Any]:
        """Counters and levels for `/metrics`: names without prefix and unit suffix as Prometheus wants them.

        A mapping has one number for each kind of job. `closing` says whether the server shuts down.
        """

    def close(self, finish: bool) -> None:
        """Takes no more jobs. With `finish`, waits until all are done; otherwise the others fail."""

"""From a job to its work: which class of work does which kind of job."""

from collections.abc import Callable

from emu3_jax.errors import Emu3Error, RowError
from emu3_jax.generation.clips import ClipTooLarge
from emu3_jax.generation.pipeline import Emu3
from emu3_jax.serving.clip_rows import ClipWork
from emu3_jax.serving.jobs import AnswerJob, ClipJob, Job, PictureJob, TooLarge
from emu3_jax.serving.rows import AnswerWork, PictureWork, Work

_KINDS: dict[type, Callable[..., Work]] = {PictureJob: PictureWork, AnswerJob: AnswerWork, ClipJob: ClipWork}


def make_work(model: Emu3, job: Job) -> Work:
    """Checks a job.

    Raises:
        Emu3Error: a field is not legal. The words are those of `Emu3.generate`, `Emu3.generate_clips` and `Emu3.chat`.
        TooLarge: the job does not fit into the model's positions.
    """
    if type(job) not in _KINDS:
        raise Emu3Error(f"jobs of the kind {type(job).__name__} are not served: ask for a picture, a clip or an answer")
    try:
        return _KINDS[type(job)](model, job)
    except RowError as error:
        raise TooLarge(error.reason) from error
    except ClipTooLarge as error:
        raise TooLarge(str(error)) from error

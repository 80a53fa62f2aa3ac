"""From a job to its work: which class of work does which kind of job."""

from collections.abc import Callable

from emu3_jax.errors import RowError
from emu3_jax.generation.clips import ClipTooLarge
from emu3_jax.generation.pipeline import Emu3
from emu3_jax.serving.clip_rows import ClipWork
from emu3_jax.serving.documents import DocumentWork
from emu3_jax.serving.jobs import NO_DOCUMENTS, AnswerJob, ClipJob, DocumentJob, Job, PictureJob, TooLarge, Unsupported
from emu3_jax.serving.rows import AnswerWork, PictureWork, Work

_KINDS: dict[type, Callable[..., Work | DocumentWork]] = {
    PictureJob: PictureWork,
    AnswerJob: AnswerWork,
    ClipJob: ClipWork,
    DocumentJob: DocumentWork,
}


def make_work(model: Emu3, job: Job, documents: bool = False) -> Work | DocumentWork:
    """Checks a job. `documents` says whether the model was trained on documents.

    Raises:
        Unsupported: the server does no such jobs.
        Emu3Error: a field is not legal. The words are those of `Emu3.generate`, `Emu3.generate_clips`, `Emu3.chat` and
            `Emu3.interleave`.
        TooLarge: the job does not fit into the model's positions.
    """
    if type(job) not in _KINDS:
        raise Unsupported(
            f"jobs of the kind {type(job).__name__} are not served: ask for a picture, a clip or an answer"
        )
    if isinstance(job, DocumentJob) and not documents:
        raise Unsupported(NO_DOCUMENTS)
    try:
        return _KINDS[type(job)](model, job)
    except RowError as error:
        raise TooLarge(error.reason) from error
    except ClipTooLarge as error:
        raise TooLarge(str(error)) from error

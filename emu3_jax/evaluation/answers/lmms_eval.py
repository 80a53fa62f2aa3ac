"""The model `emu3_jax` of lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval), written against its release 0.7.3.

lmms-eval finds `manifest` by the entry point `lmms_eval.models` of this package, so that `--model emu3_jax` works
wherever both are installed. Nothing here imports lmms-eval before it asks.
"""

import functools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from emu3_jax.errors import Emu3Error
from emu3_jax.printable import shown

if TYPE_CHECKING:
    from emu3_jax.evaluation.answers.core import Question

CHOICES = ("loss", "log-prob")


def manifest() -> Any:
    """What lmms-eval's registry asks the entry point for: a `ModelManifest`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="emu3_jax", simple_class_path=f"{__name__}.Emu3Jax")


def __getattr__(name: str) -> Any:
    if name == "Emu3Jax":
        return model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def model_class() -> type:
    """The adapter as a subclass of lmms-eval's `lmms`, which the registry demands."""
    from lmms_eval.api.model import lmms

    return type("Emu3Jax", (Adapter, lmms), {"__module__": __name__, "__doc__": Adapter.__doc__, "is_simple": True})


class Adapter:
    """A "simple" model of lmms-eval: its tasks give a text, and pictures apart from it.

    The arguments of `__init__` are what `--model_args` takes, such as `pretrained=out/emu3-chat,quantize=int8`.
    """

    task_dict: dict[str, Any]

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        vision: str | None = None,
        adapter: str | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
        mesh: str | None = None,
        clips_as: str = "auto",
        frames: int | None = None,
        fps: float | None = None,
        seed: int = 0,
        parallel: int | str = "auto",
        choices: str = "loss",
        batch_size: int | str = 1,
        **others: Any,
    ) -> None:
        """Loads the model.

        Args:
            pretrained: directory of a bundle, or None for the embedded model.
            vision, adapter, dtype, quantize, mesh: see `emu3_jax.load`.
            clips_as, frames, fps: how clips are shown, see `Emu3.chat`.
            seed: seed of the first sampled answer; each next one adds 1.
            parallel: number of tokens of a pass, see `Emu3.chat`.
            choices: what `loglikelihood` returns for the choices of a task of type `multiple_choice`: "loss", the
                negative log-probability, or "log-prob". lmms-eval 0.7.3 takes the choice with the smallest value.
            batch_size: number of rows to compute at once; lmms-eval's `--batch_size`.
            **others: `device` and `max_batch_size`, which lmms-eval always gives, have no effect.

        Raises:
            Emu3Error: an argument is unknown or not legal, the bundle cannot be loaded, or lmms-eval runs in several
                processes.
        """
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise Emu3Error(
                "lmms-eval runs in several processes, and each would take all devices: start one, without accelerate "
                "and torchrun; mesh=tensor=N spreads the model over N devices"
            )
        if unknown := sorted(others.keys() - {"device", "max_batch_size"}):
            raise Emu3Error(f"model_args has {shown(unknown[0])}, which emu3_jax does not know: leave it out")
        if choices not in CHOICES:
            raise Emu3Error(f"choices is {shown(choices)}: it must be one of {', '.join(CHOICES)}")

        from emu3_jax.evaluation.answers.core import Answerer, whole_number
        from emu3_jax.generation.conversation import Showing
        from emu3_jax.loading import load

        self._choices = choices
        self._answerer = Answerer(
            load(pretrained, vision=vision, adapter=adapter, dtype=dtype, quantize=quantize, mesh=mesh),
            batch_size=whole_number("batch_size", batch_size), showing=Showing(clips_as, frames, fps), seed=seed,
            parallel=parallel,
        )  # fmt: skip

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers. Requests whose generation arguments are the same share batches.

        Args:
            requests: `Instance`s. `args` of each is (question, generation arguments, function that gives the pictures
                of a document, number of the document, task, split).

        Raises:
            Emu3Error: a question or an argument is not legal. The line begins with the task and the document.
        """
        from emu3_jax.evaluation.answers.core import AnswerSettings

        groups: dict[AnswerSettings, list[int]] = {}
        questions: list[Question] = []
        for index, request in enumerate(requests):
            text, given, *where = request.args
            questions.append(self._question(text, *where))
            groups.setdefault(AnswerSettings.of(given), []).append(index)
        found: dict[int, str] = {}
        for settings, indices in groups.items():
            texts = self._answerer.answers([questions[index] for index in indices], settings)
            found.update(zip(indices, texts, strict=True))
        return [found[index] for index in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """How likely each question is answered with the given text.

        Args:
            requests: `Instance`s. `args` of each is (question, continuation, function that gives the pictures of a
                document, number of the document, task, split), or only (text, continuation). The continuation is a
                function of the document in tasks of type `loglikelihood`, and a text in those of `multiple_choice`.

        Returns:
            For each request, the sum of the log-probabilities of the continuation's tokens in nats (or its negative,
            see `choices`), and whether a greedy answer begins with the continuation.

        Raises:
            Emu3Error: as for `generate_until`.
        """
        questions: list[Question] = []
        continuations: list[str] = []
        signs = []
        previous = None
        for request in requests:
            text, target, *where = request.args
            if (text, *where) != previous:  # choices of one question share its pictures
                previous, question = (text, *where), self._question(text, *where)
            questions.append(question)
            continuations.append(str(target(self._document(*where[1:]))) if callable(target) else target)
            signs.append(1 if callable(target) or self._choices == "log-prob" else -1)
        found = self._answerer.log_probs(questions, continuations)
        pair = _pair_class()
        return [pair((sign * one.log_prob, one.greedy)) for sign, one in zip(signs, found, strict=True)]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not available: raises `Emu3Error`."""
        raise Emu3Error("tasks of several rounds (generate_until_multi_round) are not available: choose other tasks")

    def _document(self, number: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][number]

    def _question(self, text: str, *where: Any) -> "Question":
        """A question with its pictures. `where` is empty, or (function of the document, number, task, split)."""
        from emu3_jax.evaluation.answers.core import Question

        if not where:
            return Question(text)
        pictures, *place = where
        number, task, split = place
        name = f"task {task}, {split}, document {number}"
        if not callable(pictures):
            return Question(text, name=name)
        return Question(text, lambda: _flat(pictures(self._document(*place))), name)


@functools.cache
def _pair_class() -> Any:
    """A class of pairs that reach the task as pairs.

    lmms-eval 0.7.2 and 0.7.3 turn the result of every request into a text, even those of `loglikelihood`, and then fail
    on it. They exempt their own `GenerationResult`, whose `text` they hand on: here it is the pair.
    """
    try:
        from lmms_eval.api.instance import GenerationResult
    except ImportError:  # older releases
        return tuple
    return type("Pair", (tuple, GenerationResult), {})


def _flat(value: Any) -> list[Any]:
    """Pictures of a document, which a task may give as None, one, a list, or a list of lists."""
    if isinstance(value, list | tuple):
        return [one for part in value for one in _flat(part)]
    return [] if value is None else [value]

"""A model for VLMEvalKit (github.com/open-compass/VLMEvalKit), and a command that runs its script with it.

    python -m emu3_jax.evaluation.answers.vlmevalkit [--model BUNDLE] run.py --data MME

VLMEvalKit is not on PyPI and has no entry points: its models are the entries of a dictionary. The command adds ours
under the name `emu3-jax`, and runs the script with `--model emu3-jax`. Start it in VLMEvalKit's directory.
"""

import argparse
import functools
import json
import pathlib
import runpy
import sys
from collections.abc import Sequence
from typing import Any

from emu3_jax.errors import Emu3Error
from emu3_jax.printable import printable, shown

NAME = "emu3-jax"


@functools.cache
def model_class() -> type:
    """The adapter as a subclass of VLMEvalKit's `BaseModel`."""
    from vlmeval.vlm.base import BaseModel

    return type("Emu3Jax", (Adapter, BaseModel), {"__module__": __name__, "__doc__": Adapter.__doc__})


class Adapter:
    """A model of VLMEvalKit. Prompts are those of the data sets: `use_custom_prompt` stays false.

    Attributes:
        INTERLEAVE: the model reads all pictures of a message. Its template shows them in order before the text, which
            is the message's texts on lines of their own.
        VIDEO_LLM: the model reads clips as files.
    """

    INTERLEAVE = True
    VIDEO_LLM = True

    def __init__(
        self,
        model: str | None = None,
        *,
        clips_as: str = "auto",
        frames: int | None = None,
        fps: float | None = None,
        seed: int = 0,
        parallel: int | str = "auto",
        generation: dict[str, Any] | None = None,
        **loading: Any,
    ) -> None:
        """Loads the model.

        Args:
            model: directory of a bundle, or None for the embedded model.
            clips_as, frames, fps: how clips are shown, see `Emu3.chat`.
            seed: seed of answers. Greedy answers do not depend on it.
            parallel: number of tokens of a pass, see `Emu3.chat`.
            generation: arguments such as `max_new_tokens`, `temperature`, `top_p` and `until`. By default answers are
                greedy and have at most 1024 tokens.
            **loading: `vision`, `adapter`, `dtype`, `quantize` and `mesh`, see `emu3_jax.load`.

        Raises:
            Emu3Error: an argument is unknown or not legal, or the bundle cannot be loaded.
        """
        super().__init__()
        if unknown := sorted(loading.keys() - {"vision", "adapter", "dtype", "quantize", "mesh"}):
            raise Emu3Error(f"the model's arguments have {shown(unknown[0])}, which it does not know: leave it out")

        from emu3_jax.evaluation.answers.core import Answerer, AnswerSettings
        from emu3_jax.generation.conversation import Showing
        from emu3_jax.loading import load

        self._settings = AnswerSettings.of(generation or {})
        self._answerer = Answerer(
            load(model, **loading), batch_size=1, showing=Showing(clips_as, frames, fps), seed=seed, parallel=parallel,
            progress=False,
        )  # fmt: skip

    def generate_inner(self, message: Sequence[dict[str, str]], dataset: str | None = None) -> str:
        """Answers a message. VLMEvalKit asks one question at a time.

        Args:
            message: entries with `type` "text", "image" or "video", and `value`, a text or a path.
            dataset: name of the data set, for error lines.

        Returns:
            The answer.

        Raises:
            Emu3Error: the message has no text or another type, a file is no picture or clip, or the message does not
                fit into the model's positions.
        """
        from emu3_jax.evaluation.answers.core import Question

        name = "a question" if dataset is None else f"data set {dataset}"
        texts = [item["value"] for item in message if item["type"] == "text"]
        media = [item["value"] for item in message if item["type"] in ("image", "video")]
        if len(texts) + len(media) != len(message):
            found = next(item["type"] for item in message if item["type"] not in ("text", "image", "video"))
            raise Emu3Error(f"{printable(name)}: a message has {shown(found)}: it must be text, image or video")
        if not texts:
            raise Emu3Error(f"{printable(name)}: a message has no text: ask a question")
        question = Question("\n".join(texts), lambda: media, name)
        return self._answerer.answers([question], self._settings)[0]


def register(name: str = NAME, **arguments: Any) -> None:
    """Adds the model to VLMEvalKit's models.

    Args:
        name: name of the model there.
        **arguments: those of `Adapter.__init__`. The model is loaded when VLMEvalKit needs it.

    Raises:
        Emu3Error: VLMEvalKit cannot be imported.
    """
    try:
        from vlmeval.config import supported_VLM
    except ImportError as error:
        raise Emu3Error(
            f"VLMEvalKit cannot be imported ({error}): install it into this environment (pip install -e VLMEvalKit)"
        ) from error
    supported_VLM[name] = functools.partial(model_class(), **arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs VLMEvalKit's script with the model. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m emu3_jax.evaluation.answers.vlmevalkit", allow_abbrev=False,
        description="Runs VLMEvalKit's script with a bundle as the model emu3-jax.",
    )  # fmt: skip
    parser.add_argument("--model", metavar="BUNDLE", help="directory of a bundle (default: the embedded model)")
    parser.add_argument(
        "--model-args", default="{}", metavar="JSON", help='further arguments, such as \'{"quantize": "int8"}\''
    )
    parser.add_argument("script", metavar="RUN.PY", help="VLMEvalKit's run.py")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its arguments, without --model")
    options = parser.parse_args(arguments)
    try:
        _run(options)
    except Emu3Error as error:
        print(f"emu3-jax: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> None:
    script = pathlib.Path(options.script)
    if not script.is_file():
        raise Emu3Error(f"{printable(str(script))} is no file: give run.py of VLMEvalKit's repository")
    try:
        given = json.loads(options.model_args)
    except ValueError as error:
        raise Emu3Error(f"--model-args is no JSON ({error}): give an object such as {{}}") from error
    if not isinstance(given, dict) or "model" in given:
        raise Emu3Error(f"--model-args is {shown(given)}: give a JSON object, and the bundle as --model")
    sys.path.insert(0, str(script.resolve().parent))  # as Python does for a script
    register(model=options.model, **given)
    before, sys.argv = sys.argv, [str(script), "--model", NAME, *options.rest]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = before


if __name__ == "__main__":
    sys.exit(main())

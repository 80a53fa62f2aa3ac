"""Example commands for what a run has trained: its last lines print them."""

import contextlib
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from emu3_jax.data.config import Source
from emu3_jax.data.pairs import Pair
from emu3_jax.data.sequences import ImageToText, Interleaved, NextFrame, TextOnly, TextToImage
from emu3_jax.errors import Emu3Error
from emu3_jax.printable import printable
from emu3_jax.training.config import SampleConfig

_LONGEST = 100  # longest prompt, in characters, that a line shows


def example_prompt(text: str) -> str:
    """A prompt for a command line, quoted for a shell; "PROMPT" if it is long."""
    short = 0 < len(text) <= _LONGEST and text.isprintable() and not text.startswith("-")
    return shlex.quote(text) if short else "PROMPT"


def example_command(
    sources: Sequence[Source], samples: SampleConfig | None, first: Callable[[Source], Any], options: str
) -> str | None:
    """The command that suits the task of the first source with pictures or clips, or None for texts alone.

    Args:
        sources: the sources of the run.
        samples: its sample pictures, whose first prompt is the example's.
        first: reads the first record or pair of a source.
        options: options of the command that name the model.
    """
    source = next((source for source in sources if not isinstance(source.task, TextOnly)), sources[0])
    record = None
    with contextlib.suppress(Emu3Error):  # the run is over: a damaged record must not make it fail now
        record = first(source)
    task: Any = source.task
    if isinstance(record, Pair):
        task = {1: ImageToText(question=record.prompt), 2: TextToImage(), 3: NextFrame()}[record.chosen.ndim]
    if isinstance(task, ImageToText):
        return f"emu3-jax chat PICTURE --prompt {shlex.quote(printable(task.question))} {options}"
    prompt = example_prompt(samples.prompts[0] if samples else _text(record))
    match task:
        case NextFrame():
            return f"emu3-jax video {prompt} {options} -o out/clips"
        case TextToImage():
            return f"emu3-jax generate {prompt} {options} -o out/pictures"
        case Interleaved():
            return f"emu3-jax interleave {prompt} {options} -o out/documents"
    return None


def _text(record: Any) -> str:
    """The caption or prompt of a record or pair; nothing of None."""
    if record is None:
        return ""
    if isinstance(record, Pair):
        return record.prompt
    return next((part.text for part in record.document if part.text), record.text)

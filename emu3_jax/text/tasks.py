"""Tasks of Emu3.5: the prompt of each, and the settings that the reference's configs give it.

A prompt is BOS, "You are a helpful assistant for ... task. USER: ... ASSISTANT: " and BSS ("answer begins"). Given
pictures stand after the question, in `x2i` before it. For guidance, the unconditional prompt has the pictures but
neither the question nor the task's name; the empty prompt has no pictures either.

The reference has single turns only. Ours repeat the prompt from USER on, after the answer and its EOS.
"""

import dataclasses
from collections.abc import Sequence

from emu3_jax.text.tokenizer import Tokenizer

ANSWER_BEGINS, ANSWER_ENDS = "<|extra_100|>", "<|extra_101|>"
# The tokens around plans that a model writes before its answer, and before a picture.
PLANS = {"global": ("<|extra_60|>", "<|extra_61|>"), "picture": ("<|extra_50|>", "<|extra_51|>")}
_UNCONDITIONAL = "You are a helpful assistant. USER: "
_END = " ASSISTANT: "


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of Emu3.5.

    Attributes:
        name: as in the prompt.
        more: words after the task's name.
        pictures_first: whether given pictures stand before the question.
        guidance: guidance scale of visual tokens.
        area: area of given pictures in pixels.
        steps: largest number of new tokens.
        text_temperature: temperature of text.
        text_top_k: number of likeliest text tokens to sample from.
        text_top_p: total probability of the likeliest text tokens to sample from.
        top_k: number of likeliest visual tokens to sample from.
    """

    name: str
    more: str = ""
    pictures_first: bool = False
    guidance: float = 3.0
    area: int = 720 * 720
    steps: int = 32768
    text_temperature: float = 1.0
    text_top_k: int = 1024
    text_top_p: float = 0.9
    top_k: int = 10240


TASKS = {
    task.name: task
    for task in (
        Task("t2i", guidance=5.0, area=1024 * 1024, steps=5120, top_k=5120),
        Task("x2i", pictures_first=True, area=1024 * 1024, steps=5120, top_k=5120),
        Task("story"),
        Task(
            "howto", " Please generate a response with interleaved text and images.", text_temperature=0.7,
            text_top_k=200, text_top_p=0.8,
        ),
        Task("explore"),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The ids of a task's prompts: conditional, without the question, and without the question and the pictures."""

    conditional: list[int]
    unconditional: list[int]
    empty: list[int]


def task_prompts(
    tokenizer: Tokenizer,
    task: Task,
    question: str,
    pictures: Sequence[int] = (),
    *,
    allow_special: bool = False,
    later: bool = False,
) -> Prompts:
    """Makes the prompts of a task.

    Args:
        tokenizer: the model's tokenizer.
        task: the task.
        question: the user's text.
        pictures: ids of all given pictures, each from BOI to EOI.
        allow_special: whether control tokens in the question take effect.
        later: whether to make the prompts of a later turn, without BOS and what stands before USER.

    Raises:
        SpecialTokenError: the question contains a special token and `allow_special` is false.
    """
    begins = tokenizer.special_ids[ANSWER_BEGINS]
    head = f"You are a helpful assistant for {task.name} task.{task.more} USER: "
    head, unconditional = (text[text.index("USER") if later else 0 :] for text in (head, _UNCONDITIONAL))
    bos = [] if later else [tokenizer.special.bos]
    before, after = (head, question + _END) if task.pictures_first else (head + question, _END)

    def whole(before: str, pictures: Sequence[int], after: str) -> list[int]:
        # Text is encoded in one piece where no picture interrupts it, because byte pairs merge.
        parts = [before, after] if pictures else [before + after]
        first, *rest = (tokenizer.encode(part, allow_special=allow_special) for part in parts)
        return [*bos, *first, *pictures, *(rest[0] if rest else []), begins]

    return Prompts(
        conditional=whole(before, pictures, after),
        unconditional=whole(unconditional, pictures, _END),
        empty=whole(unconditional, (), _END),
    )

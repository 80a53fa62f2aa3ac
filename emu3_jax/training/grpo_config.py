"""The config of GRPO: what a run draws, how it rewards that, and which loss it minimises."""

import dataclasses
import re

from emu3_jax.data.config import check_path
from emu3_jax.fields import check_field, is_number, is_whole
from emu3_jax.generation import defaults
from emu3_jax.generation.parallel import check_window
from emu3_jax.media.sizes import check_generated_area, check_ratio
from emu3_jax.media.videos import MAX_FRAMES

LEVELS = ("token", "sequence")
AVERAGES = ("sequence", "token", "length")
_MOST_TOKENS = 1 << 20  # of an answer
_MOST_PATTERN = 1000  # characters
_LEAST_FRAMES = 3  # of a clip whose motion the reward "procedural" reads, see `preference.shipped_rewards`


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
    """Group relative policy optimisation (arXiv 2402.03300). See `training.grpo` for the formulas.

    In each step the model draws `n` pictures for each of some prompts, a reward judges them, and the model learns from
    the differences within each prompt's group. With `frames`, it draws clips instead; with `max_new_tokens`, answers to
    questions. What is said below of pictures holds for clips, too.

    Attributes:
        prompts: file of prompts, one a line. Each epoch takes them in another order. Questions may also come from a
            manifest FILE.jsonl, with pictures and reference answers, see `preference.questions`.
        reward: FILE.py:NAME, or a shipped reward: "procedural" or "judge" for pictures; "answer_length",
            "answer_format" or "answer_match" for answers. See `preference.rewards`.
        n: number of pictures or answers per prompt.
        frames: number of frames of a clip, which is drawn in one pass; None for pictures. The reward "procedural"
            needs three or more.
        max_new_tokens: largest number of tokens of an answer; None for pictures. Answers are drawn from the whole
            vocabulary. The token that ends an answer counts as drawn.
        guidance: guidance scale that pictures are drawn with. 1 means no guidance.
        guided_policy: where `guidance` is not 1, whether the policy that is trained includes guidance. If so, a picture
            takes two rows of the batch: with the prompt and without. If not, the model without guidance is trained on
            pictures that were drawn with it.
        temperature: temperature that pictures or answers are drawn with, and of the policy that is trained.
        ratio: width:height of the pictures. The reward "procedural" needs square ones.
        area: area of a drawn picture in pixels, or None for the area that the model was trained for. For answers: area
            that the questions' pictures are resized to, or None to leave them as they are.
        draw_at_once: most pictures or answers that are drawn at the same time, or None for all of a step.
        gather_weights: whether a copy of the weights is gathered over the mesh axes `fsdp` and `sequence` once a step,
            before drawing. Only `tensor` splits the copy, so it needs more memory. Without it, each drawn token gathers
            the weights.
        parallel: "auto", "off", or the number of tokens of a pass per row. See `generation.language.Batching`.
        iterations: number of updates on the same pictures or answers. From the second one on, the clip range matters.
        level: "token" (GRPO) or "sequence" (GSPO): what has a ratio of its own.
        normalise: whether advantages are divided by the spread of their group's rewards.
        average: "sequence" (GRPO), "token" (DAPO) or "length" (Dr. GRPO). See `grpo.token_weights`. For answers,
            "length" divides by `max_new_tokens`.
        clip_low: ratios below 1 - clip_low have no gradient where the advantage is negative.
        clip_high: ratios above 1 + clip_high have no gradient where the advantage is positive.
        kl_weight: weight of the KL divergence to the reference in the loss.
        reference: whether the KL divergence to the model before training is measured. With adapters, the reference is
            the model without them. Otherwise a second copy of the weights in `model.dtype` lies in memory.
        held_out: file of prompts for evaluations, or an empty string for none. An evaluation draws one picture or
            answer for each prompt, always with the same seeds.
        workers: number of processes that compute rewards, on each host.
        timeout: seconds that a call of the reward may take.
        pictures_per_call: most pictures or answers of a call of the reward. A group is never split.
        judge_data: directory of evaluation data, which the reward "judge" needs.
        answer_words: number of words up to which the reward "answer_length" is 1. It needs this.
        answer_pattern: regular expression of Python, which the reward "answer_format" needs.
    """

    prompts: str
    reward: str
    n: int = 8
    frames: int | None = None
    max_new_tokens: int | None = None
    guidance: float = 1.0
    guided_policy: bool = True
    temperature: float = 1.0
    ratio: str = "1:1"
    area: int | None = None
    draw_at_once: int | None = None
    gather_weights: bool = False
    parallel: int | str = defaults.PARALLEL
    iterations: int = 1
    level: str = "token"
    normalise: bool = True
    average: str = "sequence"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_weight: float = 0.0
    reference: bool = True
    held_out: str = ""
    workers: int = 1
    timeout: float = 60.0
    pictures_per_call: int = 256
    judge_data: str = ""
    answer_words: int | None = None
    answer_pattern: str = ""

    def __post_init__(self) -> None:
        for field in ("prompts", "held_out", "judge_data"):
            check_path(self, field, "a local path")
        check_field(self, "prompts", bool(self.prompts), "a file of prompts, one a line")
        ok = isinstance(self.reward, str) and bool(self.reward)
        check_field(self, "reward", ok, "FILE.py:NAME, or a shipped reward")
        check_field(self, "n", is_whole(self.n, 2), "a whole number >= 2: a group is compared with its own mean")
        for field, most in {"iterations": 1000, "workers": 256, "pictures_per_call": 2**20}.items():
            ok = is_whole(getattr(self, field), 1) and getattr(self, field) <= most
            check_field(self, field, ok, f"a whole number from 1 to {most}")
        most = defaults.MOST_ROWS
        ok = self.draw_at_once is None or (is_whole(self.draw_at_once, 1) and self.draw_at_once <= most)
        check_field(self, "draw_at_once", ok, f"a whole number from 1 to {most}, or None")
        check_field(self, "guidance", is_number(self.guidance) and 0 <= self.guidance <= 1e9, "a number from 0 to 1e9")
        ok = is_number(self.temperature) and 1e-9 <= self.temperature <= 1e9
        check_field(self, "temperature", ok, "a number from 1e-9 to 1e9: greedy drawing gives no spread")
        for field in ("guided_policy", "gather_weights", "normalise", "reference"):
            check_field(self, field, isinstance(getattr(self, field), bool), "True or False")
        check_field(self, "ratio", isinstance(self.ratio, str), "width:height, such as 16:9")
        check_field(self, "area", self.area is None or is_whole(self.area, 1), "a whole number >= 1, or None")
        check_ratio(self.ratio)
        if self.area is not None:  # the least one depends on the vision tokenizer
            check_generated_area(self.area, "grpo.area")
        self._check_frames()
        check_window(self.parallel)
        check_field(self, "level", self.level in LEVELS, " or ".join(LEVELS))
        check_field(self, "average", self.average in AVERAGES, " or ".join(AVERAGES))
        check_field(self, "clip_low", is_number(self.clip_low) and 0 <= self.clip_low <= 1, "a number from 0 to 1")
        for field in ("clip_high", "kl_weight"):
            check_field(self, field, is_number(getattr(self, field)) and getattr(self, field) >= 0, "a number >= 0")
        check_field(self, "reference", self.reference or not self.kl_weight, "True where kl_weight is above 0")
        ok = is_number(self.timeout) and 0 < self.timeout <= 1_000_000
        check_field(self, "timeout", ok, "above 0 and at most 1,000,000 seconds")
        ok = self.reward != "judge" or bool(self.judge_data)
        check_field(self, "judge_data", ok, "a directory of evaluation data where the reward is judge")
        self._check_answers()

    @property
    def rows(self) -> int:
        """Number of rows that a picture or answer takes in a batch."""
        return 2 if self.guidance != 1 and self.guided_policy else 1

    def at_once(self, count: int) -> int:
        """How many of `count` pictures or answers are drawn at the same time."""
        return min(self.draw_at_once or defaults.MOST_ROWS, count)

    @property
    def noun(self) -> str:
        """What the model draws, as a word."""
        if self.frames is not None:
            return "clip"
        return "picture" if self.max_new_tokens is None else "answer"

    def _check_frames(self) -> None:
        frames = self.frames
        ok = frames is None or (is_whole(frames, 1) and frames <= MAX_FRAMES)
        check_field(self, "frames", ok, f"a whole number from 1 to {MAX_FRAMES}, or None for pictures")
        ok = frames is None or self.max_new_tokens is None
        check_field(self, "frames", ok, "None where max_new_tokens is set: answers have no frames")
        ok = frames is None or self.reward != "judge"
        check_field(self, "frames", ok, "None where the reward is judge, which knows pictures only")
        ok = frames is None or self.reward != "procedural" or frames >= _LEAST_FRAMES
        legal = f"{_LEAST_FRAMES} or more where the reward is procedural, which reads motion, or None for pictures"
        check_field(self, "frames", ok, legal)

    def _check_answers(self) -> None:
        most = self.max_new_tokens
        ok = most is None or (is_whole(most, 1) and most <= _MOST_TOKENS)
        check_field(self, "max_new_tokens", ok, f"a whole number from 1 to {_MOST_TOKENS}, or None for pictures")
        ok = most is None or self.guidance == 1
        check_field(self, "guidance", ok, "1 where max_new_tokens is set: answers are drawn without guidance")
        words = self.answer_words
        ok = words is None or (is_whole(words, 1) and words <= _MOST_TOKENS)
        check_field(self, "answer_words", ok, f"a whole number from 1 to {_MOST_TOKENS}, or None")
        ok = self.reward != "answer_length" or words is not None
        check_field(self, "answer_words", ok, "a number of words where the reward is answer_length")
        pattern = self.answer_pattern
        ok = isinstance(pattern, str) and len(pattern) <= _MOST_PATTERN
        check_field(self, "answer_pattern", ok, f"a regular expression of at most {_MOST_PATTERN} characters")
        ok = self.reward != "answer_format" or bool(pattern)
        check_field(self, "answer_pattern", ok, "a regular expression where the reward is answer_format")
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            check_field(self, "answer_pattern", False, f"a regular expression of Python ({reason})")

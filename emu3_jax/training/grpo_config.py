"""The config of GRPO: which pictures a run draws, how it rewards them, and which loss it minimises."""

import dataclasses

from emu3_jax.data.config import check_path
from emu3_jax.fields import check_field, is_number, is_whole
from emu3_jax.generation import defaults
from emu3_jax.generation.parallel import check_window
from emu3_jax.media.sizes import generate_size

LEVELS = ("token", "sequence")
AVERAGES = ("sequence", "token", "length")


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
    """Group relative policy optimisation (arXiv 2402.03300). See `training.grpo` for the formulas.

    In each step the model draws `n` pictures for each of some prompts, a reward judges them, and the model learns from
    the differences within each prompt's group.

    Attributes:
        prompts: file of prompts, one a line. Each epoch takes them in another order.
        reward: FILE.py:NAME, "procedural" or "judge". See `preference.rewards`.
        n: number of pictures per prompt.
        guidance: guidance scale that pictures are drawn with. 1 means no guidance.
        guided_policy: where `guidance` is not 1, whether the policy that is trained includes guidance. If so, a picture
            takes two rows of the batch: with the prompt and without. If not, the model without guidance is trained on
            pictures that were drawn with it.
        temperature: temperature that pictures are drawn with, and of the policy that is trained.
        ratio: width:height of the pictures.
        area: area of a picture in pixels, or None for the area that the model was trained for.
        draw_at_once: most pictures that are drawn at the same time, or None for all of a step.
        parallel: "auto", "off", or the number of tokens of a pass per row. See `generation.language.Batching`.
        iterations: number of updates on the same pictures. From the second one on, the clip range matters.
        level: "token" (GRPO) or "sequence" (GSPO): what has a ratio of its own.
        normalise: whether advantages are divided by the spread of their group's rewards.
        average: "sequence" (GRPO), "token" (DAPO) or "length" (Dr. GRPO). See `grpo.token_weights`.
        clip_low: ratios below 1 - clip_low have no gradient where the advantage is negative.
        clip_high: ratios above 1 + clip_high have no gradient where the advantage is positive.
        kl_weight: weight of the KL divergence to the reference in the loss.
        reference: whether the KL divergence to the model before training is measured. With adapters, the reference is
            the model without them. Otherwise a second copy of the weights in `model.dtype` lies in memory.
        held_out: file of prompts for evaluations, or an empty string for none. An evaluation draws one picture for each
            prompt, always with the same seeds.
        workers: number of processes that compute rewards, on each host.
        timeout: seconds that a call of the reward may take.
        pictures_per_call: most pictures of a call of the reward. A group is never split.
        judge_data: directory of evaluation data, which the reward "judge" needs.
    """

    prompts: str
    reward: str
    n: int = 8
    guidance: float = 1.0
    guided_policy: bool = True
    temperature: float = 1.0
    ratio: str = "1:1"
    area: int | None = None
    draw_at_once: int | None = None
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

    def __post_init__(self) -> None:
        for field in ("prompts", "held_out", "judge_data"):
            check_path(self, field, "a local path")
        check_field(self, "prompts", bool(self.prompts), "a file of prompts, one a line")
        ok = isinstance(self.reward, str) and bool(self.reward)
        check_field(self, "reward", ok, "FILE.py:NAME, procedural or judge")
        check_field(self, "n", is_whole(self.n, 2), "a whole number >= 2: a group is compared with its own mean")
        for field, most in {"iterations": 1000, "workers": 256, "pictures_per_call": 2**20}.items():
            ok = is_whole(getattr(self, field), 1) and getattr(self, field) <= most
            check_field(self, field, ok, f"a whole number from 1 to {most}")
        ok = self.draw_at_once is None or (is_whole(self.draw_at_once, 1) and self.draw_at_once <= 4096)
        check_field(self, "draw_at_once", ok, "a whole number from 1 to 4096, or None")
        check_field(self, "guidance", is_number(self.guidance) and 0 <= self.guidance <= 1e9, "a number from 0 to 1e9")
        ok = is_number(self.temperature) and 1e-9 <= self.temperature <= 1e9
        check_field(self, "temperature", ok, "a number from 1e-9 to 1e9: greedy drawing gives no spread")
        for field in ("guided_policy", "normalise", "reference"):
            check_field(self, field, isinstance(getattr(self, field), bool), "True or False")
        check_field(self, "ratio", isinstance(self.ratio, str), "width:height, such as 16:9")
        check_field(self, "area", self.area is None or is_whole(self.area, 1), "a whole number >= 1, or None")
        generate_size(self.ratio, 512 * 512 if self.area is None else self.area)  # a wrong ratio must fail now
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

    @property
    def rows(self) -> int:
        """Number of rows that a picture takes in a batch."""
        return 2 if self.guidance != 1 and self.guided_policy else 1

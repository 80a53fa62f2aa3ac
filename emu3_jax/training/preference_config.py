"""The config of preference tuning: which loss of pairs, with which constants."""

import dataclasses

from emu3_jax.fields import check_field, is_number

LOSSES = ("dpo", "ipo", "simpo")
REFERENCES = ("stored", "adapters_off")


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """The loss of a run that trains on preference pairs. See `training.preference` for the formulas.

    Attributes:
        loss: "dpo" (arXiv 2305.18290), "ipo" (arXiv 2310.12036) or "simpo" (arXiv 2405.14734).
        beta: scale of the reward, in "ipo" the strength of the regularisation (the paper's tau). A larger beta keeps
            the model nearer to the reference.
        label_smoothing: assumed share of pairs whose sides are the wrong way round, of "dpo" and "simpo" only.
        gamma: the margin that "simpo" asks for, in units of its reward.
        cross_entropy: weight of the chosen side's next-token cross-entropy in the loss. It keeps the chosen samples
            probable, which "dpo" alone does not. Emu3 trained with DPO and cross-entropy (arXiv 2409.18869, 2.5), but
            its paper gives no weight.
        reference: where the reference model's log-probabilities come from. "stored": they are computed for all pairs
            before the first step and kept in the run's directory. "adapters_off": each step computes them by the same
            model without its adapters; this needs `adapter`, and takes one more forward pass a step. "simpo" has no
            reference and ignores this field.
    """

    loss: str = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 0.5
    cross_entropy: float = 0.0
    reference: str = "stored"

    def __post_init__(self) -> None:
        check_field(self, "loss", self.loss in LOSSES, " or ".join(LOSSES))
        check_field(self, "beta", is_number(self.beta) and self.beta > 0, "a number > 0")
        ok = is_number(self.label_smoothing) and 0 <= self.label_smoothing < 0.5
        check_field(self, "label_smoothing", ok, "a share from 0 to below 0.5")
        ok = not self.label_smoothing or self.loss != "ipo"
        check_field(self, "label_smoothing", ok, "0 where loss is ipo")
        for field in ("gamma", "cross_entropy"):
            check_field(self, field, is_number(getattr(self, field)) and getattr(self, field) >= 0, "a number >= 0")
        check_field(self, "reference", self.reference in REFERENCES, " or ".join(REFERENCES))

    @property
    def compares(self) -> bool:
        """Whether the loss compares the model with a reference."""
        return self.loss != "simpo"

"""Computes TRL's preference and GRPO losses on small random numbers, for tests/golden/preference.json.

    python -m venv out/trl && out/trl/bin/pip install torch trl==1.16.0
    out/trl/bin/python scripts/make_preference_golden.py

The trainers' own loss methods run on log-probabilities that are given instead of computed by a model. TRL is not in the
test extra: it brings datasets, pandas and pyarrow, and its internals that this script calls change between versions.
"""

import json
import pathlib
import types

import numpy as np
import torch
import trl
from trl.experimental.cpo import CPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer, nanstd

FILE = pathlib.Path(__file__).parents[1] / "tests/golden/preference.json"
PAIRS, TOKENS = 4, 7


class Accelerator:
    """What the loss methods use of accelerate, on one device."""

    device = torch.device("cpu")
    num_processes = 1
    sync_gradients = True

    def gather(self, x):
        return x

    gather_for_metrics = gather

    def reduce(self, x, reduction):
        return x


def trainer(cls, **fields):
    """A stand-in for a trainer: its class's methods, without its constructor, which wants a model and data."""
    made = object.__new__(cls)
    metrics = {"train": Metrics(), "eval": Metrics()}
    state = {"accelerator": Accelerator(), "model": types.SimpleNamespace(training=False), "_metrics": metrics}
    made.__dict__.update({**state, "aux_loss_enabled": False, **fields})
    return made


class Metrics(dict):
    """Lists by name."""

    def __missing__(self, name):
        self[name] = []
        return self[name]


def drawn(seed: int):
    """Log-probabilities of tokens: policy, reference (of the old policy for GRPO too), and which are targets."""
    rng = np.random.default_rng(seed)
    policy = -rng.exponential(2.0, (2 * PAIRS, TOKENS)).astype(np.float32)
    reference = (policy + rng.normal(0, 0.3, policy.shape)).astype(np.float32)
    old = (policy + rng.normal(0, 0.2, policy.shape)).astype(np.float32)
    lengths = rng.integers(3, TOKENS + 1, 2 * PAIRS)
    mask = np.arange(TOKENS)[None] < lengths[:, None]
    return policy, reference, old, mask


def dpo(policy, reference, mask, *, loss_types, loss_weights, beta, label_smoothing=0.0):
    """Rows: first all chosen ones, then all rejected ones, as TRL has them."""
    logps = torch.tensor(policy, requires_grad=True)
    masked = torch.tensor(mask)
    made = trainer(
        DPOTrainer, loss_types=loss_types, loss_weights=loss_weights, beta=beta, label_smoothing=label_smoothing,
        ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", use_weighting=False,
        _total_train_tokens=0,
    )  # fmt: skip
    sums = torch.tensor(np.where(mask, reference, 0).sum(1))
    zeros = torch.zeros_like(logps)

    def model(**_):
        return types.SimpleNamespace(
            log_probs=logps * masked, entropy=zeros, mean_logits=zeros, is_top1=torch.zeros_like(masked)
        )

    # One token before the completion, because the first token of a row is never predicted.
    whole = torch.nn.functional.pad(masked, (1, 0)).long()
    inputs = {
        "input_ids": torch.zeros_like(whole), "attention_mask": torch.ones_like(whole), "completion_mask": whole,
        "ref_chosen_logps": sums[:PAIRS], "ref_rejected_logps": sums[PAIRS:],
    }  # fmt: skip
    loss = made._compute_loss(model, inputs, False)
    loss.backward()
    figures = {name: values[-1] for name, values in made._metrics["eval"].items() if name.startswith(("rew", "logps"))}
    return {"loss": loss.item(), "gradient": logps.grad.tolist(), "figures": figures}


def cpo(policy, reference, mask, *, loss_type, beta, label_smoothing, gamma=0.0, average=False, weight=0.0):
    """CPO's loss: SimPO on averages; conservative DPO when it gets log-ratios, since it subtracts no reference."""
    logps = torch.tensor(policy, requires_grad=True)
    masked = torch.tensor(mask)
    sums = (logps * masked).sum(1)
    if average:
        sums = sums / masked.sum(1)
    if reference is not None:
        sums = sums - torch.tensor(np.where(mask, reference, 0).sum(1))
    made = trainer(
        CPOTrainer, loss_type=loss_type, beta=beta, label_smoothing=label_smoothing, simpo_gamma=gamma, alpha=0.0
    )
    losses, *_ = made.cpo_loss(sums[:PAIRS], sums[PAIRS:])
    nll = -(logps[:PAIRS][masked[:PAIRS]]).mean()  # the mean over tokens, as cross-entropy takes it
    loss = losses.mean() + weight * nll
    loss.backward()
    return {"loss": loss.item(), "gradient": logps.grad.tolist()}


def grpo(policy, reference, old, mask, advantages, *, loss_type, level, beta, low, high):
    logps = torch.tensor(policy, requires_grad=True)
    masked = torch.tensor(mask).long()
    entropies = torch.tensor(np.abs(reference))
    made = trainer(
        GRPOTrainer, loss_type=loss_type, importance_sampling_level=level, beta=beta, epsilon_low=low,
        epsilon_high=high, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        max_completion_length=TOKENS, _entropy_bonus_enabled=False, current_gradient_accumulation_steps=1,
        args=types.SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, entropies, None),
    )  # fmt: skip
    inputs = {
        "prompt_ids": masked[:, :1], "prompt_mask": masked[:, :1], "completion_ids": masked, "completion_mask": masked,
        "advantages": torch.tensor(advantages), "old_per_token_logps": torch.tensor(old),
        "ref_per_token_logps": torch.tensor(reference), "num_items_in_batch": masked.sum(),
    }  # fmt: skip
    loss = made._compute_loss(None, inputs)
    loss.backward()
    figures = {name: values[-1] for name, values in made._metrics["eval"].items()}
    return {"loss": loss.item(), "gradient": logps.grad.tolist(), "figures": figures}


def preference_cases():
    for seed, beta in ((0, 0.1), (1, 2.0)):
        policy, reference, _, mask = drawn(seed)
        inputs = {"policy": policy.tolist(), "reference": reference.tolist(), "mask": mask.tolist()}
        for weight in (0.0, 0.3):
            types_, weights = ["sigmoid", "sft"][: 1 + bool(weight)], [1.0, weight][: 1 + bool(weight)]
            found = dpo(policy, reference, mask, loss_types=types_, loss_weights=weights, beta=beta)
            yield {"loss": "dpo", "beta": beta, "cross_entropy": weight}, inputs, found
            types_ = ["ipo", *types_[1:]]
            found = dpo(policy, reference, mask, loss_types=types_, loss_weights=weights, beta=beta)
            yield {"loss": "ipo", "beta": beta, "cross_entropy": weight}, inputs, found
        found = cpo(policy, reference, mask, loss_type="sigmoid", beta=beta, label_smoothing=0.2)
        yield {"loss": "dpo", "beta": beta, "label_smoothing": 0.2}, inputs, found
        for smoothing in (0.0, 0.1):
            found = cpo(
                policy, None, mask, loss_type="simpo", beta=beta, label_smoothing=smoothing, gamma=0.5, average=True,
                weight=0.3,
            )  # fmt: skip
            fields = {"loss": "simpo", "beta": beta, "gamma": 0.5, "label_smoothing": smoothing, "cross_entropy": 0.3}
            yield fields, inputs, found


def grpo_cases():
    for seed, (level, kind) in enumerate(
        [("token", "grpo"), ("token", "bnpo"), ("token", "dr_grpo"), ("sequence", "grpo"), ("sequence", "bnpo")]
    ):
        policy, reference, old, mask = drawn(10 + seed)
        advantages = np.random.default_rng(seed).normal(0, 1, 2 * PAIRS).astype(np.float32)
        for beta in (0.0, 0.04):
            settings = {"level": level, "beta": beta, "low": 0.1, "high": 0.15}
            found = grpo(policy, reference, old, mask, advantages, loss_type=kind, **settings)
            inputs = {"policy": policy, "reference": reference, "old": old, "mask": mask, "advantages": advantages}
            yield {"kind": kind, **settings}, {name: x.tolist() for name, x in inputs.items()}, found


def advantages():
    """Rewards of groups, and their advantages by TRL's standard deviation and constant."""
    rewards = np.random.default_rng(3).normal(0, 1, (4, 5)).astype(np.float32)
    rewards[1] = 0.1
    x = torch.tensor(rewards)
    found = (x - x.mean(dim=1, keepdim=True)) / (nanstd(x, dim=1)[:, None] + 1e-4)
    return {"rewards": rewards.tolist(), "expected": found.tolist()}


def main() -> None:
    cases = {
        name: [{"config": config, **inputs, "expected": found} for config, inputs, found in made()]
        for name, made in (("preference", preference_cases), ("grpo", grpo_cases))
    }
    FILE.write_text(
        json.dumps({"trl": trl.__version__, "torch": torch.__version__, "advantages": advantages(), **cases}) + "\n"
    )
    print(f"{FILE}: {len(cases['preference'])} + {len(cases['grpo'])} cases")


if __name__ == "__main__":
    main()

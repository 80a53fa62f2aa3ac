"""Losses of pairs and of GRPO: equal to TRL's on the same numbers, gradients included."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN

from emu3_jax import Emu3Error
from emu3_jax.training import grpo
from emu3_jax.training.preference import pair_losses, pair_sums
from emu3_jax.training.preference_config import PreferenceConfig

TRL = json.loads((GOLDEN / "preference.json").read_text())
SHORT = [{"dpo": "DPO", "ipo": "IPO", "simpo": "SimPO"}[case["config"]["loss"]] for case in TRL["preference"]]


def arrays(case, *names):
    return [np.asarray(case[name], bool if name == "mask" else np.float32) for name in names]


def pairs(rows):
    """[P, 2] from TRL's order of rows: all chosen ones, then all rejected ones."""
    return rows.reshape(2, -1).T


def preference_loss(log_probs, reference, mask, config):
    """The loss of training, and the sums it is made of."""
    sums = pair_sums(
        config,
        pairs(jnp.where(mask, log_probs, 0).sum(axis=1)),
        pairs(mask.sum(axis=1)),
        pairs(np.where(mask, reference, 0).sum(axis=1)) if config.compares else None,
    )
    return sums.loss / sums.pairs - config.cross_entropy * sums.chosen / sums.chosen_tokens, sums


@pytest.mark.parametrize("case", TRL["preference"], ids=SHORT)
def test_losses_of_pairs_are_those_of_trl(case):
    policy, reference, mask = arrays(case, "policy", "reference", "mask")
    config = PreferenceConfig(**case["config"])
    (loss, sums), gradient = jax.value_and_grad(preference_loss, has_aux=True)(policy, reference, mask, config)
    wanted = case["expected"]
    np.testing.assert_allclose(loss, wanted["loss"], rtol=1e-6)
    np.testing.assert_allclose(gradient, wanted["gradient"], rtol=2e-6, atol=1e-7)
    margin = sums.chosen_reward - sums.rejected_reward
    found = {
        "rewards/chosen": sums.chosen_reward,
        "rewards/rejected": sums.rejected_reward,
        "rewards/accuracies": sums.right,
        "rewards/margins": margin,
        "logps/chosen": sums.chosen,
        "logps/rejected": sums.rejected,
    }
    for name, value in wanted.get("figures", {}).items():
        np.testing.assert_allclose(found[name] / sums.pairs, value, rtol=2e-6, atol=2e-7, err_msg=name)


def test_empty_pairs_count_nothing():
    log_probs, reference = np.float32([[-1, -2], [0, 0], [-3, -1]]), np.float32([[-2, -1], [7, 7], [-3, -3]])
    config, counts = PreferenceConfig(cross_entropy=1.0), np.array([[2, 3], [0, 0], [4, 1]])
    whole = pair_sums(config, log_probs, counts, reference)
    kept = pair_sums(config, log_probs[::2], counts[::2], reference[::2])
    jax.tree.map(np.testing.assert_array_equal, whole, kept)
    assert whole.pairs == 2 and whole.chosen_tokens == 6 and whole.right == 1


def test_a_loss_without_its_reference_is_refused():
    with pytest.raises(ValueError, match="ipo needs the reference"):
        pair_losses(PreferenceConfig("ipo"), jnp.zeros((1, 2)), jnp.ones((1, 2)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": "ppo"}, "loss is 'ppo': it must be dpo or ipo or simpo"),
        ({"beta": 0}, "beta is 0"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5: it must be a share from 0 to below 0.5"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing is 0.1: it must be 0 where loss is ipo"),
        ({"cross_entropy": -1.0}, "cross_entropy is -1.0"),
        ({"reference": "copy"}, "reference is 'copy': it must be stored or adapters_off"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(Emu3Error, match=message):
        PreferenceConfig(**fields)


# ------------------------------------------------------------------------------------------------ GRPO

HOW = {"grpo": "sequence", "bnpo": "token", "dr_grpo": "length"}


@pytest.mark.parametrize("case", TRL["grpo"], ids=lambda case: "-".join(map(str, case["config"].values())))
def test_grpo_is_that_of_trl(case):
    policy, reference, old, mask, advantages = arrays(case, "policy", "reference", "old", "mask", "advantages")
    config, wanted = case["config"], case["expected"]

    def loss(log_probs):
        made = grpo.token_losses(
            log_probs, old, mask, advantages, level=config["level"], clip_low=config["low"], clip_high=config["high"],
            reference_bt=reference if config["beta"] else None, kl_weight=config["beta"],
        )  # fmt: skip
        average = HOW[config["kind"]]
        total = grpo.masked_sum(made.loss * grpo.token_weights(mask, average), mask)
        return total / grpo.divisor(mask, average, mask.shape[1]), made

    (found, made), gradient = jax.value_and_grad(loss, has_aux=True)(policy)
    np.testing.assert_allclose(found, wanted["loss"], rtol=2e-6)
    np.testing.assert_allclose(gradient, wanted["gradient"], rtol=5e-6, atol=1e-7)
    figures = wanted["figures"]
    if config["beta"]:
        np.testing.assert_allclose(grpo.masked_sum(made.kl, mask) / mask.sum(), figures["kl"], rtol=1e-5)
    if config["level"] == "token":
        for side, clipped in (("low", made.low), ("high", made.high)):
            share = grpo.masked_sum(clipped, mask) / mask.sum()
            np.testing.assert_allclose(share, figures[f"clip_ratio/{side}_mean"], rtol=1e-6)
    else:
        np.testing.assert_allclose(made.low[:, 0].mean(), figures["clip_ratio/low_mean"])
        np.testing.assert_allclose(made.high[:, 0].mean(), figures["clip_ratio/high_mean"])


def test_advantages_of_groups():
    rewards = np.float32(TRL["advantages"]["rewards"])
    expected = np.float32(TRL["advantages"]["expected"])
    found = grpo.advantages(rewards)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)
    assert not found[1].any(), "a group without spread teaches nothing"
    mean_only = grpo.advantages(rewards, normalise=False)
    np.testing.assert_allclose(mean_only, rewards - rewards.mean(axis=1, keepdims=True), atol=1e-6)
    assert not grpo.advantages(np.float32([[3.0]])).any()


def test_the_kl_estimate_is_never_negative_and_right_on_average():
    rng = np.random.default_rng(0)
    policy, reference = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
    each = grpo.kl_estimate(jnp.log(policy)[None], jnp.log(reference)[None])[0]
    assert (each >= 0).all()
    np.testing.assert_allclose((policy * each).sum(), (policy * np.log(policy / reference)).sum(), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"), [({"level": "word"}, "level is 'word'"), ({"kl_weight": 0.1}, "kl_weight needs")]
)
def test_bad_arguments_of_grpo(options, message):
    one = jnp.ones((1, 1))
    with pytest.raises(ValueError, match=message):
        grpo.token_losses(one, one, one > 0, one[0], **options)

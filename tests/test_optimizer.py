"""AdamW and its schedule: as torch's and transformers'."""

import numpy as np
import pytest
import torch
import transformers

from emu3_jax.training.config import OptimizerConfig
from emu3_jax.training.optimizer import learning_rate, make_optimizer

pytestmark = pytest.mark.oracle


def test_the_schedule_is_transformers():
    config, steps = OptimizerConfig(warmup_steps=30), 200
    ours = learning_rate(config, steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    theirs = transformers.get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, 30, steps, min_lr=config.final_learning_rate
    )
    for step in range(steps):
        np.testing.assert_allclose(ours(step), theirs.get_last_lr()[0], rtol=1e-5, atol=1e-12)
        optimizer.step()
        theirs.step()


def test_the_optimizer_is_torchs():
    """Clipping, moments and decay over some steps; the norms' scales do not decay."""
    config = OptimizerConfig(learning_rate=1e-2, final_learning_rate=1e-2, warmup_steps=0, clip_norm=0.5)
    ours = make_optimizer(config, 100)
    rng = np.random.default_rng(0)
    params = {"kernel": rng.standard_normal((4, 3)), "scale": rng.standard_normal(3)}
    params = {name: value.astype(np.float32) for name, value in params.items()}
    peers = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in params.items()}
    groups = [{"params": [peers["kernel"]], "weight_decay": 0.1}, {"params": [peers["scale"]], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-6)
    state = ours.init(params)
    for _ in range(5):
        gradients = {name: rng.standard_normal(value.shape).astype(np.float32) for name, value in params.items()}
        updates, state = ours.update(gradients, state, params)
        params = {name: params[name] + updates[name] for name in params}
        for name, peer in peers.items():
            peer.grad = torch.from_numpy(gradients[name].copy())
        torch.nn.utils.clip_grad_norm_(list(peers.values()), 0.5)
        theirs.step()
    for name, peer in peers.items():
        np.testing.assert_allclose(params[name], peer.detach().numpy(), rtol=1e-5, atol=1e-6)

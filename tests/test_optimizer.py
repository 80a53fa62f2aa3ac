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


# The matrices of a layer as `models.decoder` has them, and the axes of their results. K=2 KV heads, G=3, H=4, D=8, F=6.
MATRICES = {"qkv": ((8, 2, 5, 4), 3), "out": ((2, 3, 4, 8), 1), "down": ((6, 8), 1)}


@pytest.mark.parametrize("name", MATRICES)
def test_muon_is_torchs(name):
    """Of one matrix, with decay. torch computes in bfloat16, and mixes the first gradients differently from optax."""
    rng, (shape, outputs) = np.random.default_rng(0), MATRICES[name]
    config = OptimizerConfig(algorithm="muon", learning_rate=1e-2, final_learning_rate=1e-2, warmup_steps=0)
    optimizer = make_optimizer(config, 100)
    value = rng.standard_normal(shape).astype(np.float32)
    flat = (-1, int(np.prod(shape[len(shape) - outputs :])))
    peer = torch.nn.Parameter(torch.from_numpy(value.reshape(flat).copy()))
    theirs = torch.optim.Muon([peer], lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    params = {"layers": {name: value}}
    state = optimizer.init(params)
    gradient = {"layers": {name: rng.standard_normal(shape).astype(np.float32)}}
    updates, _ = optimizer.update(gradient, state, params)
    peer.grad = torch.from_numpy(gradient["layers"][name].reshape(flat).copy())
    theirs.step()
    moved = peer.detach().numpy() - value.reshape(flat)
    np.testing.assert_allclose(updates["layers"][name].reshape(flat), moved, rtol=0.05, atol=0.02 * np.abs(moved).max())


def test_muon_updates_each_matrix_alone_and_adamw_the_rest():
    """Layers are stacked, and `gate_up` holds two matrices. Without decay, all updates have the size of AdamW's."""
    shapes = {"qkv": (2, 8, 2, 5, 4), "out": (2, 2, 3, 4, 8), "gate_up": (2, 8, 2, 6), "down": (2, 6, 8)}
    rng = np.random.default_rng(0)

    def draw():
        layers = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        layers["scale"] = rng.standard_normal((2, 8)).astype(np.float32)
        return {"layers": layers, "embed": {"embedding": rng.standard_normal((5, 8)).astype(np.float32)}}

    params, gradients = draw(), draw()
    options = {"weight_decay": 0.0, "learning_rate": 1.0, "final_learning_rate": 1.0, "warmup_steps": 0}
    found = {}
    for algorithm in ("muon", "adamw"):
        optimizer = make_optimizer(OptimizerConfig(algorithm=algorithm, **options), 100)
        found[algorithm], _ = optimizer.update(gradients, optimizer.init(params), params)
    for path in (("layers", "scale"), ("embed", "embedding")):
        muon, adamw = (found[name][path[0]][path[1]] for name in ("muon", "adamw"))
        np.testing.assert_array_equal(muon, adamw)
    for name in shapes:
        update = np.asarray(found["muon"]["layers"][name])
        # One matrix for each layer, and for gate and up.
        matrices = np.moveaxis(update, -2, 1).reshape(4, 8, 6) if name == "gate_up" else update
        matrices = matrices.reshape(len(matrices), -1, {"qkv": 40, "out": 8, "gate_up": 6, "down": 8}[name])
        for matrix in matrices:
            values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * np.sqrt(max(matrix.shape)))
            assert values.min() > 0.6 and values.max() < 1.3  # five iterations bring them near 1
        assert np.sqrt((update**2).mean()) < 0.27

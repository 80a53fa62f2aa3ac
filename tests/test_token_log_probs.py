"""Log-probabilities and entropies in chunks: value and gradients as the plain ones, also over meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from loss_cases import case

from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.rules import spec, use_mesh
from emu3_jax.training.log_probs import sequence_log_probs, token_log_probs

PULL = np.random.default_rng(1).standard_normal((4, 24)).astype(np.float32)  # a weight of its own for each token


def plain(hidden, head, labels):
    log_p = jax.nn.log_softmax(jnp.einsum("bsd,vd->bsv", hidden, head, precision="highest"))
    picked = jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
    return (picked * PULL).sum(), (picked, -(jnp.exp(log_p) * log_p).sum(axis=-1))


def ours(hidden, head, labels, chunk=10):
    log_p, entropy = token_log_probs(hidden, head, labels, chunk=chunk)
    return (log_p * PULL).sum() + 7 * entropy.sum(), (log_p, entropy)  # no gradient flows to the entropy


def check(found, wanted):
    ((_, found), gradients), ((_, expected), wanted) = found, wanted
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=2e-6)
    for one, other in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def wanted():
    return jax.value_and_grad(plain, (0, 1), has_aux=True)(*case()[:3])


@pytest.mark.parametrize("chunk", [10, 512])
def test_values_and_gradients_equal_the_plain_ones(wanted, chunk):
    check(jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True), static_argnums=3)(*case()[:3], chunk), wanted)


@pytest.mark.parametrize("sizes", ["tensor=4", "data=2,fsdp=2,tensor=2", "fsdp=2,sequence=2,tensor=2"])
def test_values_and_gradients_over_a_mesh(wanted, sizes):
    mesh = make_mesh(sizes)
    hidden, head, labels, _ = case()
    hidden = jax.device_put(hidden, NamedSharding(mesh, spec("batch", "sequence", "width")))
    head = jax.device_put(head, NamedSharding(mesh, spec("vocab", "table_width")))
    with use_mesh(mesh):
        found = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(hidden, head, labels)
    check(found, wanted)
    for gradient, argument in zip(found[1], (hidden, head), strict=True):
        assert gradient.sharding.is_equivalent_to(argument.sharding, gradient.ndim)


def test_sums_of_sequences():
    log_probs, mask = np.float32([[-1, -2, -4], [-8, -16, -32]]), np.array([[True, False, True], [False] * 3])
    sums, counts = sequence_log_probs(log_probs, mask)
    assert sums.tolist() == [-5, 0] and counts.tolist() == [2, 0]


def test_guided_hidden_states_give_guided_logits():
    """What GRPO relies on, with the head's rows of the visual ids only."""
    with_text, head, _, _ = case()
    without, scale, labels = with_text[::-1], 2.5, np.random.default_rng(2).integers(0, 17, (4, 24))
    found, _ = token_log_probs(without + scale * (with_text - without), head[20:], labels)
    logits = [jnp.einsum("bsd,vd->bsv", x, head[20:], precision="highest") for x in (with_text, without)]
    log_p = jax.nn.log_softmax(logits[1] + scale * (logits[0] - logits[1]))
    np.testing.assert_allclose(found, jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0], atol=2e-5)

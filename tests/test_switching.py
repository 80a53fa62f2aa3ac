"""`models.switching`: a switch whose branches return no more for the backward pass than they alone know."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conditionals import conditionals

from emu3_jax.models.switching import switch

SHAPE = (3, 4)


@jax.custom_vjp
def kernel(q, k, n):
    """A function that keeps its operands, its result and a row of statistics, as attention kernels do."""
    return jnp.sin(q) * k * n


def kernel_forward(q, k, n):
    out = kernel(q, k, n)
    return out, (q, k, n, out, jnp.sum(q, axis=-1))


def kernel_backward(kept, cotangent):
    q, k, n, out, _ = kept
    return jnp.cos(q) * k * n * cotangent, out / k * cotangent, None


kernel.defvjp(kernel_forward, kernel_backward)

BRANCHES = (kernel, lambda q, k, n: q + k * n, jax.checkpoint(lambda q, k, n: jnp.exp(q * k)))
PLAIN = (lambda q, k, n: jnp.sin(q) * k * n, *BRANCHES[1:])


def arrays():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.uniform(0.5, 1.5, SHAPE), jnp.float32) for _ in range(2)], jnp.float32(2)


def loss(branches, index, operands, n):
    return jnp.sum(switch(index, branches, operands, (n,), name="kept") ** 2)


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("remat", [False, True])
def test_gradients_are_those_of_the_branch_that_is_taken(index, remat):
    operands, n = arrays()

    def of_switch(operands):
        return loss(BRANCHES, jnp.int32(index), operands, n)

    if remat:
        of_switch = jax.checkpoint(of_switch, policy=jax.checkpoint_policies.save_only_these_names("kept"))
    found = jax.jit(jax.value_and_grad(of_switch))(operands)
    wanted = jax.value_and_grad(lambda operands: jnp.sum(PLAIN[index](*operands, n) ** 2))(operands)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_without_gradients_it_is_the_switch():
    operands, n = arrays()
    for index, branch in enumerate(PLAIN):
        out = jax.jit(lambda index: switch(index, BRANCHES, operands, (n,), name="kept"))(index)
        np.testing.assert_allclose(out, branch(*operands, n), rtol=1e-6)


def test_branches_return_their_result_and_what_they_alone_know():
    operands, n = arrays()
    policy = jax.checkpoint_policies.save_only_these_names("kept")
    rematted = jax.checkpoint(lambda operands: loss(BRANCHES, jnp.int32(0), operands, n), policy=policy)
    forward, backward = conditionals(jax.make_jaxpr(jax.grad(rematted))(operands).jaxpr)
    assert forward == [SHAPE, SHAPE[:1]]  # nothing of the operands, and the backward pass does not run it again
    assert backward == [SHAPE, SHAPE]

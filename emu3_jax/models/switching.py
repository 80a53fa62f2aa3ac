"""`lax.switch` that keeps little for the backward pass."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

Branch = Callable[..., jax.Array]


def switch(
    index: jax.Array,
    branches: Sequence[Branch],
    operands: Sequence[jax.Array],
    rest: Sequence[jax.Array] = (),
    *,
    name: str,
) -> jax.Array:
    """`lax.switch(index, branches, *operands, *rest)`, with gradients for `operands` alone.

    JAX differentiates `lax.switch` into branches that return everything that some branch keeps for the backward pass.
    So each copies its operands, and fills with zeros what only another branch keeps. With rematerialisation, the
    backward pass then runs such a switch once more to collect it. Here the branches return the result and what they
    alone know.

    Args:
        index: int32 scalar, the branch to take.
        branches: functions of all operands that return one array, all of the same shape and dtype.
        operands: arrays that gradients flow to.
        rest: further arrays, without gradients.
        name: checkpoint name of the result, and of what the branch keeps beside it and its operands.

    Returns:
        What the branch returns.
    """
    return _switch((tuple(branches), name), index, tuple(operands), tuple(rest))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Kept:
    """How to rebuild a branch's backward pass.

    Attributes:
        structure: its tree structure, as a tree of arrays.
        places: for each of its arrays, the index among operands, rest and result, or None for an array of its own.
    """

    structure: Any
    places: tuple[int | None, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _switch(how: Any, index: jax.Array, operands: tuple[jax.Array, ...], rest: tuple[jax.Array, ...]) -> jax.Array:
    return lax.switch(index, how[0], *operands, *rest)


def _forward(
    how: Any, index: jax.Array, operands: tuple[jax.Array, ...], rest: tuple[jax.Array, ...]
) -> tuple[jax.Array, Any]:
    branches, name = how
    kept: dict[int, _Kept] = {}

    def run(branch: int, *arrays: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """The result of a branch and the arrays of its own; notes how to rebuild its backward pass."""
        others = arrays[len(operands) :]
        out, backward = jax.vjp(lambda *operands: branches[branch](*operands, *others), *arrays[: len(operands)])
        leaves, structure = jax.tree.flatten(backward)
        known = (*arrays, out)
        places = tuple(next((i for i, x in enumerate(known) if x is leaf), None) for leaf in leaves)
        kept[branch] = _Kept(structure, places)
        return out, [leaf for leaf, place in zip(leaves, places, strict=True) if place is None]

    numbers = range(len(branches))
    own = [jax.eval_shape(functools.partial(run, branch), *operands, *rest)[1] for branch in numbers]

    def taken(branch: int, *arrays: jax.Array) -> tuple[jax.Array, list[list[jax.Array]]]:
        found: list[list[jax.Array]] = [[jnp.zeros(x.shape, x.dtype) for x in other] for other in own]
        out, found[branch] = run(branch, *arrays)
        return out, found

    result = lax.switch(index, [functools.partial(taken, branch) for branch in numbers], *operands, *rest)
    out, found = jax.tree.map(lambda x: checkpoint_name(x, name), result)
    return out, (index, operands, rest, out, found, [kept[branch] for branch in numbers])


def _backward(how: Any, residuals: Any, cotangent: jax.Array) -> Any:
    index, operands, rest, out, found, kept = residuals
    known = (*operands, *rest, out)

    def run(branch: int, cotangent: jax.Array) -> tuple[jax.Array, ...]:
        own = iter(found[branch])
        leaves = [next(own) if place is None else known[place] for place in kept[branch].places]
        return jax.tree.unflatten(kept[branch].structure, leaves)(cotangent)

    slopes = lax.switch(index, [functools.partial(run, branch) for branch in range(len(kept))], cotangent)
    return None, slopes, None


_switch.defvjp(_forward, _backward)

"""Random weights for benchmarks."""

import jax
import jax.numpy as jnp


def normal(key: jax.Array, shape: tuple[int, ...], deviation: float, dtype: jnp.dtype) -> jax.Array:
    """Normal random numbers of mean 0 and standard deviation `deviation`, made in float32 and then rounded to `dtype`.

    `jax.random.normal` in bfloat16 has a mean of -0.012 standard deviations. This bias is the same in all matrices. It
    grows with width and depth, until it dominates a decoder's logits.
    """
    return (jax.random.normal(key, shape) * deviation).astype(dtype)

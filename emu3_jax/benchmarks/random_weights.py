"""Random weights of the benchmarks."""

import jax
import jax.numpy as jnp


def normal(key: jax.Array, shape: tuple[int, ...], deviation: float, dtype: jnp.dtype) -> jax.Array:
    """Normal numbers of mean 0, made in float32 and then rounded.

    Of bfloat16's coarse uniform numbers JAX makes normal ones whose mean is -0.012 deviations: one direction common to
    all matrices, which grows with width and depth until a decoder's logits hang on it.
    """
    return (jax.random.normal(key, shape) * deviation).astype(dtype)

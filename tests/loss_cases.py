"""What losses and log-probabilities are computed of."""

import jax.numpy as jnp
import numpy as np


def case(dtype="float32"):
    """hidden [4, 24, 16], head [37, 16], labels, mask."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((4, 24, 16)), dtype)
    head = jnp.asarray(rng.standard_normal((37, 16)), jnp.float32)
    return hidden, head, rng.integers(0, 37, (4, 24)).astype(np.int32), rng.random((4, 24)) < 0.7

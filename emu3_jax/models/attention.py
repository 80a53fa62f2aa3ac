"""Attention of the decoder, chosen in one place.

B batch, S queries, T keys, K KV heads, G query heads per KV head, H head width.
"""

import jax
import jax.numpy as jnp
from jax import lax

# Queries scored at once: bounds the score matrix of a long prompt to [B, K, G, block, T].
QUERY_BLOCK = 512

# Below every real score, and finite, so that a row without any key (padding) gives no NaN.
MASKED = -1e30


def attend(q_bskgh: jax.Array, k_bkth: jax.Array, v_bkth: jax.Array, first_query: jax.Array, start: jax.Array):
    """Causal attention of queries in consecutive slots over all keys; softmax in float32.

    Args:
        q_bskgh: [B, S, K, G, H] queries, RoPE applied, not yet scaled.
        k_bkth: [B, K, T, H] keys; slot t is visible to the query in slot s when start[b] <= t <= s.
        v_bkth: [B, K, T, H] values.
        first_query: int32 scalar, the slot of query 0.
        start: int32 [B], each row's first slot.

    Returns:
        [B, S, K, G, H] in the queries' dtype.
    """
    queries = q_bskgh.shape[1]
    if queries <= QUERY_BLOCK:
        return _attend_block(q_bskgh, k_bkth, v_bkth, first_query, start)
    blocks = -(-queries // QUERY_BLOCK)
    padded = jnp.pad(q_bskgh, ((0, 0), (0, blocks * QUERY_BLOCK - queries), (0, 0), (0, 0), (0, 0)))
    split = jnp.moveaxis(padded.reshape(q_bskgh.shape[0], blocks, QUERY_BLOCK, *q_bskgh.shape[2:]), 1, 0)
    offsets = first_query + QUERY_BLOCK * jnp.arange(blocks, dtype=jnp.int32)
    out = lax.map(lambda block: _attend_block(block[0], k_bkth, v_bkth, block[1], start), (split, offsets))
    return jnp.moveaxis(out, 0, 1).reshape(padded.shape)[:, :queries]


def _attend_block(q_bskgh, k_bkth, v_bkth, first_query, start):
    dtype = q_bskgh.dtype
    precision = matmul_precision(dtype)
    scores = jnp.einsum("bskgh,bkth->bkgst", q_bskgh, k_bkth, precision=precision, preferred_element_type=jnp.float32)
    query = first_query + jnp.arange(q_bskgh.shape[1], dtype=jnp.int32)[:, None]
    key = jnp.arange(k_bkth.shape[2], dtype=jnp.int32)[None]
    visible = (key <= query) & (key >= start[:, None, None])  # [B, S, T]
    scores = jnp.where(visible[:, None, None], scores * q_bskgh.shape[-1] ** -0.5, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(dtype)
    return jnp.einsum("bkgst,bkth->bskgh", weights, v_bkth, precision=precision, preferred_element_type=dtype)


def matmul_precision(dtype) -> lax.Precision | None:
    """float32 means float32: no TF32 or bfloat16 passes. Narrow dtypes take the backend's default."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None

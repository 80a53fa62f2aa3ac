"""Attention of the decoder, chosen in one place.

B batch, S queries, T keys, K KV heads, G query heads per KV head, H head width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

# Queries scored at once: bounds the score matrix of a long prompt to [B, K, G, block, T].
QUERY_BLOCK = 512

# Below every real score, and finite, so that a row without any key (padding) gives no NaN.
MASKED = -1e30


def self_attention(
    q_bskgh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, segments_bs: jax.Array | None, implementation: str
) -> jax.Array:
    """Causal attention of whole sequences to themselves, within segments: for training, and any pass without a cache.

    On a mesh each device computes its rows and heads. Where the mesh splits sequences, a device has its part of the
    queries and gathers the keys and values of the whole row.

    Args:
        q_bskgh: [B, S, K, G, H] queries, RoPE applied, not yet scaled.
        k_bskh: [B, S, K, H] keys.
        v_bskh: [B, S, K, H] values.
        segments_bs: int32 [B, S]; tokens see only those of their own segment. None: a row is one segment.
        implementation: "xla", or "auto" for the best one here.

    Returns:
        [B, S, K, G, H] in the queries' dtype.
    """
    mesh = jax.sharding.get_abstract_mesh()
    spec = nn.logical_to_mesh_axes(("batch", "sequence", "kv_heads"))
    if mesh.empty or not _divides(mesh, spec, k_bskh.shape):
        return _xla(q_bskgh, k_bskh, v_bskh, segments_bs, segments_bs, 0)
    rows, sequence, _ = spec

    def local(q, k, v, segments):
        if mesh.shape[sequence] == 1:
            return _xla(q, k, v, segments, segments, 0)
        k, v, k_segments = jax.tree.map(lambda x: lax.all_gather(x, sequence, axis=1, tiled=True), (k, v, segments))
        return _xla(q, k, v, segments, k_segments, lax.axis_index(sequence) * q.shape[1])

    specs = (spec, spec, spec, type(spec)(rows, sequence))
    return jax.shard_map(local, in_specs=specs, out_specs=spec, check_vma=False)(q_bskgh, k_bskh, v_bskh, segments_bs)


def _divides(mesh, spec, shape) -> bool:
    """Whether the mesh splits these dimensions evenly; the single dummy token of `init` it does not."""
    for axes, size in zip(spec, shape, strict=False):
        parts = 1
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            parts *= mesh.shape[axis]
        if size % parts:
            return False
    return True


def _xla(q_bskgh, k_bskh, v_bskh, q_segments, k_segments, first_query):
    """Block by block; the backward pass computes the scores of a block again, so that they never exist whole."""

    @jax.checkpoint
    def block(q, segments, first):
        visible = _causal(q.shape[1], k_bskh.shape[1], first)[None]
        if segments is not None:
            visible = visible & (segments[:, :, None] == k_segments[:, None])
        return _attend_block(q, jnp.swapaxes(k_bskh, 1, 2), jnp.swapaxes(v_bskh, 1, 2), visible)

    return _over_query_blocks(block, q_bskgh, q_segments, first_query)


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

    def block(q, _, first):
        visible = _causal(q.shape[1], k_bkth.shape[2], first) & (jnp.arange(k_bkth.shape[2]) >= start[:, None, None])
        return _attend_block(q, k_bkth, v_bkth, visible)

    return _over_query_blocks(block, q_bskgh, None, first_query)


def _over_query_blocks(block, q_bskgh, segments_bs, first_query):
    """`block(queries, their segments, slot of the first)` over blocks of at most QUERY_BLOCK queries."""
    queries = q_bskgh.shape[1]
    if queries <= QUERY_BLOCK:
        return block(q_bskgh, segments_bs, first_query)
    blocks = -(-queries // QUERY_BLOCK)

    def split(x):
        padded = jnp.pad(x, ((0, 0), (0, blocks * QUERY_BLOCK - queries), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(padded.reshape(x.shape[0], blocks, QUERY_BLOCK, *x.shape[2:]), 1, 0)

    offsets = first_query + QUERY_BLOCK * jnp.arange(blocks, dtype=jnp.int32)
    out = lax.map(lambda parts: block(*parts), (*jax.tree.map(split, (q_bskgh, segments_bs)), offsets))
    return jnp.moveaxis(out, 0, 1).reshape(q_bskgh.shape[0], -1, *q_bskgh.shape[2:])[:, :queries]


def _causal(queries: int, keys: int, first_query) -> jax.Array:
    """bool [S, T]: key slot t is not later than the query, whose slot is first_query + s."""
    query = first_query + jnp.arange(queries, dtype=jnp.int32)[:, None]
    return jnp.arange(keys, dtype=jnp.int32)[None] <= query


def _attend_block(q_bskgh, k_bkth, v_bkth, visible):
    """`visible`: bool [B or 1, S, T]."""
    dtype = q_bskgh.dtype
    precision = matmul_precision(dtype)
    scores = jnp.einsum("bskgh,bkth->bkgst", q_bskgh, k_bkth, precision=precision, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores * q_bskgh.shape[-1] ** -0.5, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(dtype)
    return jnp.einsum("bkgst,bkth->bskgh", weights, v_bkth, precision=precision, preferred_element_type=dtype)


def matmul_precision(dtype) -> lax.Precision | None:
    """float32 means float32: no TF32 or bfloat16 passes. Narrow dtypes take the backend's default."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None

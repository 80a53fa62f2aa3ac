"""Attention of one token at a time over the KV cache on GPUs, a kernel in Pallas (Triton).

It only streams the live part of the cache. The cache is split between programs, so that one small batch fills the
chip, and narrow codes are read as they are.

B batch, T cache slots, K KV heads, G query heads per KV head, H width.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from emu3_jax.models.attention import MASKED, matmul_precision

_LEAST_ROWS = 16  # of a matrix unit's product
_PROGRAMS = 264  # two for each multiprocessor of an H100
_SLOTS = 64  # of a block of the cache, whose number of slots is a multiple of it


# "xla" leaves everything to the compiler; "pallas-interpreted" runs the kernel's program anywhere, for tests.
CHOICES = ("xla", "pallas", "pallas-interpreted")


@functools.partial(jax.jit, static_argnames="interpret")
def attend_one(
    q_bkgh: jax.Array,
    k_bkth: jax.Array,
    v_bkth: jax.Array,
    k_scales_bkt: jax.Array | None,
    v_scales_bkt: jax.Array | None,
    query: jax.Array,
    start: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Attention of one query a row to the slots from `start` to its own; reads no other blocks of the cache.

    Args:
        q_bkgh: [B, K, G, H], RoPE applied, not yet scaled.
        k_bkth: [B, K, T, H], T a multiple of 64.
        v_bkth: likewise.
        k_scales_bkt: float32 [B, K, T], of a narrow cache; else None.
        v_scales_bkt: likewise.
        query: int32 scalar, the query's slot.
        start: int32 [B], each row's first slot.
        interpret: runs the kernel's program anywhere, for tests.

    Returns:
        [B, K, G, H] in the queries' dtype.
    """
    b, kv_heads, groups, width = q_bkgh.shape
    slots, dtype = k_bkth.shape[2], q_bkgh.dtype
    parts = min(slots // _SLOTS, max(1, _PROGRAMS // (b * kv_heads)))
    padded = max(_LEAST_ROWS, groups)
    precision, narrow = matmul_precision(dtype), k_scales_bkt is not None

    def kernel(query_ref, start_ref, q_ref, k_ref, v_ref, *refs):
        k_scales_ref, v_scales_ref = refs[:2] if narrow else (None, None)
        out_ref, top_ref, mass_ref = refs[-3:]
        last, first = query_ref[0], start_ref[0]
        # This part's blocks lie a stride apart, so that all parts have as much to do at any length.
        begin = first // _SLOTS + pl.program_id(2)
        count = jnp.maximum((last // _SLOTS - begin + parts) // parts, 0)
        first_query = query_ref[0] * 0  # not a constant, which would be checked: the rows beyond the group are masked
        there = jax.lax.broadcasted_iota(jnp.int32, (padded, width), 0) < groups
        queries = plt.load(q_ref.at[pl.ds(first_query, padded)], mask=there, other=0.0)

        def add(step, carry):
            total, top, mass = carry
            at = (begin + step * parts) * _SLOTS
            here = pl.ds(at, _SLOTS)
            scores = plt.dot(queries, k_ref[here, :].astype(dtype), trans_b=True, precision=precision) * width**-0.5
            if narrow:
                scores = scores * k_scales_ref[here][None]
            slot = at + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            scores = jnp.where((slot >= first) & (slot <= last), scores, MASKED)
            new = jnp.maximum(top, scores.max(axis=1))
            weights, shrunk = jnp.exp(scores - new[:, None]), jnp.exp(top - new)
            mass = mass * shrunk + weights.sum(axis=1)
            if narrow:
                weights = weights * v_scales_ref[here][None]
            part = plt.dot(weights.astype(dtype), v_ref[here, :].astype(dtype), precision=precision)
            return total * shrunk[:, None] + part, new, mass

        lowest = jnp.full((padded,), MASKED, jnp.float32)
        empty = (jnp.zeros((padded, width), jnp.float32), lowest, jnp.zeros((padded,), jnp.float32))
        out_ref[...], top_ref[...], mass_ref[...] = jax.lax.fori_loop(0, count, add, empty)

    head = pl.BlockSpec((None, None, groups, width), lambda i, k, p: (i, k, 0, 0))
    cache = pl.BlockSpec((None, None, slots, width), lambda i, k, p: (i, k, 0, 0))
    scales = pl.BlockSpec((None, None, slots), lambda i, k, p: (i, k, 0))
    one = pl.BlockSpec((None, None, None, padded), lambda i, k, p: (i, k, p, 0))
    shape = (b, kv_heads, parts, padded)
    totals, tops, masses = pl.pallas_call(
        kernel,
        grid=(b, kv_heads, parts),
        in_specs=[
            pl.BlockSpec((1,), lambda i, k, p: (0,)),
            pl.BlockSpec((1,), lambda i, k, p: (i,)),
            head,
            cache,
            cache,
            *([scales, scales] if narrow else []),
        ],
        out_specs=[pl.BlockSpec((None, None, None, padded, width), lambda i, k, p: (i, k, p, 0, 0)), one, one],
        out_shape=[jax.ShapeDtypeStruct(s, jnp.float32) for s in ((*shape, width), shape, shape)],
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="attend_one",
    )(query.reshape(1), start, q_bkgh, k_bkth, v_bkth, *((k_scales_bkt, v_scales_bkt) if narrow else ()))
    # A part that saw nothing has a mass of 0 and the lowest top: it weighs nothing.
    share = jnp.exp(tops - tops.max(axis=2, keepdims=True))
    out = (totals * share[..., None]).sum(axis=2) / (masses * share).sum(axis=2)[..., None]
    return out[:, :, :groups].astype(dtype)

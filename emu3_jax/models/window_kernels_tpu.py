"""A Pallas (Mosaic) kernel for TPUs: attention of a window of W tokens per row over the KV cache.

XLA reads the whole cache and makes an array of the scores of all queries over all slots, in HBM unless it fits into
VMEM. This kernel reads only the blocks of the cache that a row uses, and holds only the scores of one block, in VMEM.

JAX's own kernels do not fit this cache. `paged_attention` and `ragged_paged_attention` want other layouts (KV heads
before rows; keys and values interleaved), so the whole cache would be copied in each pass. The former takes one query
per row, and neither takes a first slot per row or a scale per slot. Splash and `flash_attention` read all slots of the
cache, Splash once per query head, and take no int8 codes.

B batch, W window, T cache slots, K KV heads, G query heads per KV head, H width.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from emu3_jax.models.attention import MASKED, TPU_SLOTS, matmul_precision

# Limits of one step, which reads a block of slots of several KV heads. Keys and values, each twice, and the float32
# scores then take at most 6 MiB of the 16 MiB of VMEM that a kernel may use.
_KEY_BYTES = 2**19
_MOST_SCORES = 2**20
_LANES = 128  # numbers in one row of a register

Cache = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]


@functools.partial(jax.jit, static_argnames="interpret")
def attend_window(
    q_bwkgh: jax.Array,
    cache_layer: Cache,
    length: jax.Array,
    start: jax.Array,
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Causal attention of W tokens per row over the row's slots; softmax in float32.

    The cache already holds the keys and values of the window, in the slots `length[b]` to `length[b] + W - 1`. On a
    mesh, each device computes its own rows and heads.

    Args:
        q_bwkgh: [B, W, K, G, H] queries, RoPE applied, not yet scaled. Query i of row b attends to the slots
            `start[b]` to `length[b] + i`.
        cache_layer: keys and values [B, K, T, H], in the queries' dtype or as int8 codes; and the codes' scales,
            float32 [B, K, T] in a narrow cache, else None. See `cache.KVCache.layer`.
        length: int32 [B], slot of each row's query 0. Slots from T on do not exist, and no query attends to them.
        start: int32 [B], first slot of each row.
        interpret: run the kernel in one of Pallas' interpreters, on any device, for tests.

    Returns:
        [B, W, K, G, H] in the queries' dtype. A query without visible slots gets a finite, meaningless result.
    """
    local = functools.partial(_attend_window, interpret=interpret)
    arguments = (q_bwkgh, cache_layer, length, start)
    if jax.sharding.get_abstract_mesh().empty:
        return local(*arguments)
    names = (("batch", None, "kv_heads"), ("batch", "kv_heads"), ("batch",))
    queries, kept, rows = (nn.logical_to_mesh_axes(axes) for axes in names)
    return jax.shard_map(local, in_specs=(queries, kept, rows, rows), out_specs=queries, check_vma=False)(*arguments)


def _attend_window(
    q_bwkgh: jax.Array,
    cache_layer: Cache,
    length: jax.Array,
    start: jax.Array,
    *,
    interpret: bool | pltpu.InterpretParams,
) -> jax.Array:
    """`attend_window` for the rows and heads of one device."""
    b, window, kv_heads, groups, width = q_bwkgh.shape
    keys, values, *scales = (array for array in cache_layer if array is not None)
    slots, dtype, precision = keys.shape[2], q_bwkgh.dtype, matmul_precision(q_bwkgh.dtype)
    used = window * groups  # query r of a KV head is query r // G of the window
    tile = 32 // dtype.itemsize  # rows of one tile in VMEM
    queries = pl.cdiv(used, tile) * tile
    heads, block = _tiles(slots, queries, kv_heads, pl.cdiv(width, _LANES) * _LANES * keys.dtype.itemsize)
    blocks, partial = pl.cdiv(slots, block), slots % block != 0

    def at(row: Any, step: Any, length_ref: Any, start_ref: Any) -> Any:
        return _block_at(step, length_ref[row], start_ref[row], window, block, blocks)

    def kernel(length_ref: Any, start_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, *refs: Any) -> None:
        *scale_refs, out_ref, total_ref, top_ref, mass_ref = refs
        row, group, step = (pl.program_id(axis) for axis in range(3))

        @pl.when(step == 0)
        def _() -> None:
            total_ref[...] = jnp.zeros_like(total_ref)
            top_ref[...] = jnp.full_like(top_ref, MASKED)
            mass_ref[...] = jnp.zeros_like(mass_ref)

        @pl.when(step == at(row, step, length_ref, start_ref))
        def _() -> None:
            slot = step * block + lax.broadcasted_iota(jnp.int32, (1, block), 1)
            # slot <= length + r // G, without a division of vectors.
            above = (slot - length_ref[row]) * groups
            above = jnp.where((slot >= start_ref[row]) & (slot < slots), above, queries)
            visible = above <= lax.broadcasted_iota(jnp.int32, (queries, 1), 0)
            # The last block may reach beyond the cache. What is there may be NaN, which a weight of 0 would not hide.
            inside = step * block + lax.broadcasted_iota(jnp.int32, (block, 1), 0) < slots
            # Each phase runs over all heads, so that one head's latencies hide behind another head's work. In the
            # compiler's schedule for v5e, doing head after head takes a third more cycles.
            products = [_product(q_ref[head], k_ref[head].astype(dtype), 1, precision) for head in range(heads)]
            states = []
            for head, product in enumerate(products):
                factor = width**-0.5
                if scales:
                    factor = factor * scale_refs[0][pl.ds(group * heads + head, 1)]
                scores = jnp.where(visible, product * factor, MASKED)
                old = top_ref[head]
                states.append((scores, old, jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))))
            for head, (scores, old, top) in enumerate(states):
                weights, shrunk = jnp.exp(scores - _lanes(top, block)), jnp.exp(old - top)
                top_ref[head] = top
                # Sums over every 128th slot. The last step adds them up.
                parts = (weights[:, at : at + _LANES] for at in range(0, block, _LANES))
                mass_ref[head] = mass_ref[head] * shrunk + sum(parts)
                if scales:
                    factor = scale_refs[1][pl.ds(group * heads + head, 1)]
                    weights = weights * jnp.where(slot < slots, factor, 0.0)
                v = v_ref[head].astype(dtype)
                if partial:
                    v = jnp.where(inside, v, jnp.zeros_like(v))
                part = _product(weights.astype(dtype), v, 0, precision)
                total_ref[head] = total_ref[head] * _lanes(shrunk, width) + part

        @pl.when(step == blocks - 1)
        def _() -> None:
            out_ref[...] = (total_ref[...] / jnp.sum(mass_ref[...], axis=-1, keepdims=True)).astype(dtype)

    per_head = pl.BlockSpec((None, heads, queries, width), lambda row, group, step, *refs: (row, group, 0, 0))
    per_slot = pl.BlockSpec(
        (None, heads, block, width), lambda row, group, step, *refs: (row, group, at(row, step, *refs), 0)
    )
    # Scales of all KV heads, because a block of fewer than 8 of them would not be legal.
    per_scale = pl.BlockSpec((None, kv_heads, block), lambda row, group, step, *refs: (row, 0, at(row, step, *refs)))
    pairs = b * kv_heads * used * slots
    out_bkqh = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b, kv_heads // heads, blocks),
            in_specs=[per_head, per_slot, per_slot, *(per_scale for _ in scales)],
            out_specs=per_head,
            scratch_shapes=[pltpu.VMEM((heads, queries, n), jnp.float32) for n in (width, _LANES, _LANES)],
        ),
        out_shape=jax.ShapeDtypeStruct((b, kv_heads, queries, width), dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * pairs * width,
            transcendentals=pairs,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (q_bwkgh, q_bwkgh, keys, values, *scales)),
        ),
        interpret=interpret,
        name="attend_window",
    )(length, start, _heads_first(q_bwkgh, queries), keys, values, *scales)
    out_bkwgh = out_bkqh[:, :, :used].reshape(b, kv_heads, window, groups, width)
    return jnp.swapaxes(out_bkwgh, 1, 2)


def _block_at(step: Any, length: Any, start: Any, window: int, block: int, blocks: int) -> Any:
    """The block that a row has in VMEM in a step: the step's own, or the nearest one that the row uses.

    Where it is the same in two steps, nothing is fetched.
    """
    last = jnp.minimum(lax.div(length + (window - 1), block), blocks - 1)
    return jnp.minimum(jnp.maximum(step, lax.div(start, block)), last)


def _heads_first(q_bwkgh: jax.Array, queries: int) -> jax.Array:
    """[B, K, queries, H]: the W * G queries of each KV head, padded."""
    b, window, kv_heads, groups, width = q_bwkgh.shape
    q_bkqh = jnp.swapaxes(q_bwkgh, 1, 2).reshape(b, kv_heads, window * groups, width)
    return jnp.pad(q_bkqh, ((0, 0), (0, 0), (0, queries - window * groups), (0, 0)))


def _tiles(slots: int, queries: int, kv_heads: int, slot_bytes: int) -> tuple[int, int]:
    """The numbers of KV heads and of slots in one step. A slot of a KV head has `slot_bytes` of keys in VMEM."""
    block = min(TPU_SLOTS, max(_MOST_SCORES // queries // _LANES, 1) * _LANES, pl.cdiv(slots, _LANES) * _LANES)
    heads = max(1, min(_KEY_BYTES // (block * slot_bytes), _MOST_SCORES // (block * queries)))
    return next(n for n in range(heads, 0, -1) if kv_heads % n == 0), block


def _lanes(x: jax.Array, count: int) -> jax.Array:
    """[queries, count] from [queries, 128], where all numbers of a row are equal."""
    return jnp.concatenate([x] * pl.cdiv(count, _LANES), axis=1)[:, :count]


def _product(x: jax.Array, y: jax.Array, axis: int, precision: lax.Precision | None) -> jax.Array:
    """Product over the last axis of `x` and this axis of `y`, in float32."""
    dimensions = (((1,), (axis,)), ((), ()))
    return lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)

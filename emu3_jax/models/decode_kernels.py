"""A Pallas (Triton) kernel for GPUs: attention of one token per row over the KV cache.

The kernel applies RoPE to queries and key, writes key and value to the cache (as int8 codes in a narrow cache), and
reads the used part of the cache. Several programs share a row's slots, so that even a small batch fills the GPU. XLA
would need many kernels for the same work.

B batch, T cache slots, K KV heads, G query heads per KV head, H width.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from emu3_jax.errors import Emu3Error
from emu3_jax.models.attention import MASKED, matmul_precision

_LEAST_ROWS = 16  # smallest number of rows in a matrix unit's product
_MULTIPROCESSORS = 132  # number of multiprocessors of an H100
_MOST_PARTS = 16  # most parts of one row's slots; XLA combines up to this many in one kernel


Cache = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]


def check_width(width: int) -> None:
    """Raises `Emu3Error` if the kernel cannot serve heads of this width."""
    if width & (width - 1):
        raise Emu3Error(f'kernels "pallas" needs a head width that is a power of two, not {width}: choose "xla"')


@functools.partial(jax.jit, static_argnames="interpret")
def attend_one(
    qkv_bkph: jax.Array,
    rotations_br: tuple[jax.Array, jax.Array],
    cache: Cache,
    length: jax.Array,
    start: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, Cache]:
    """Attention of one token per row over the row's slots, from `start` to the token's own slot.

    It reads only blocks of the cache that contain these slots. On a mesh, each device computes its own rows and heads.

    Args:
        qkv_bkph: [B, K, G + 2, H], the projected queries, key and value of each KV head, without RoPE.
        rotations_br: cosines and sines of the tokens' positions, float32 [B, H / 2] each.
        cache: keys and values [B, K, T, H], T a multiple of 64; and their scales, float32 [B, K, T] in a narrow cache,
            else None.
        length: int32 [B], the slot of each row's token.
        start: int32 [B], first slot of each row.
        interpret: run the kernel in Pallas' interpreter, on any device, for tests.

    Returns:
        [B, K, G, H] in the queries' dtype; and the cache with the token's key and value, updated in place if donated.

    Raises:
        Emu3Error: the head width is not a power of two.
    """
    check_width(qkv_bkph.shape[-1])
    local = functools.partial(_attend_one, interpret=interpret)
    arguments = (qkv_bkph, rotations_br, cache, length, start)
    if jax.sharding.get_abstract_mesh().empty:
        return local(*arguments)
    rows, heads = (nn.logical_to_mesh_axes(axes) for axes in (("batch",), ("batch", "kv_heads")))
    specs = (heads, rows, heads, rows, rows)
    return jax.shard_map(local, in_specs=specs, out_specs=(heads, heads), check_vma=False)(*arguments)


def _attend_one(
    qkv_bkph: jax.Array,
    rotations_br: tuple[jax.Array, jax.Array],
    cache: Cache,
    length: jax.Array,
    start: jax.Array,
    *,
    interpret: bool,
) -> tuple[jax.Array, Cache]:
    """`attend_one` for the rows and heads of one device."""
    b, kv_heads, groups, width = qkv_bkph.shape
    groups -= 2
    kept = [array for array in cache if array is not None]
    slots, dtype, half = kept[0].shape[2], qkv_bkph.dtype, width // 2
    # A program of one warp never waits for other warps. This is faster when int8 codes must be converted. But it needs
    # many programs to fill the GPU, so it is used only with enough rows.
    single = len(kept) == 4 and b * kv_heads * _MOST_PARTS >= 4 * _MULTIPROCESSORS
    block, warps, programs = (32, 1, 4 * _MULTIPROCESSORS) if single else (64, 4, 2 * _MULTIPROCESSORS)
    parts = min(slots // block, max(1, programs // (b * kv_heads)), _MOST_PARTS)
    padded = max(_LEAST_ROWS, 1 << (groups - 1).bit_length())
    precision, narrow = matmul_precision(dtype), len(kept) == 4

    def kernel(length_ref: Any, start_ref: Any, qkv_ref: Any, cos_ref: Any, sin_ref: Any, *refs: Any) -> None:
        k_ref, v_ref, *scale_refs = refs[len(kept) : 2 * len(kept)]  # results, aliased to the arguments
        out_ref, top_ref, mass_ref = refs[-3:]
        length, first = length_ref[0], start_ref[0]
        # A dynamic 0: with a constant start, Pallas refuses a slice that reaches beyond the array, even a masked one.
        none = length * 0
        there = jax.lax.broadcasted_iota(jnp.int32, (padded, half), 0) < groups

        def queries(at: int) -> jax.Array:
            return plt.load(qkv_ref.at[pl.ds(none, padded), pl.ds(at, half)], mask=there, other=0.0)

        # All loads come first, so that none waits for the computation.
        cos, sin, v = cos_ref[...], sin_ref[...], qkv_ref[groups + 1, :]
        q_low, q_high = queries(0), queries(half)
        k_low, k_high = (qkv_ref[groups, pl.ds(at, half)] for at in (0, half))

        def rotated(low: jax.Array, high: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array]:
            low, high = low.astype(jnp.float32), high.astype(jnp.float32)
            return (low * cos - high * sin).astype(dtype), (high * cos + low * sin).astype(dtype)

        q_low, q_high = rotated(q_low, q_high, cos[None], sin[None])
        k_low, k_high = rotated(k_low, k_high, cos, sin)
        k_scale = v_scale = 1.0
        if narrow:
            k_low, k_high, v = (x.astype(jnp.float32) for x in (k_low, k_high, v))
            k_scale = jnp.maximum(jnp.max(jnp.abs(k_low)), jnp.max(jnp.abs(k_high))) / 127
            v_scale = jnp.max(jnp.abs(v)) / 127
            k_low, k_high, v = (_codes(x, s) for x, s in ((k_low, k_scale), (k_high, k_scale), (v, v_scale)))

        writes = pl.program_id(2) == 0
        for ref, at, new in ((k_ref, 0, k_low), (k_ref, half, k_high), (v_ref, 0, v)):
            target = ref.at[length, pl.ds(at, len(new))]
            plt.store(target, new.astype(ref.dtype), mask=jnp.broadcast_to(writes, new.shape))
        for ref, scale in zip(scale_refs, (k_scale, v_scale), strict=False):
            plt.store(ref.at[pl.ds(length, 1)], scale[None], mask=writes[None])

        # A part takes every `parts`-th block, so that all parts have equal work at any length.
        begin = first // block + pl.program_id(2)
        count = jnp.maximum(((length - 1) // block - begin + parts) // parts, 0)

        def add(step: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            total, top, mass = carry
            at = (begin + step * parts) * block
            here = pl.ds(at, block)
            scores = sum(
                plt.dot(q, k_ref[here, pl.ds(first, half)].astype(dtype), trans_b=True, precision=precision)
                for q, first in ((q_low, 0), (q_high, half))
            )
            scores = scores * width**-0.5
            if narrow:
                scores = scores * scale_refs[0][here][None]
            slot = at + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            scores = jnp.where((slot >= first) & (slot < length), scores, MASKED)
            new = jnp.maximum(top, scores.max(axis=1))
            weights, shrunk = jnp.exp(scores - new[:, None]), jnp.exp(top - new)
            mass = mass * shrunk + weights.sum(axis=1)
            largest = None
            if narrow:
                scales = scale_refs[1][here]
                if dtype == jnp.float16:  # see `attention._masked_attention`
                    largest = jnp.maximum(jnp.max(scales), jnp.finfo(jnp.float32).tiny)
                    scales = scales / largest
                weights = weights * scales[None]
            part = plt.dot(weights.astype(dtype), v_ref[here, :].astype(dtype), precision=precision)
            part = part if largest is None else part * largest
            return total * shrunk[:, None] + part, new, mass

        lowest = jnp.full((padded,), MASKED, jnp.float32)
        empty = (jnp.zeros((padded, width), jnp.float32), lowest, jnp.zeros((padded,), jnp.float32))
        total, top, mass = jax.lax.fori_loop(0, count, add, empty)

        # Other parts may run before the token's own key and value are written. So only the writing part adds them.
        products = (q.astype(jnp.float32) * k.astype(jnp.float32)[None] for q, k in ((q_low, k_low), (q_high, k_high)))
        score = sum(x.sum(axis=1) for x in products) * (k_scale * width**-0.5)
        new = jnp.where(writes, jnp.maximum(top, score), top)
        weight, shrunk = jnp.where(writes, jnp.exp(score - new), 0.0), jnp.exp(top - new)
        seen = weight * v_scale
        if dtype != jnp.float16:
            seen = seen.astype(dtype).astype(jnp.float32)
        seen = seen[:, None] * v.astype(jnp.float32)[None]
        out_ref[...], top_ref[...], mass_ref[...] = total * shrunk[:, None] + seen, new, mass * shrunk + weight

    def per_row(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda i, k, p: (i, *(0 for _ in shape)))

    def per_head(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *shape), lambda i, k, p: (i, k, *(0 for _ in shape)))

    def per_part(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, None, *shape), lambda i, k, p: (i, k, p, *(0 for _ in shape)))

    places = [per_head(*array.shape[2:]) for array in kept]
    shape = (b, kv_heads, parts, padded)
    *kept, totals, tops, masses = pl.pallas_call(
        kernel,
        grid=(b, kv_heads, parts),
        in_specs=[
            pl.BlockSpec((1,), lambda i, k, p: (i,)),
            pl.BlockSpec((1,), lambda i, k, p: (i,)),
            per_head(groups + 2, width),
            per_row(half),
            per_row(half),
            *places,
        ],
        out_specs=[*places, per_part(padded, width), per_part(padded), per_part(padded)],
        out_shape=[
            *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in kept),
            *(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((*shape, width), shape, shape)),
        ],
        input_output_aliases={5 + index: index for index in range(len(kept))},
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=3),
        interpret=interpret,
        name="attend_one",
    )(length, start, qkv_bkph, *rotations_br, *kept)
    # Sums of separate parts, because XLA fuses them into one kernel; it makes several kernels of reductions.
    totals, tops, masses = ([x[:, :, part, :groups] for part in range(parts)] for x in (totals, tops, masses))
    top = functools.reduce(jnp.maximum, tops)
    # A part without visible slots has mass 0, or the lowest maximum, so its weight is 0.
    shares = [jnp.exp(x - top) for x in tops]
    mass = sum(x * share for x, share in zip(masses, shares, strict=True))
    out = sum(x * share[..., None] for x, share in zip(totals, shares, strict=True)) / mass[..., None]
    return out.astype(dtype), (*kept, *(None for _ in cache[len(kept) :]))


def _codes(x: jax.Array, scale: jax.Array) -> jax.Array:
    """The int8 codes of `quantization.narrow_rows`, still in float32."""
    unit = x / jnp.where(scale == 0, 1.0, scale)
    above = jnp.floor(unit + 0.5)  # rounds to nearest, ties to even; Triton has no operation for it
    tie = (above - unit == 0.5) & (above.astype(jnp.int32) & 1 == 1)
    return jnp.clip(jnp.where(tie, above - 1, above), -127, 127)

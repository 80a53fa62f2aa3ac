"""A Pallas (Mosaic GPU) kernel for NVIDIA Hopper: attention of a window of W tokens per row over the KV cache.

`attend_window` reads the used part of the cache. The blocks of a row's slots are dealt to several programs, so that
even a small batch fills the GPU ("flash-decoding"); XLA then combines the programs' partial results. In a program, one
warpgroup copies blocks of keys and values to shared memory, and the others compute. A compute warpgroup takes 64
queries: tokens of the window times the query heads of a KV head.

A tiled copy addresses memory in tiles of 8 rows, (slot // 8, slot % 8). A block that starts at another slot would
silently read zeros, which Pallas' interpreter does not show. So blocks start at a multiple of 8.

B batch, W tokens of the window, T cache slots, K KV heads, G query heads per KV head, H width, P parts,
M = W * G queries of a KV head, padded to whole tiles.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from emu3_jax.models.window_writes_hopper import Cache, Rotations, interpreter, laid, loaded, prepare_window

WIDTH = 128  # head width that the kernels are made for
_TILE = 64  # queries of one warpgroup: the rows of Hopper's matrix instruction
_MULTIPROCESSORS = 132  # of an H100
_LOWEST = -1e30  # maximum of a part without visible slots; finite, so that no difference of two is NaN
_LOG2E = math.log2(math.e)
_SHARED_BYTES = 221 * 1024  # shared memory of a program on Hopper (227 KiB), less barriers and scratch


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of `attend_window`. Zeros are replaced by `resolve`.

    Attributes:
        block: number of slots of a block of keys or values, a multiple of 64.
        stages: number of blocks of keys, and of values, that shared memory holds.
        query_groups: number of warpgroups of a program that share its blocks and take different queries.
        slot_groups: number of warpgroups of a program that take different blocks.
        parts: number of programs that share a row's slots.
    """

    block: int = 64
    stages: int = 0
    query_groups: int = 0
    slot_groups: int = 0
    parts: int = 0

    def resolve(self, rows: int, heads: int, queries: int, slots: int, narrow: bool) -> "Sizes":
        """The same sizes with zeros replaced by good ones for these shapes."""
        tiles = -(-queries // _TILE)
        query_groups = self.query_groups or min(tiles, 2)
        slot_groups = self.slot_groups or (2 if query_groups == 1 else 1)
        programs = rows * heads * -(-tiles // query_groups)
        parts = self.parts or max(1, round(_MULTIPROCESSORS / programs - 0.4))
        parts = max(1, min(parts, slots // (self.block * slot_groups)))
        compute, tile = query_groups * slot_groups, _TILE * WIDTH * 2
        wide = 2 * compute * self.block * WIDTH * 2 if narrow else 0
        free = _SHARED_BYTES - query_groups * tile - compute * tile - wide
        stages = self.stages or min(6, free // (2 * self.block * (WIDTH + 4 if narrow else 2 * WIDTH)))
        # A warpgroup counts the phases of the barriers that it waits for, so a stage must always serve the same one.
        stages = max(stages // slot_groups, 1) * slot_groups
        return Sizes(self.block, stages, query_groups, slot_groups, parts)


def attend_projected(
    qkv_bwkph: jax.Array,
    rotations: Rotations,
    cache: Cache,
    length: jax.Array,
    start: jax.Array,
    *,
    sizes: Sizes | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, Cache]:
    """Writes the keys and values of W tokens per row to the cache, and computes causal attention over the row's slots.

    On a mesh, each device computes its own rows and heads.

    Args:
        qkv_bwkph: bfloat16 [B, W, K, G + 2, 128], the projected queries, key and value of each KV head, without RoPE.
            W is a multiple of 8.
        rotations: cosines and sines of the tokens' positions, float32 [B, W, 64] each.
        cache: keys and values, bfloat16 [B, K, T, 128], T a multiple of 64; or int8 codes and their scales, float32
            [B, K, T].
        length: int32 [B], the slot of each row's first token; length + W <= T.
        start: int32 [B], first slot of each row.
        sizes: sizes of the kernel, for tests and measurements.
        interpret: run the kernels in Pallas' interpreter of GPU kernels, for tests; True or its parameters.

    Returns:
        bfloat16 [B, W, K, G, 128]; and the cache with the tokens' keys and values, updated in place if donated.
    """
    local = functools.partial(_attend_projected, sizes=sizes or Sizes(), interpret=interpreter(interpret))
    arguments = (qkv_bwkph, rotations, cache, length, start)
    if jax.sharding.get_abstract_mesh().empty:
        return local(*arguments)
    tokens, rows, heads = _specs()
    specs = (tokens, rows, heads, rows, rows)
    return jax.shard_map(local, in_specs=specs, out_specs=(tokens, heads), check_vma=False)(*arguments)


def _specs() -> tuple[Any, Any, Any]:
    """How a mesh splits arrays of tokens and heads [B, W, K, ...], of rows [B, ...], and of the cache [B, K, ...]."""
    names = (("batch", None, "kv_heads"), ("batch",), ("batch", "kv_heads"))
    tokens, rows, heads = (nn.logical_to_mesh_axes(axes) for axes in names)
    return tokens, rows, heads


# Jitted, so that all layers share one lowering of the kernels.
@functools.partial(jax.jit, static_argnames=("sizes", "interpret"))
def _attend_projected(
    qkv: jax.Array,
    rotations: Rotations,
    cache: Cache,
    length: jax.Array,
    start: jax.Array,
    *,
    sizes: Sizes,
    interpret: Any,
) -> tuple[jax.Array, Cache]:
    """`attend_projected` for the rows and heads of one device."""
    queries, cache = prepare_window(qkv, rotations, cache, length, interpret=interpret)
    return _attend_window(queries, cache, length, start, sizes=sizes, interpret=interpret), cache


def attend_window(
    q_bwkgh: jax.Array,
    cache: Cache,
    length: jax.Array,
    start: jax.Array,
    *,
    sizes: Sizes | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Causal attention of W tokens per row over the row's slots. Token i sees the slots `start .. length + i`.

    Args:
        q_bwkgh: bfloat16 [B, W, K, G, 128] queries, RoPE applied, not scaled.
        cache: keys and values, bfloat16 [B, K, T, 128], T a multiple of 64; or int8 codes and their scales, float32
            [B, K, T]. Those of the window are there already, at the slots `length .. length + W - 1`.
        length: int32 [B], the first slot of the window; length + W <= T.
        start: int32 [B], first slot of each row.
        sizes: sizes of the kernel, for tests and measurements.
        interpret: run the kernels in Pallas' interpreter of GPU kernels, for tests; True or its parameters.

    Returns:
        bfloat16 [B, W, K, G, 128].
    """
    local = functools.partial(_attend_window, sizes=sizes or Sizes(), interpret=interpreter(interpret))
    arguments = (q_bwkgh, cache, length, start)
    if jax.sharding.get_abstract_mesh().empty:
        return local(*arguments)
    tokens, rows, heads = _specs()
    specs = (tokens, heads, rows, rows)
    return jax.shard_map(local, in_specs=specs, out_specs=tokens, check_vma=False)(*arguments)


@functools.partial(jax.jit, static_argnames=("sizes", "interpret"))
def _attend_window(
    q_bwkgh: jax.Array, cache: Cache, length: jax.Array, start: jax.Array, *, sizes: Sizes, interpret: Any
) -> jax.Array:
    """`attend_window` for the rows and heads of one device."""
    b, w, heads, groups, width = q_bwkgh.shape
    kept = [array for array in cache if array is not None]
    narrow = len(kept) == 4
    slots, dtype, queries = kept[0].shape[2], q_bwkgh.dtype, w * groups
    sizes = sizes.resolve(b, heads, queries, slots, narrow)
    block, stages, parts = sizes.block, sizes.stages, sizes.parts
    query_groups, slot_groups = sizes.query_groups, sizes.slot_groups
    rows = query_groups * _TILE  # queries of a program
    tiles = -(-queries // rows)
    compute = query_groups * slot_groups
    scale = width**-0.5 * _LOG2E

    # The tokens of a query head are consecutive.
    q = jnp.transpose(q_bwkgh, (0, 2, 3, 1, 4)).reshape(b * heads, queries, width)
    q = jnp.pad(q, ((0, 0), (0, tiles * rows - queries), (0, 0)))

    def kernel(length_ref: Any, start_ref: Any, q_ref: Any, *refs: Any) -> None:
        sources, (out_ref, peak_ref, *scratch) = refs[: len(kept)], refs[len(kept) :]
        (q_smem, o_smem, peak_smem, *rings), wides, (q_ready, k_ready, v_ready, k_free, v_free) = scratch
        head, part, tile = lax.axis_index("head"), lax.axis_index("part"), lax.axis_index("tile")
        group = lax.axis_index("group")
        row = lax.div(head, jnp.int32(heads))

        def dealt(blocks: jax.Array) -> jax.Array:
            """Of the first blocks, the number that this program takes: `part`, `part + parts`, ..."""
            return lax.div(blocks - part + (parts - 1), jnp.int32(parts))

        first, length = start_ref[row], length_ref[row]
        base = first - lax.rem(first, jnp.int32(8))
        blocks = lax.div(length + w - base + (block - 1), jnp.int32(block))
        count = dealt(blocks)

        def begin(step: jax.Array) -> jax.Array:
            """The first slot of a program's block. The row's first block comes last, because it needs the mask."""
            following = part + step * parts + 1
            return base + jnp.where(following < blocks, following, 0) * block

        def copied(step: jax.Array) -> jax.Array:
            """The first slot that is copied for a block: the copy may not reach beyond the cache."""
            return jnp.minimum(begin(step), slots - block)

        def clipped(steps: jax.Array, slot_group: jax.Array) -> jax.Array:
            """Of a program's first `steps` blocks, the number that a slot group takes."""
            return lax.div(jnp.maximum(steps - slot_group, 0) + (slot_groups - 1), jnp.int32(slot_groups))

        @pl.when(group < compute)
        def _compute() -> None:
            if compute == 2:
                plgpu.set_max_registers(232, action="increase")
            q_group, slot_group = lax.rem(group, jnp.int32(query_groups)), lax.div(group, jnp.int32(query_groups))
            q_tile = q_smem.at[q_group]
            first_query = tile * rows + q_group * _TILE

            @pl.when(slot_group == 0)
            def _load() -> None:
                plgpu.copy_gmem_to_smem(q_ref.at[head, pl.ds(first_query, _TILE)], q_tile, q_ready.at[q_group])

            plgpu.barrier_wait(q_ready.at[q_group])
            steps = clipped(count, slot_group)

            def taken(which: int, stage: jax.Array, ready: Any, free: Any) -> tuple[Any, jax.Array | None]:
                """A block of keys (0) or values (1), once it is there, and its scales."""
                ring = rings[which].at[stage]
                plgpu.barrier_wait(ready.at[stage])
                if not narrow:
                    return ring, None
                wide = wides[which].at[group]
                wide[...] = loaded(ring, _block_layout(), interpret).astype(dtype)
                scales = loaded(rings[2 + which].at[stage], plgpu.Layout.WGMMA.reduce(0), interpret)
                plgpu.commit_smem()
                plgpu.barrier_arrive(free.at[stage])
                return wide, scales

            def iota(axis: int) -> jax.Array:
                if interpret:
                    return lax.broadcasted_iota(jnp.int32, (_TILE, block), axis)
                return plgpu.broadcasted_iota(jnp.int32, (_TILE, block), axis, layout=plgpu.Layout.WGMMA)

            def add(index: jax.Array, carry: tuple[jax.Array, ...], *, masked: bool) -> tuple[jax.Array, ...]:
                total, top, mass = carry
                step = index * slot_groups + slot_group
                stage = lax.rem(step, jnp.int32(stages))
                k_tile, k_scale = taken(0, stage, k_ready, k_free)

                def score(acc_ref: Any) -> jax.Array:
                    plgpu.wgmma(acc_ref, q_tile, _transposed(k_tile))
                    return acc_ref[...]

                if interpret:
                    scores = _product(q_tile[...], k_tile[...].T)
                    plgpu.commit_smem()  # orders this read before the next copy; the matrix instruction needs none
                else:
                    scores = pl.run_scoped(score, plgpu.ACC((_TILE, block), jnp.float32))
                if not narrow:
                    plgpu.barrier_arrive(k_free.at[stage])
                factor = scale
                if k_scale is not None:
                    scores *= lax.broadcast_in_dim(k_scale * scale, scores.shape, [1])
                    factor = 1.0
                if masked:
                    query, slot = (iota(axis) for axis in (0, 1))
                    token = query + first_query
                    token = token & (w - 1) if w & (w - 1) == 0 else lax.rem(token, jnp.int32(w))
                    at = copied(step)
                    seen = slot <= token + (length - at)
                    seen &= slot >= jnp.maximum(begin(step), first) - at
                    scores = jnp.where(seen, scores, -jnp.inf)
                new = jnp.maximum(top, scores.max(axis=1) * factor)
                shrunk = jnp.exp2(top - new)
                weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(new, scores.shape, [0]))
                mass = mass * shrunk + weights.sum(axis=1)
                total *= lax.broadcast_in_dim(shrunk, total.shape, [0])
                v_tile, v_scale = taken(1, stage, v_ready, v_free)
                if v_scale is not None:
                    weights *= lax.broadcast_in_dim(v_scale, weights.shape, [1])
                weights = weights.astype(dtype)
                if interpret:  # the interpreter has no matrix instruction with an operand in registers
                    total += _product(weights, v_tile[...])
                    plgpu.commit_smem()
                else:
                    total = pl.run_state(lambda acc: plgpu.wgmma(acc, weights, v_tile))(plgpu.ACC.init(total))
                if not narrow:
                    plgpu.barrier_arrive(v_free.at[stage])
                return total, new, mass

            total = laid(jnp.full((_TILE, width), 0, jnp.float32), plgpu.Layout.WGMMA, interpret)
            top, mass = (
                laid(jnp.full((_TILE,), x, jnp.float32), plgpu.Layout.WGMMA.reduce(1), interpret)
                for x in (_LOWEST, 0.0)
            )
            # All queries see all slots of the blocks between the row's first one and the window.
            full = lax.div(jnp.maximum(length - base - block, 0), jnp.int32(block))
            whole = clipped(dealt(full), slot_group)
            state = lax.fori_loop(0, whole, functools.partial(add, masked=False), (total, top, mass))
            total, top, mass = lax.fori_loop(whole, steps, functools.partial(add, masked=True), state)
            mass = jnp.maximum(mass, 1e-30)
            total = total / lax.broadcast_in_dim(mass, total.shape, [0])
            o_tile, peak_tile = o_smem.at[group], peak_smem.at[group]
            o_tile[...] = total.astype(dtype)
            peak_tile[...] = top + jnp.log2(mass)
            plgpu.commit_smem()
            where = (head, part * slot_groups + slot_group, pl.ds(first_query, _TILE))
            plgpu.copy_smem_to_gmem(o_tile, out_ref.at[where])
            plgpu.copy_smem_to_gmem(peak_tile, peak_ref.at[where])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == compute)
        def _copy() -> None:
            if compute == 2:
                plgpu.set_max_registers(40, action="decrease")

            def copy(step: jax.Array, _: None, *, fill: bool, wait: bool) -> None:
                stage = lax.rem(step, jnp.int32(stages))
                here = (head, pl.ds(pl.multiple_of(copied(step), 8), block))
                for which, (ready, free) in enumerate(((k_ready, k_free), (v_ready, v_free))):
                    if wait:
                        plgpu.barrier_wait(free.at[stage])
                    if fill:
                        for source, ring in zip(sources[which::2], rings[which::2], strict=True):
                            plgpu.copy_gmem_to_smem(source.at[here], ring.at[stage], ready.at[stage])

            lax.fori_loop(0, jnp.minimum(count, stages), functools.partial(copy, fill=True, wait=False), None)
            lax.fori_loop(stages, count, functools.partial(copy, fill=True, wait=True), None)
            # The last blocks. The interpreter demands that every phase of a barrier is waited for.
            last_blocks = jnp.maximum(count - stages, 0)
            lax.fori_loop(last_blocks, count, functools.partial(copy, fill=False, wait=True), None)

    partials = (b * heads, parts * slot_groups, tiles * rows)
    call = plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct((*partials, width), dtype), jax.ShapeDtypeStruct(partials, jnp.float32)),
        scratch_types=(
            (
                _tiled((query_groups, _TILE, width), dtype),
                _tiled((compute, _TILE, width), dtype),
                plgpu.SMEM((compute, _TILE), jnp.float32),
                *(_tiled((stages, block, width), kept[0].dtype) for _ in range(2)),
                *(plgpu.SMEM((stages, block), jnp.float32) for _ in range(2 if narrow else 0)),
            ),
            tuple(_tiled((compute, block, width), dtype) for _ in range(2 if narrow else 0)),
            (
                plgpu.Barrier(num_barriers=query_groups),
                plgpu.Barrier(num_arrivals=2 if narrow else 1, num_barriers=stages),
                plgpu.Barrier(num_arrivals=2 if narrow else 1, num_barriers=stages),
                plgpu.Barrier(num_arrivals=query_groups, num_barriers=stages),
                plgpu.Barrier(num_arrivals=query_groups, num_barriers=stages),
            ),
        ),
        grid=(parts, tiles, b * heads),
        grid_names=("part", "tile", "head"),
        num_threads=compute + 1,
        thread_name="group",
        # `Lane` is the semantics that all supported versions of JAX have.
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )
    out, peak = call(length, start, q, *(array.reshape(b * heads, *array.shape[2:]) for array in kept))
    return _combined(out, peak, q_bwkgh.shape)


def _combined(out: jax.Array, peak: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Combines partial results [B * K, P, M, H] with the base-2 logarithms [B * K, P, M] of their softmax sums.

    The logarithm of a part without visible slots is so low that its weight is 0.
    """
    b, window, heads, groups, width = shape
    # Separate sums, because XLA fuses them into one kernel; it makes several kernels of reductions.
    outs, peaks = ([x[:, part, : window * groups] for part in range(x.shape[1])] for x in (out, peak))
    top = functools.reduce(jnp.maximum, peaks)
    shares = [jnp.exp2(x - top) for x in peaks]
    mixed = sum(o.astype(jnp.float32) * share[..., None] for o, share in zip(outs, shares, strict=True))
    mixed = mixed / sum(shares)[..., None]
    return jnp.transpose(mixed.reshape(b, heads, groups, window, width), (0, 3, 1, 2, 4)).astype(out.dtype)


def _block_layout() -> Any:
    """Where the threads of a warpgroup hold a block of codes: 8 numbers of a row each, 2 rows of 128 per warp."""
    tiling = plgpu.Tiling(((8, WIDTH), (2, WIDTH), (8,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def _tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory in the layout that the matrix instruction reads."""
    columns = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128)))


def _transposed(ref: Any) -> Any:
    return ref.transpose((1, 0)) if hasattr(plgpu, "InterpretGPUParams") else plgpu.transpose_ref(ref, (1, 0))


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32), precision=lax.Precision.HIGHEST)

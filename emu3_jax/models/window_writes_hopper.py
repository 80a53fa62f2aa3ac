"""A Pallas (Mosaic GPU) kernel for NVIDIA Hopper: RoPE of a window of tokens, and its writes to the KV cache.

One launch does what takes XLA 3 launches, and 6 for an int8 cache. `window_kernels_hopper` shares the functions that
load and lay out arrays, in all supported versions of JAX and in Pallas' interpreter.

B batch, W tokens of the window, T cache slots, K KV heads, G query heads per KV head.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CHUNK = 8  # tokens of one program
_ROUNDING = 12582912.0  # 1.5 * 2^23: adding and subtracting it rounds a float32 to the nearest integer, ties to even

Cache = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]
Rotations = tuple[jax.Array, jax.Array]


@functools.partial(jax.jit, static_argnames="interpret")
def prepare_window(
    qkv_bwkph: jax.Array, rotations: Rotations, cache: Cache, length: jax.Array, *, interpret: Any = False
) -> tuple[jax.Array, Cache]:
    """Applies RoPE to a window's queries and keys, and writes its keys and values to the cache.

    Args:
        qkv_bwkph: bfloat16 [B, W, K, G + 2, 128], as for `attend_projected`; W a multiple of 8.
        rotations: cosines and sines of the tokens' positions, float32 [B, W, 64] each.
        cache: as for `attend_projected`. Updated in place if the caller donates it.
        length: int32 [B], the first slot of the window.
        interpret: run the kernels in Pallas' interpreter of GPU kernels, for tests; True or its parameters.

    Returns:
        Queries, bfloat16 [B, W, K, G, 128], and the cache.
    """
    interpret = interpreter(interpret)
    b, w, heads, parts, width = qkv_bwkph.shape
    groups, half, dtype = parts - 2, width // 2, qkv_bwkph.dtype
    kept = [array for array in cache if array is not None]
    narrow = len(kept) == 4
    # A thread has 4 numbers of a half row, a warp 2 rows.
    layout = plgpu.Layout.TILED(
        plgpu.Tiling(((8, half), (2, half), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
    )

    def body(*refs: Any) -> None:
        caches, (qkv_ref, cos_ref, sin_ref, length_ref, q_ref) = refs[: len(kept)], refs[len(kept) :]
        row, head, chunk = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("chunk")
        first = chunk * CHUNK
        tokens, slots = pl.ds(first, CHUNK), pl.ds(length_ref[row] + first, CHUNK)
        low, high = pl.ds(0, half), pl.ds(half, half)
        cos, sin = (loaded(ref.at[row, tokens], layout, interpret) for ref in (cos_ref, sin_ref))

        def halves(part: int) -> list[jax.Array]:
            refs = (qkv_ref.at[row, tokens, head, part, at] for at in (low, high))
            return [loaded(ref, layout, interpret).astype(jnp.float32) for ref in refs]

        def rotated(part: int) -> list[jax.Array]:
            a, b = halves(part)
            return [(a * cos - b * sin).astype(dtype), (b * cos + a * sin).astype(dtype)]

        for group in range(groups):
            for at, x in zip((low, high), rotated(group), strict=True):
                _store(q_ref.at[row, head, group, tokens, at], x)
        for which, new in enumerate((rotated(groups), halves(groups + 1))):
            if not narrow:
                for at, x in zip((low, high), new, strict=True):
                    _store(caches[which].at[row, head, slots, at], x.astype(dtype))
                continue
            # The int8 codes of `quantization.narrow_rows`.
            wide = [x.astype(jnp.float32) for x in new]
            scale = jnp.maximum(*(jnp.abs(x).max(axis=1) for x in wide)) / 127.0
            unit = jnp.where(scale == 0.0, 1.0, scale)
            for at, x in zip((low, high), wide, strict=True):
                x = x / laid(lax.broadcast_in_dim(unit, x.shape, [0]), layout, interpret) + _ROUNDING
                x = lax.optimization_barrier(x) if interpret else x  # XLA would drop the sum and the difference
                codes = jnp.clip(x - _ROUNDING, -127.0, 127.0).astype(jnp.int8)
                _store(caches[which].at[row, head, slots, at], codes)
            _store(caches[2 + which].at[row, head, slots], scale)

    refs = [jax.new_ref(array, memory_space=plgpu.GMEM) for array in kept]
    mesh = plgpu.Mesh(
        grid=(w // CHUNK, heads, b), grid_names=("chunk", "head", "row"), num_threads=1, thread_name="group"
    )
    kernel = pl.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((b, heads, groups, w, width), dtype),
        mesh=mesh,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )
    q = kernel(*refs, qkv_bwkph, *rotations, length)
    new = [jax.freeze(ref) for ref in refs]
    keys, values, *scales = (*new, *(None for _ in cache[len(new) :]))
    return jnp.transpose(q, (0, 3, 1, 2, 4)), (keys, values, *scales)


def interpreter(interpret: Any) -> Any:
    """Parameters of Pallas' interpreter, or False."""
    if interpret is not True:
        return interpret
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # public since JAX 0.11 only

    return InterpretGPUParams()


def laid(x: jax.Array, layout: Any, interpret: Any) -> jax.Array:
    return x if interpret else plgpu.layout_cast(x, layout)


def loaded(ref: Any, layout: Any, interpret: Any) -> jax.Array:
    if interpret:
        return ref[...]
    index = ((),) if jax.__version_info__ < (0, 11) else ()  # JAX 0.10 demands an index
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def _store(ref: Any, x: jax.Array) -> None:
    if hasattr(plgpu, "store"):  # JAX 0.12 wants to be told that half a line of memory may be written
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x

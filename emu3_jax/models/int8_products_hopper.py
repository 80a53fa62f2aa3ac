"""A Pallas (Mosaic GPU) kernel for NVIDIA Hopper: products of a few tokens with int8 codes.

XLA converts int8 codes to bfloat16 before a product of more than a few tokens, which costs as much again as reading
them. Here the codes are converted in registers, on their way to the matrix unit: y^T = codes x^T, with the codes as the
operand in registers and the tokens as the columns.

A program takes some outputs and a part of the inputs. One of its warpgroups copies blocks of codes and tokens to shared
memory, and the others compute. XLA then sums the parts, together with what follows.

M tokens, N outputs, K inputs, P parts.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from emu3_jax.models.window_writes_hopper import interpreter, laid, loaded

MOST_TOKENS = 128
_TILE = 64  # outputs of one matrix instruction
_BLOCK = 128  # bytes of a row of shared memory that a copy can swizzle
_SHARED_BYTES = 221 * 1024  # shared memory of a multiprocessor on Hopper (228 KiB), less barriers


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of `products`. Zeros are replaced by `resolve`.

    Attributes:
        groups: number of warpgroups of a program that take different outputs.
        splits: number of warpgroups of a program that share a sum: they take different blocks.
        tiles: number of tiles of 64 outputs of a warpgroup.
        block: number of inputs of a block, a multiple of 128.
        stages: number of blocks that shared memory holds.
        parts: number of programs that share a sum.
        cluster: number of neighbouring programs that copy the tokens together, for each other.
        residents: number of programs that a multiprocessor holds at once.
    """

    groups: int = 4
    splits: int = 1
    tiles: int = 1
    block: int = 128
    stages: int = 0
    parts: int = 0
    cluster: int = 1
    residents: int = 1
    rows_first: bool = True

    def resolve(self, tokens: int, outputs: int, inputs: int) -> "Sizes":
        """The same sizes with zeros replaced by good ones for these shapes."""
        rows = self.groups * self.tiles * _TILE
        steps = inputs // self.block
        programs = outputs // rows
        # As many programs as fit at once.
        parts = self.parts or max(1, min(steps, self.residents * 132 // programs))
        budget = _SHARED_BYTES // self.residents - (self.splits - 1) * rows * tokens * 4
        stages = self.stages or min(8, budget // (self.block * (rows + 2 * tokens)))
        # A warpgroup counts the phases of the barriers that it waits for, so a stage must always serve the same one.
        stages = max(1, stages // self.splits) * self.splits
        return dataclasses.replace(self, parts=parts, stages=stages)


@functools.partial(jax.jit, static_argnames=("sizes", "interpret"))
def partial_products(
    x_mk: jax.Array, codes_nk: jax.Array, *, sizes: Sizes | None = None, interpret: Any = False
) -> jax.Array:
    """Parts of the products of tokens with codes: their sum is codes x^T.

    Args:
        x_mk: bfloat16 [M, K] with M a multiple of 32, at most `MOST_TOKENS`.
        codes_nk: int8 [N, K].
        sizes: sizes of the kernel, for tests and measurements.
        interpret: run the kernel in Pallas' interpreter of GPU kernels, for tests; True or its parameters.

    Returns:
        float32 [P, N, M].
    """
    interpret = interpreter(interpret)
    (m, k), n = x_mk.shape, codes_nk.shape[0]
    sizes = (sizes or Sizes()).resolve(m, n, k)
    groups, tiles, block, stages, parts = sizes.groups, sizes.tiles, sizes.block, sizes.stages, sizes.parts
    cluster, splits = sizes.cluster, sizes.splits
    rows = groups * tiles * _TILE
    steps = k // block
    dtype = x_mk.dtype
    fewest, rest = divmod(steps, parts)
    together: dict[str, Any] = {"collective_axes": "neighbour"} if cluster > 1 else {}
    free = {"num_arrivals": groups, "num_barriers": stages}

    def kernel(x_ref: Any, codes_ref: Any, out_ref: Any, *scratch: Any) -> None:
        codes_smem, x_smem, sum_smem, ready, free, summed = scratch
        part, tile, group = lax.axis_index("part"), lax.axis_index("tile"), lax.axis_index("group")
        if cluster > 1:
            tile = tile * cluster + lax.axis_index("neighbour")
        first = part * fewest + jnp.minimum(part, rest)
        count = fewest + jnp.where(part < rest, 1, 0)

        @pl.when(group < groups * splits)
        def _compute() -> None:
            row_group, split = lax.rem(group, jnp.int32(groups)), lax.div(group, jnp.int32(groups))
            here = row_group * (tiles * _TILE)

            def add(index: jax.Array, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                stage = lax.rem(index * splits + split, jnp.int32(stages))
                plgpu.barrier_wait(ready.at[stage])
                new = []
                for which, total in enumerate(totals):
                    at = pl.ds(here + which * _TILE, _TILE)
                    codes = loaded(codes_smem.at[stage, at], plgpu.Layout.WGMMA_UPCAST_2X, interpret)
                    codes = laid(codes, plgpu.Layout.WGMMA, interpret).astype(dtype)
                    tokens = x_smem.at[stage]
                    if interpret:
                        wide = (z.astype(jnp.float32) for z in (codes, tokens[...].T))
                        new.append(total + jnp.dot(*wide, precision=lax.Precision.HIGHEST))
                        continue
                    tokens = _transposed(tokens)
                    new.append(pl.run_state(lambda acc: plgpu.wgmma(acc, codes, tokens))(plgpu.ACC.init(total)))
                if interpret:
                    plgpu.commit_smem()
                plgpu.barrier_arrive(free.at[stage])
                return tuple(new)

            zero = laid(jnp.full((_TILE, m), 0, jnp.float32), plgpu.Layout.WGMMA, interpret)
            share = lax.div(jnp.maximum(count - split, 0) + (splits - 1), jnp.int32(splits))
            totals = lax.fori_loop(0, share, add, (zero,) * tiles)

            for other in range(1, splits):

                @pl.when(split == other)
                def _give(other: int = other) -> None:
                    for which, total in enumerate(totals):
                        sum_smem.at[other - 1, row_group, which][...] = total
                    plgpu.barrier_arrive(summed.at[(other - 1) * groups + row_group])

            @pl.when(split == 0)
            def _finish() -> None:
                for other in range(1, splits):
                    plgpu.barrier_wait(summed.at[(other - 1) * groups + row_group])
                for which, total in enumerate(totals):
                    for other in range(1, splits):
                        total += loaded(sum_smem.at[other - 1, row_group, which], plgpu.Layout.WGMMA, interpret)
                    at = pl.ds(tile * rows + here + which * _TILE, _TILE)
                    if not sizes.rows_first:
                        _store(out_ref.at[part, at], total)
                    elif interpret:
                        out_ref[part, :, at] = total.T
                    else:
                        _store(_transposed(out_ref.at[part, :, at]), plgpu.layout_cast(total, _single()))

        @pl.when(group == groups * splits)
        def _copy() -> None:
            def copy(step: jax.Array, _: None, *, fill: bool, wait: bool) -> None:
                stage = lax.rem(step, jnp.int32(stages))
                if wait:
                    plgpu.barrier_wait(free.at[stage])
                if fill:
                    columns = pl.ds((first + step) * block, block)
                    here = pl.ds(tile * rows, rows)
                    plgpu.copy_gmem_to_smem(codes_ref.at[here, columns], codes_smem.at[stage], ready.at[stage])
                    plgpu.copy_gmem_to_smem(x_ref.at[:, columns], x_smem.at[stage], ready.at[stage], **together)

            lax.fori_loop(0, jnp.minimum(count, stages), functools.partial(copy, fill=True, wait=False), None)
            lax.fori_loop(stages, count, functools.partial(copy, fill=True, wait=True), None)
            # The last blocks. The interpreter demands that every phase of a barrier is waited for.
            last_blocks = jnp.maximum(count - stages, 0)
            lax.fori_loop(last_blocks, count, functools.partial(copy, fill=False, wait=True), None)

    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((parts, m, n) if sizes.rows_first else (parts, n, m), jnp.float32),
        scratch_types=(
            _tiled((stages, rows, block), jnp.int8),
            _tiled((stages, m, block), dtype),
            _tiled((splits - 1, groups, tiles, _TILE, m), jnp.float32) if splits > 1 else (),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.ClusterBarrier(collective_axes=("neighbour",), **free) if cluster > 1 else plgpu.Barrier(**free),
            plgpu.Barrier(num_barriers=(splits - 1) * groups) if splits > 1 else (),
        ),
        grid=(parts, n // rows // cluster),
        grid_names=("part", "tile"),
        **({"cluster": (cluster,), "cluster_names": ("neighbour",)} if cluster > 1 else {}),
        num_threads=groups * splits + 1,
        thread_name="group",
        # `Lane` is the semantics that all supported versions of JAX have.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )
    return call(x_mk, codes_nk)


def products(
    x_mk: jax.Array, codes_nk: jax.Array, scales_n: jax.Array, *, sizes: Sizes | None = None, interpret: Any = False
) -> jax.Array:
    parts = partial_products(x_mk, codes_nk, sizes=sizes, interpret=interpret)
    total = functools.reduce(jnp.add, [parts[part] for part in range(parts.shape[0])])
    if sizes is None or sizes.rows_first:
        return (total * scales_n[None]).astype(x_mk.dtype)
    return (total * scales_n[:, None]).T.astype(x_mk.dtype)


def _single() -> Any:
    """The layout of the matrix unit's results, but in single numbers, so that they can be stored transposed."""
    tiling = plgpu.Tiling(((64, 8), (16, 8), (8, 8), (2,), (1,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-8,), lane_dims=(-4, -3), vector_dim=-1)


def _tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory in the layout that the matrix instruction reads."""
    columns = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128)))


def _transposed(ref: Any) -> Any:
    return ref.transpose((1, 0)) if hasattr(plgpu, "InterpretGPUParams") else plgpu.transpose_ref(ref, (1, 0))


def _store(ref: Any, x: jax.Array) -> None:
    if hasattr(plgpu, "store"):  # JAX 0.12 wants to be told that half a line of memory may be written
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x

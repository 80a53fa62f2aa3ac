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
import math
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
_TOKENS = 32  # the numbers of tokens that the kernel takes are multiples of this
_MULTIPROCESSORS = 132  # of an H100 and of an H200
_SHARED_BYTES = 221 * 1024  # shared memory of a multiprocessor on Hopper (228 KiB), less barriers


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of `products`. Zeros are replaced by `resolve`.

    Attributes:
        groups: number of warpgroups of a program that take different outputs.
        splits: number of warpgroups of a program that share a sum: they take different blocks.
        block: number of inputs of a block, a multiple of 128.
        stages: number of blocks that shared memory holds.
        parts: number of programs that share a sum.
    """

    groups: int = 0
    splits: int = 0
    block: int = 128
    stages: int = 0
    parts: int = 0

    def resolve(self, tokens: int, outputs: int, inputs: int) -> "Sizes":
        """The same sizes with zeros replaced by good ones for these shapes."""
        # Of more tokens, the results of four groups do not fit in the registers.
        options = [self.groups] if self.groups else [4, 2] if tokens <= 2 * _TOKENS else [2]
        sizes = min((self._placed(groups, outputs, inputs) for groups in options), key=lambda option: option[0])[1]
        rows = sizes.groups * _TILE
        # Two warpgroups of a program hide each other's waiting.
        splits = self.splits or (2 if sizes.groups == 2 and tokens <= _TOKENS else 1)
        budget = _SHARED_BYTES - (splits - 1) * rows * tokens * 4
        stages = self.stages or min(8, budget // (self.block * (rows + 2 * tokens)))
        # A warpgroup counts the phases of the barriers that it waits for, so a stage must always serve the same one.
        return dataclasses.replace(sizes, splits=splits, stages=max(1, stages // splits) * splits)

    def _placed(self, groups: int, outputs: int, inputs: int) -> tuple[tuple[float, ...], "Sizes"]:
        """These sizes with a number of groups, and how bad it is: idle multiprocessors, rounds of programs, parts."""
        rows = groups * _TILE
        programs, rest = divmod(outputs, rows)
        if rest:
            return (math.inf,), self
        parts = self.parts or max(1, min(inputs // self.block, _MULTIPROCESSORS // programs))
        rounds = -(-programs * parts // _MULTIPROCESSORS)
        sizes = dataclasses.replace(self, groups=groups, parts=parts)
        return (1 - programs * parts / (rounds * _MULTIPROCESSORS), rounds, parts), sizes


@functools.partial(jax.jit, static_argnames=("sizes", "interpret"))
def partial_products(
    x_mk: jax.Array, codes_nk: jax.Array, *, sizes: Sizes | None = None, interpret: Any = False
) -> jax.Array:
    """Parts of the products of tokens with codes: their sum is x codes^T.

    Args:
        x_mk: bfloat16 [M, K] with M a multiple of 32, at most `MOST_TOKENS`.
        codes_nk: int8 [N, K].
        sizes: sizes of the kernel, for tests and measurements.
        interpret: run the kernel in Pallas' interpreter of GPU kernels, for tests; True or its parameters.

    Returns:
        float32 [P, M, N].
    """
    interpret = interpreter(interpret)
    (m, k), n = x_mk.shape, codes_nk.shape[0]
    sizes = (sizes or Sizes()).resolve(m, n, k)
    groups, splits, block, stages, parts = sizes.groups, sizes.splits, sizes.block, sizes.stages, sizes.parts
    rows = groups * _TILE
    steps = k // block
    dtype = x_mk.dtype
    fewest, rest = divmod(steps, parts)

    def kernel(x_ref: Any, codes_ref: Any, out_ref: Any, *scratch: Any) -> None:
        codes_smem, x_smem, sum_smem, ready, free, summed = scratch
        part, tile, group = lax.axis_index("part"), lax.axis_index("tile"), lax.axis_index("group")
        first = part * fewest + jnp.minimum(part, rest)
        count = fewest + jnp.where(part < rest, 1, 0)

        @pl.when(group < groups * splits)
        def _compute() -> None:
            row_group, split = lax.rem(group, jnp.int32(groups)), lax.div(group, jnp.int32(groups))
            here = pl.ds(row_group * _TILE, _TILE)

            def add(index: jax.Array, total: jax.Array) -> jax.Array:
                stage = lax.rem(index * splits + split, jnp.int32(stages))
                plgpu.barrier_wait(ready.at[stage])
                codes = loaded(codes_smem.at[stage, here], plgpu.Layout.WGMMA_UPCAST_2X, interpret)
                codes = laid(codes, plgpu.Layout.WGMMA, interpret).astype(dtype)
                tokens = x_smem.at[stage]
                if interpret:  # the interpreter has no matrix instruction with an operand in registers
                    wide = (array.astype(jnp.float32) for array in (codes, tokens[...].T))
                    total += jnp.dot(*wide, precision=lax.Precision.HIGHEST)
                    plgpu.commit_smem()  # orders this read before the next copy; the matrix instruction needs none
                else:
                    multiplied = pl.run_state(lambda acc: plgpu.wgmma(acc, codes, _transposed(tokens)))
                    total = multiplied(plgpu.ACC.init(total))
                plgpu.barrier_arrive(free.at[stage])
                return total

            total = laid(jnp.full((_TILE, m), 0, jnp.float32), plgpu.Layout.WGMMA, interpret)
            share = lax.div(jnp.maximum(count - split, 0) + (splits - 1), jnp.int32(splits))
            total = lax.fori_loop(0, share, add, total)

            for other in range(1, splits):

                @pl.when(split == other)
                def _give(other: int = other) -> None:
                    sum_smem.at[other - 1, row_group][...] = total
                    plgpu.barrier_arrive(summed.at[(other - 1) * groups + row_group])

            @pl.when(split == 0)
            def _finish() -> None:
                whole = total
                for other in range(1, splits):
                    plgpu.barrier_wait(summed.at[(other - 1) * groups + row_group])
                    whole += loaded(sum_smem.at[other - 1, row_group], plgpu.Layout.WGMMA, interpret)
                at = pl.ds(tile * rows + row_group * _TILE, _TILE)
                if interpret:
                    out_ref[part, :, at] = whole.T
                else:
                    _store(_transposed(out_ref.at[part, :, at]), plgpu.layout_cast(whole, _single()))

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
                    plgpu.copy_gmem_to_smem(x_ref.at[:, columns], x_smem.at[stage], ready.at[stage])

            lax.fori_loop(0, jnp.minimum(count, stages), functools.partial(copy, fill=True, wait=False), None)
            lax.fori_loop(stages, count, functools.partial(copy, fill=True, wait=True), None)
            # The last blocks. The interpreter demands that every phase of a barrier is waited for.
            last_blocks = jnp.maximum(count - stages, 0)
            lax.fori_loop(last_blocks, count, functools.partial(copy, fill=False, wait=True), None)

    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((parts, m, n), jnp.float32),
        scratch_types=(
            _tiled((stages, rows, block), jnp.int8),
            _tiled((stages, m, block), dtype),
            _tiled((splits - 1, groups, _TILE, m), jnp.float32) if splits > 1 else (),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            plgpu.Barrier(num_barriers=(splits - 1) * groups) if splits > 1 else (),
        ),
        grid=(parts, n // rows),
        grid_names=("part", "tile"),
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
    """Products of tokens with int8 codes and their scales.

    Args:
        x_mk: bfloat16 [M, K], M at most `MOST_TOKENS`, K a multiple of 128.
        codes_nk: int8 [N, K], N a multiple of 128.
        scales_n: float32 [N].
        sizes: sizes of the kernel, for tests and measurements.
        interpret: run the kernel in Pallas' interpreter of GPU kernels, for tests; True or its parameters.

    Returns:
        float32 [M, N].
    """
    m = x_mk.shape[0]
    padded = jnp.pad(x_mk, ((0, -m % _TOKENS), (0, 0)))
    parts = partial_products(padded, codes_nk, sizes=sizes, interpret=interpret)
    # Separate sums, because XLA fuses them into one kernel; it makes several kernels of reductions.
    total = functools.reduce(jnp.add, [parts[part] for part in range(parts.shape[0])])
    return total[:m] * scales_n[None]


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

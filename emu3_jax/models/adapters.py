"""Low-rank adapters beside the decoder's frozen matrices (LoRA, arXiv 2106.09685); with quantised matrices, QLoRA.

We do not use `qwix`: its quantised weights cannot be reshaped before a product, as `out` is, and it cannot merge
adapters into the weights.

R is the rank. A matrix M of shape [in..., out...] has the adapters `M_a` [in..., R] and `M_b` [R, out...], with the
logical axes of M and "rank". A quantised M is stored as codes `M_q` and scales `M_scale`. A scale is the largest
magnitude in a block of weights. Blocks run along an axis that `fsdp` and `sequence` never split: H of `qkv` and `out`,
F of `gate_up` and `down`. `tensor` splits F, so its size must also divide the number of blocks (F / 64; 224 in the
published models).
"""

import dataclasses
import itertools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from emu3_jax.errors import Emu3Error
from emu3_jax.fields import check_counts, check_field, check_positive_number
from emu3_jax.models.attention import matmul_precision
from emu3_jax.models.products import multiply

Shape = tuple[int, ...]

PROJECTION = "projection"  # checkpoint name of `project`'s result, for remat policies

BLOCK = 64  # weights per scale, as in QLoRA; fewer if 64 does not divide the axis

# The 4-bit NormalFloat of QLoRA (arXiv 2305.14314, appendix E): quantiles of the normal distribution, including 0.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Matrix:
    """The roles of a matrix's axes. A leading layer axis is not counted.

    Attributes:
        inputs: number of input axes (the first axes), which a product contracts.
        outputs: number of output axes.
        block_axis: index, counted from the end, of the axis along which blocks of a quantised matrix run.
    """

    inputs: int
    outputs: int
    block_axis: int


MATRICES = {"qkv": Matrix(1, 3, -1), "out": Matrix(3, 1, -2), "gate_up": Matrix(1, 2, -1), "down": Matrix(1, 1, -2)}
BASES = ("float32", "bfloat16", "int8", "nf4")
QUANTISED = ("int8", "nf4")
MAX_RANK, MAX_ALPHA = 1 << 16, 1_000_000  # the same limits for training and for reading adapters from files


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Settings of low-rank adapters: which matrices get one, and how the frozen weights are stored.

    Attributes:
        rank: rank R of the adapters. The fused matrices `qkv` and `gate_up` have one adapter each.
        alpha: the product of an adapter is multiplied by alpha / rank.
        targets: matrices that get adapters in every layer, from "qkv", "out", "gate_up" and "down".
        base: storage of the frozen weights: "float32", "bfloat16", "int8" or "nf4". "int8" and "nf4" quantise the
            layers' matrices, with a float32 scale per block; tables and norms are then bfloat16.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = tuple(MATRICES)
    base: str = "bfloat16"

    def __post_init__(self) -> None:
        check_counts(self, rank=MAX_RANK)
        check_positive_number(self, "alpha")
        check_field(self, "alpha", self.alpha <= MAX_ALPHA, f"at most {MAX_ALPHA:,}")
        names = isinstance(self.targets, tuple) and all(isinstance(name, str) for name in self.targets)
        distinct = names and self.targets and len(set(self.targets)) == len(self.targets)
        some = distinct and set(self.targets) <= set(MATRICES)
        check_field(self, "targets", some, f"a tuple of some of {', '.join(MATRICES)}")
        check_field(self, "base", self.base in BASES, f"one of {', '.join(BASES)}")

    @property
    def scale(self) -> float:
        """The factor on the product of an adapter: alpha / rank."""
        return self.alpha / self.rank

    @property
    def quantised(self) -> bool:
        """Whether the frozen matrices are quantised."""
        return self.base in QUANTISED

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of frozen weights that are not quantised."""
        return base_dtype(self.base)


def base_dtype(base: str) -> jnp.dtype:
    """The dtype of frozen weights that `base` (from `BASES`) does not quantise."""
    return jnp.dtype(jnp.float32 if base == "float32" else jnp.bfloat16)


def weight_dtype(adapter: Adapter | None) -> jnp.dtype:
    """The dtype of weights that are not quantised: float32 without an adapter, else `adapter.dtype`."""
    return jnp.dtype(jnp.float32) if adapter is None else adapter.dtype


# ------------------------------------------------------------------------------------------------ in a layer


def project(
    module: nn.Module,
    adapter: Adapter | None,
    equation: str,
    x_bsi: jax.Array,
    *,
    name: str,
    shape: Shape,
    axes: tuple[str | None, ...],
    kernels: str = "xla",
) -> jax.Array:
    """Declares the matrix `name` and its adapter in `module`, and multiplies `x_bsi` with them.

    No gradient flows to a quantised matrix.

    Args:
        module: the layer. Call this from its compact `__call__`.
        adapter: settings of the adapters, or None for a plain float32 matrix.
        equation: einsum equation of x and the matrix, with all input axes of the matrix as one axis.
        x_bsi: [B, S, I], where I is the product of the matrix's input axes.
        name: name of the matrix, from `MATRICES`.
        shape: shape of the matrix, input axes first.
        axes: logical axes of the matrix.
        kernels: implementation of the product with codes, see `products.choose_products`.

    Returns:
        [B, S, out...] in the dtype of `x_bsi`.
    """
    inputs = MATRICES[name].inputs
    fan_in, outputs = math.prod(shape[:inputs]), shape[inputs:]
    precision = matmul_precision(x_bsi.dtype)

    def declare(leaf: str, init: Any, shape: Shape, axes: tuple[str | None, ...], dtype: jnp.dtype) -> jax.Array:
        return module.param(leaf, nn.with_logical_partitioning(init, axes), shape, dtype)

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.einsum(equation, x, w.reshape(fan_in, *outputs).astype(x.dtype), precision=precision)

    random = nn.initializers.normal(fan_in**-0.5)
    if module.has_variable("params", f"{name}_codes"):  # see `models.quantization`
        codes, scales = (module.get_variable("params", f"{name}_{leaf}") for leaf in ("codes", "scales"))
        return multiply(x_bsi, codes, scales, kernels).astype(x_bsi.dtype)
    if adapter is None or not adapter.quantised:
        y = product(x_bsi, declare(name, random, shape, axes, weight_dtype(adapter)))
        if adapter is None:
            return checkpoint_name(y, PROJECTION)
    else:
        codes_shape, scale_shape, codes_dtype = quantised_shapes(name, shape, adapter.base)
        codes = declare(f"{name}_q", nn.initializers.zeros, codes_shape, axes, codes_dtype)
        scale = declare(f"{name}_scale", nn.initializers.zeros, scale_shape, axes, jnp.float32)

        # Without this checkpoint, the backward pass would keep every layer's dequantised weights.
        @jax.checkpoint
        def quantised_product(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
            return product(x, dequantise_matrix(name, codes, scale, adapter.base, x.dtype))

        y = quantised_product(x_bsi, codes, scale)
    if name not in adapter.targets:
        return checkpoint_name(y, PROJECTION)
    a = declare(f"{name}_a", random, (*shape[:inputs], adapter.rank), (*axes[:inputs], "rank"), jnp.float32)
    b = declare(f"{name}_b", nn.initializers.zeros, (adapter.rank, *outputs), ("rank", *axes[inputs:]), jnp.float32)
    a = a.astype(x_bsi.dtype).reshape(fan_in, adapter.rank)
    low = jnp.einsum("bsi,ir->bsr", x_bsi, a, precision=precision) * adapter.scale
    return checkpoint_name(
        y + jnp.einsum("bsr,r...->bs...", low, b.astype(x_bsi.dtype), precision=precision), PROJECTION
    )


# ------------------------------------------------------------------------------------------------ quantisation


def quantised_shapes(name: str, shape: Shape, base: str) -> tuple[Shape, Shape, jnp.dtype]:
    """Shapes of the codes and the scales of a quantised matrix, and the dtype of the codes (nf4: two codes per byte).

    Raises:
        Emu3Error: the block axis has odd size, so nf4 cannot pack it.
    """
    axis = len(shape) + MATRICES[name].block_axis
    size = shape[axis]
    block = math.gcd(size, BLOCK)
    if base == "nf4" and block % 2:
        raise Emu3Error(f"{name} has size {size} along axis {axis}, but nf4 needs an even size: choose base int8")

    def resized(new: int) -> Shape:
        return (*shape[:axis], new, *shape[axis + 1 :])

    if base == "nf4":
        return resized(size // 2), resized(size // block), jnp.dtype(jnp.uint8)
    return shape, resized(size // block), jnp.dtype(jnp.int8)


def quantise_matrix(name: str, matrix: jax.Array, base: str) -> tuple[jax.Array, jax.Array]:
    """Quantises a matrix in blocks. Each weight is rounded to the nearest representable value.

    Args:
        name: name of the matrix, from `MATRICES`.
        matrix: [(layers,) in..., out...].
        base: "int8" (multiples of scale / 127) or "nf4" (multiples `NF4` of the scale).

    Returns:
        The codes and the float32 scales, with the shapes of `quantised_shapes`.
    """
    codes_shape, scale_shape, dtype = quantised_shapes(name, matrix.shape, base)
    axis = matrix.ndim + MATRICES[name].block_axis
    blocks = _blocks(matrix.astype(jnp.float32), axis, scale_shape[axis])
    scale = jnp.abs(blocks).max(axis=axis + 1, keepdims=True)
    unit = blocks / jnp.where(scale == 0, 1.0, scale)
    if base == "int8":
        codes = jnp.round(unit * 127).astype(dtype)
    else:
        codes = sum((unit > (low + high) / 2).astype(dtype) for low, high in itertools.pairwise(NF4))
        # Byte i of a block packs code i of its first half and code i of its second half. So unpacking concatenates
        # two contiguous halves, and never needs data of another device.
        first, second = jnp.split(codes, 2, axis=axis + 1)
        codes = first | (second << 4)
    return codes.reshape(codes_shape), scale.reshape(scale_shape)


def dequantise_matrix(name: str, codes: jax.Array, scale: jax.Array, base: str, dtype: Any = jnp.float32) -> jax.Array:
    """Restores a matrix from the results of `quantise_matrix`: computed in float32, then cast to `dtype`."""
    axis = codes.ndim + MATRICES[name].block_axis
    blocks = _blocks(codes, axis, scale.shape[axis])
    if base == "int8":
        unit = blocks.astype(jnp.float32) / 127
    else:
        unit = _nf4_value(jnp.concatenate([blocks & 15, blocks >> 4], axis=axis + 1))
    weights = (unit * jnp.expand_dims(scale, axis + 1)).astype(dtype)
    return weights.reshape(*codes.shape[:axis], -1, *codes.shape[axis + 1 :])


def _blocks(x: jax.Array, axis: int, count: int) -> jax.Array:
    return x.reshape(*x.shape[:axis], count, x.shape[axis] // count, *x.shape[axis + 1 :])


def _nf4_value(codes: jax.Array) -> jax.Array:
    """Looks up nf4 values with a tree of selects. Every backend fuses it into the product; gathers are slow on TPUs."""
    level = [jnp.float32(value) for value in NF4]
    for bit in range(4):
        high = (codes >> bit) & 1 == 1
        level = [jnp.where(high, b, a) for a, b in zip(level[::2], level[1::2], strict=True)]
    return level[0]

"""Products of tokens with the codes of quantised matrices (`models.quantization`), and the choice of their kernel.

B batch, S sequence, I inputs of a matrix.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from emu3_jax.models import capability
from emu3_jax.models.attention import matmul_precision

# Numbers of tokens for which the kernel for Hopper is chosen. XLA multiplies fewer without converting the codes first,
# and for more the product itself takes the time.
_TOKENS = range(16, 65)
_MULTIPLE = 128  # of inputs and outputs, for the kernel


def choose_products(kernels: str, rows: int, window: int, inputs: int, outputs: int, x: DTypeLike, w: DTypeLike) -> str:
    """Chooses an implementation of a product with codes.

    XLA converts int8 codes to bfloat16 before a product of more than a few tokens. On NVIDIA Hopper a kernel does it
    on the way to the matrix unit. It is not chosen on a mesh of several devices, nor for one token per row.

    Args:
        kernels: one of `attention.KERNELS`. For "auto" and the kernels for NVIDIA GPUs the fastest one is chosen.
        rows: batch size B.
        window: number of tokens per row.
        inputs: number of inputs of the matrix.
        outputs: number of outputs of the matrix.
        x: dtype of the tokens.
        w: dtype of the codes.

    Returns:
        "xla", "pallas-hopper" or "pallas-hopper-interpreted".
    """
    suits = jnp.dtype(x) == jnp.bfloat16 and jnp.dtype(w) == jnp.int8 and inputs % _MULTIPLE == outputs % _MULTIPLE == 0
    suits &= window > 1 and rows * window in _TOKENS and jax.sharding.get_abstract_mesh().size <= 1
    if suits and kernels == "pallas-hopper-interpreted":
        return kernels
    if not suits or kernels not in ("auto", "pallas", "pallas-hopper") or capability.target_platform() != "gpu":
        return "xla"
    return "pallas-hopper" if capability.cuda_capability() == capability.HOPPER else "xla"


def multiply(x_bsi: jax.Array, codes: jax.Array, scales: jax.Array, kernels: str = "xla") -> jax.Array:
    """Multiplies tokens with a quantised matrix.

    Args:
        x_bsi: [B, S, I].
        codes: [out..., in...], where I is the product of the input axes.
        scales: float32 [out...].
        kernels: one of `attention.KERNELS`, see `choose_products`.

    Returns:
        float32 [B, S, out...].
    """
    b, s, inputs = x_bsi.shape
    outputs = scales.shape
    count = math.prod(outputs)
    chosen = choose_products(kernels, b, s, inputs, count, x_bsi.dtype, codes.dtype)
    if chosen != "xla":
        from emu3_jax.models.int8_products_hopper import products  # only here, because Pallas takes long to import

        flat = codes.reshape(count, inputs), scales.reshape(count)
        y = products(x_bsi.reshape(b * s, inputs), *flat, interpret=chosen.endswith("-interpreted"))
        return y.reshape(b, s, *outputs)
    w = codes.reshape(*outputs, inputs).astype(x_bsi.dtype)
    contracted = (((2,), (len(outputs),)), ((), ()))
    precision = matmul_precision(x_bsi.dtype)
    y = jax.lax.dot_general(x_bsi, w, contracted, precision=precision, preferred_element_type=jnp.float32)
    return y * scales[None, None]

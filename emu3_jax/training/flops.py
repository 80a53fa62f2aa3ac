"""Floating-point operations of a training step, and what a chip can do: together they make the MFU.

Model FLOPs as in PaLM, arXiv 2204.02311, appendix B: what forward and backward need, without recomputation, padding or
the lookup in the embedding table.
"""

import math

from emu3_jax.config import DecoderConfig

# Dense bfloat16 FLOP/s of one device, from the vendors' data sheets, by the beginning of JAX's `device_kind`.
PEAKS = {
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5p": 459e12, "TPU v5": 459e12,
    "TPU v6": 918e12, "NVIDIA A100": 312e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA B200": 2250e12,
}  # fmt: skip


def matrix_weights(decoder: DecoderConfig) -> int:
    """Weights that each token is multiplied with: the layers' matrices and the head."""
    d, f, h = decoder.hidden_size, decoder.intermediate_size, decoder.head_dim
    heads = 2 * decoder.num_heads + 2 * decoder.num_kv_heads
    return decoder.num_layers * (d * heads * h + 3 * d * f) + decoder.vocab_size * d


def step_flops(decoder: DecoderConfig, tokens: float, attended: float, frozen: bool = False) -> float:
    """Model FLOPs of a step.

    Args:
        decoder: shapes.
        tokens: tokens without padding.
        attended: the keys that they see, summed over all tokens (S * (S + 1) / 2 for one sequence of S).
        frozen: no gradients of the matrices are computed; the adapters beside them are not counted.
    """
    per_pair = 12 * decoder.num_layers * decoder.num_heads * decoder.head_dim
    return (4 if frozen else 6) * matrix_weights(decoder) * tokens + per_pair * attended


def peak_flops(device_kind: str) -> float:
    """FLOP/s of a device of this kind; NaN where it is not known."""
    matches = [name for name in PEAKS if device_kind.startswith(name)]
    return PEAKS[max(matches, key=len)] if matches else math.nan

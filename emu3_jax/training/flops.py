"""FLOPs of a training step and peak FLOP/s of chips, from which training reports model FLOPs utilisation (MFU).

Model FLOPs are counted as in PaLM (arXiv 2204.02311, appendix B). They cover the forward and the backward pass, but
not recomputation, padding or the lookup in the embedding table.
"""

import math

from emu3_jax.config import DecoderConfig

# Peak dense bfloat16 FLOP/s of one device, from the vendors' data sheets. Keys are prefixes of JAX's `device_kind`.
PEAKS = {
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5p": 459e12, "TPU v5": 459e12,
    "TPU v6": 918e12, "NVIDIA A100": 312e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA B200": 2250e12,
}  # fmt: skip


def matrix_weights(decoder: DecoderConfig) -> int:
    """The number of weights in the layers' matrices and the head: each token is multiplied with all of them."""
    d, f, h = decoder.hidden_size, decoder.intermediate_size, decoder.head_dim
    heads = 2 * decoder.num_heads + 2 * decoder.num_kv_heads
    return decoder.num_layers * (d * heads * h + 3 * d * f) + decoder.vocab_size * d


def step_flops(
    decoder: DecoderConfig, tokens: float, attended: float, frozen: bool = False, visual_only: bool = False
) -> float:
    """Model FLOPs of a training step. A forward pass alone takes a third of those of a step without `frozen`.

    Args:
        decoder: config of the decoder.
        tokens: number of tokens, without padding.
        attended: number of keys that a token attends to, summed over all tokens (S * (S + 1) / 2 for one sequence of
            S tokens).
        frozen: whether the matrices are frozen, so that no gradients of them are computed. FLOPs of adapters are not
            counted.
        visual_only: whether the head computes only the logits of visual tokens.
    """
    weights = matrix_weights(decoder)
    if visual_only:
        weights -= (decoder.vocab_size - decoder.tokens.visual_count) * decoder.hidden_size
    per_pair = 12 * decoder.num_layers * decoder.num_heads * decoder.head_dim
    return (4 if frozen else 6) * weights * tokens + per_pair * attended


def peak_flops(device_kind: str) -> float:
    """Peak bfloat16 FLOP/s of one device of this kind, or NaN for an unknown kind."""
    matches = [name for name in PEAKS if device_kind.startswith(name)]
    return PEAKS[max(matches, key=len)] if matches else math.nan

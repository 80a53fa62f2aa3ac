"""Fused attention of whole sequences: Splash on TPUs, cuDNN on NVIDIA GPUs. `attention.choose` chooses between them.

Splash is imported inside functions, because importing Pallas takes a quarter of the time of importing JAX.

B batch, S sequence, K KV heads, G query heads per KV head, N = K * G query heads, H head width, M runs per row.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from emu3_jax.models.switching import switch

ATTENTION = "attention"  # checkpoint name of the kernels' residuals, for remat policies

# ------------------------------------------------------------------------------------------------ Splash

# Largest number of queries and keys per tile.
SPLASH_BLOCK = 1024
_LANES = 128


def splash(
    q_bskgh: jax.Array,
    k_bskh: jax.Array,
    v_bskh: jax.Array,
    segments_bs: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`attention.self_attention` of one TPU core's rows and heads.

    `interpret` runs the kernel in Pallas' interpreter, on any device.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel

    rows, length, k, g, h = q_bskgh.shape
    block, padded = _splash_tiles(length)
    kernel = _splash_kernel(k * g, padded, block, interpret)

    def heads_first(x: jax.Array) -> jax.Array:
        # Padding tokens come after all real tokens, so the causal mask hides their keys.
        return jnp.swapaxes(jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))), 1, 2)

    q_bnsh = heads_first((q_bskgh * h**-0.5).astype(q_bskgh.dtype).reshape(rows, length, k * g, h))
    ids = None
    if segments_bs is not None:
        segments_bs = jnp.pad(segments_bs, ((0, 0), (0, padded - length)))
        # Query ids are made >= 0, so keys with negative ids are visible to no query.
        ids = splash_kernel.SegmentIds(q=jnp.abs(segments_bs), kv=segments_bs)
    out_bnsh = jax.vmap(kernel)(q_bnsh, heads_first(k_bskh), heads_first(v_bskh), ids)
    return jnp.swapaxes(out_bnsh, 1, 2)[:, :length].reshape(q_bskgh.shape)


def _splash_tiles(length: int) -> tuple[int, int]:
    """The tile size for rows of this length, and the length rounded up to whole tiles."""
    half = SPLASH_BLOCK // 2
    if length <= half:
        padded = -(-length // _LANES) * _LANES
        return padded, padded
    padded = -(-length // half) * half
    return (half if padded % SPLASH_BLOCK else SPLASH_BLOCK), padded


def _splash_kernel(heads: int, length: int, block: int, interpret: bool) -> Callable[..., jax.Array]:
    """A causal kernel from [N, S, H], [K, S, H], [K, S, H] to [N, S, H]. It reads a KV head once per query head."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

    sizes = splash_kernel.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=min(block, SPLASH_BLOCK // 2),
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=min(block, SPLASH_BLOCK // 2),
        # The fused backward kernel is off: it holds S / block partial dq, 0.8 GB for 10,240 tokens of the 8 B model.
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    mask = splash_mask.MultiHeadMask([splash_mask.CausalMask((length, length))] * heads)
    return splash_kernel.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, residual_checkpoint_name=ATTENTION, interpret=interpret
    )


# ------------------------------------------------------------------------------------------------ cuDNN

# Largest number of runs per row that cuDNN is prepared for. Its workspace grows with this number, however many runs the
# rows have: on an H100, at 10,240 tokens of the 8 B model, forward and backward, 16 took 3 GB more than no runs.
CUDNN_RUNS = 8


def cudnn(
    q_bskgh: jax.Array,
    k_bskh: jax.Array,
    v_bskh: jax.Array,
    segments_bs: jax.Array | None = None,
    *,
    otherwise: Callable[..., jax.Array],
    max_runs: int | None = None,
) -> jax.Array:
    """`attention.self_attention` of one NVIDIA GPU's rows and heads. The tokens of a segment must be contiguous.

    If each row is one segment, perhaps with padding (0) behind it, causal attention is right for its tokens. Other rows
    use cuDNN's layout for packed sequences, which takes a bounded number of segments. If a row has more, the whole
    batch uses `otherwise`. This is decided at run time. What padding (0) gets depends on the choice.

    Args:
        q_bskgh: [B, S, K, G, H] queries in bfloat16 or float16, as in `attention.self_attention`.
        k_bskh: [B, S, K, H] keys in the same dtype.
        v_bskh: [B, S, K, H] values in the same dtype.
        segments_bs: int32 [B, S], or None. Segment n, and what follows it of segment -n and of padding (0), form one
            run: all its tokens are queries, only the tokens of n are keys.
        otherwise: attention as a function of (q, k, v, segments), for batches in which a row has more than `max_runs`
            runs. It runs row by row. Its memory for one row is always reserved.
        max_runs: largest number of runs per row, by default `CUDNN_RUNS`.

    Returns:
        [B, S, K, G, H] in the queries' dtype.
    """
    q_bsnh = q_bskgh.reshape(*q_bskgh.shape[:2], -1, q_bskgh.shape[-1])
    if segments_bs is None:
        return _cudnn_causal(q_bsnh, k_bskh, v_bskh).reshape(q_bskgh.shape)
    max_runs = max_runs or CUDNN_RUNS
    count, lengths = runs(segments_bs, max_runs)

    def causal(q: jax.Array, k: jax.Array, v: jax.Array, *_: jax.Array) -> jax.Array:
        return _cudnn_causal(q, k, v)

    def packed(q: jax.Array, k: jax.Array, v: jax.Array, _: jax.Array, *lengths: jax.Array) -> jax.Array:
        if jax.__version_info__ < (0, 11, 2):
            # Before JAX 0.11.2, offsets of keys are computed with the number of query heads. `switch` keeps the
            # repeated keys and values for the backward pass: 168 MB a layer (8 B model, 10,240 tokens).
            k, v = (jnp.repeat(x, q_bskgh.shape[3], axis=2) for x in (k, v))
        return _cudnn_packed(q, k, v, lengths)

    @jax.checkpoint
    def row_by_row(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, *_: jax.Array) -> jax.Array:
        row = jax.checkpoint(lambda parts: otherwise(*(x[None] for x in parts))[0])
        return lax.map(row, (q.reshape(q_bskgh.shape), k, v, segments)).reshape(q.shape)

    # cuDNN does not write the gradients of keys that belong to no run. Masking the keys makes these gradients 0. Only
    # padding sees them, if anything does.
    key_bs11 = (segments_bs > 0)[:, :, None, None]
    k_bskh, v_bskh = (jnp.where(key_bs11, x, jnp.zeros((), x.dtype)) for x in (k_bskh, v_bskh))
    one = jnp.all(count == 1) & jnp.all(segments_bs >= 0)
    index = jnp.where(jnp.max(count) > max_runs, 2, jnp.where(one, 0, 1))
    branches, operands = (causal, packed, row_by_row), (q_bsnh, k_bskh, v_bskh)
    return switch(index, branches, operands, (segments_bs, *lengths), name=ATTENTION).reshape(q_bskgh.shape)


def runs(segments_bs: jax.Array, max_runs: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    """Finds the runs of each row, in the form of cuDNN's packed layout.

    Padding is part of the run before it. So rows of several parts, each with padding behind it, need a run a part.

    Returns:
        The number of runs of each row, int32 [B]; and for the first M = `max_runs` runs, padded with -1: the numbers
        of queries [B, M], the numbers of keys [B, M], and the first slots [B, M + 1].
    """
    before = segments_bs[:, :-1]
    after = segments_bs[:, 1:]
    joined = (after == before) | (after == 0) | ((after == -before) & (before > 0))
    run_bs = jnp.pad(jnp.cumsum(~joined, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
    run = jnp.arange(max_runs + 1, dtype=jnp.int32)[:, None]

    def tokens(condition: jax.Array) -> jax.Array:
        return jnp.sum(condition, axis=-1, dtype=jnp.int32)

    inside = run_bs[:, None] == run[None, :-1]
    queries = tokens(inside)
    keys = tokens(inside & (segments_bs > 0)[:, None])
    keys = jnp.where(keys == 0, queries, keys)  # a run without keys gets some, or softmax gives NaN
    first = tokens(run_bs[:, None] < run[None])
    count = run_bs[:, -1] + 1
    exists = run[None, :, 0] < jnp.minimum(count, max_runs)[:, None]
    queries, keys = (jnp.where(exists[:, :-1], x, -1) for x in (queries, keys))
    return count, (queries, keys, jnp.where(exists, first, -1))


def _cudnn_causal(q_bsnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q_bsnh, k_bskh, v_bskh, is_causal=True, implementation="cudnn")


def _cudnn_packed(q_bsnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, lengths: tuple[jax.Array, ...]) -> jax.Array:
    # A private function of JAX, because `jax.nn.dot_product_attention` takes no offsets.
    from jax._src.cudnn import fused_attention_stablehlo as fused

    queries, keys, first = lengths
    return fused.dot_product_attention(
        q_bsnh, k_bskh, v_bskh, q_seqlen=queries, kv_seqlen=keys, q_offsets=first, kv_offsets=first,
        scale=q_bsnh.shape[-1] ** -0.5, mask_type=fused.MaskType.PADDING_CAUSAL,
    )  # fmt: skip

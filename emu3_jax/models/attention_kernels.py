"""Fused attention of whole sequences: Splash on TPUs, cuDNN on NVIDIA GPUs. `attention.choose` says which and when.

Splash is imported where it is used: Pallas takes a quarter as long to import as JAX itself.

B batch, S sequence, K KV heads, G query heads per KV head, N = K * G query heads, H head width, M runs in a row.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

ATTENTION = "attention"  # names, for a layer's remat, what the backward pass of a kernel needs of its results

# ------------------------------------------------------------------------------------------------ Splash

# Queries and keys per tile, at most.
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
    """`attention.self_attention` on one TPU core's rows and heads; `interpret` runs the kernel's program anywhere."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel

    rows, length, k, g, h = q_bskgh.shape
    block, padded = _splash_tiles(length)
    kernel = _splash_kernel(k * g, padded, block, interpret)

    def heads_first(x: jax.Array) -> jax.Array:
        # Tokens that only fill the last tile come after all others: causality hides their keys.
        return jnp.swapaxes(jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))), 1, 2)

    q_bnsh = heads_first((q_bskgh * h**-0.5).astype(q_bskgh.dtype).reshape(rows, length, k * g, h))
    ids = None
    if segments_bs is not None:
        segments_bs = jnp.pad(segments_bs, ((0, 0), (0, padded - length)))
        # Negative keys meet no query: those are all >= 0.
        ids = splash_kernel.SegmentIds(q=jnp.abs(segments_bs), kv=segments_bs)
    out_bnsh = jax.vmap(kernel)(q_bnsh, heads_first(k_bskh), heads_first(v_bskh), ids)
    return jnp.swapaxes(out_bnsh, 1, 2)[:, :length].reshape(q_bskgh.shape)


def _splash_tiles(length: int) -> tuple[int, int]:
    """The tile for rows of this length, and the length rounded up to whole tiles."""
    half = SPLASH_BLOCK // 2
    if length <= half:
        padded = -(-length // _LANES) * _LANES
        return padded, padded
    padded = -(-length // half) * half
    return (half if padded % SPLASH_BLOCK else SPLASH_BLOCK), padded


def _splash_kernel(heads: int, length: int, block: int, interpret: bool) -> Callable[..., jax.Array]:
    """A causal kernel [N, S, H], [K, S, H], [K, S, H] -> [N, S, H]; it reads each KV head once per query head."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

    sizes = splash_kernel.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=min(block, SPLASH_BLOCK // 2),
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=min(block, SPLASH_BLOCK // 2),
        # Not the fused backward kernel: it holds S / block partial dq, 0.8 GB for 10,240 tokens of the 8 B model.
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    mask = splash_mask.MultiHeadMask([splash_mask.CausalMask((length, length))] * heads)
    return splash_kernel.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, residual_checkpoint_name=ATTENTION, interpret=interpret
    )


# ------------------------------------------------------------------------------------------------ cuDNN

# Runs that cuDNN may find in a row. Its statistics and workspace grow with it, whatever the rows hold: at 10,240 tokens
# of the 8 B model, forward and backward, 16 took 3 GB more than none on an H100.
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
    """`attention.self_attention` on one NVIDIA GPU's rows and heads; the tokens of a segment stand together.

    Rows with segments go through cuDNN's layout for packed sequences, which takes a bounded number of them. Batches
    with more take another way, decided while running.

    Args:
        q_bskgh: as `attention.self_attention`, in bfloat16 or float16; so the keys and values.
        k_bskh: [B, S, K, H].
        v_bskh: [B, S, K, H].
        segments_bs: [B, S] or None. Segments n, and -n right behind it, are one run: queries of both, keys of n.
        otherwise: the same of (q, k, v, segments), for batches in which a row has more than `max_runs` runs. Its
            memory is reserved too, for one row.
        max_runs: the bound; `CUDNN_RUNS` by default.
    """
    q_bsnh = q_bskgh.reshape(*q_bskgh.shape[:2], -1, q_bskgh.shape[-1])
    if segments_bs is None:
        out = jax.nn.dot_product_attention(q_bsnh, k_bskh, v_bskh, is_causal=True, implementation="cudnn")
        return out.reshape(q_bskgh.shape)
    max_runs = max_runs or CUDNN_RUNS
    count, lengths = runs(segments_bs, max_runs)
    # cuDNN leaves the gradients of keys that no run has unwritten; here they become 0.
    key_bs11 = (segments_bs >= 0)[:, :, None, None]
    k_bskh, v_bskh = (jnp.where(key_bs11, x, jnp.zeros((), x.dtype)) for x in (k_bskh, v_bskh))

    def packed(q: jax.Array, k: jax.Array, v: jax.Array, _: jax.Array) -> jax.Array:
        if jax.__version_info__ < (0, 11, 2):
            # There, offsets of keys count query heads.
            k, v = (jnp.repeat(x, q_bskgh.shape[3], axis=2) for x in (k, v))
        return _cudnn_packed(q.reshape(q_bsnh.shape), k, v, lengths).reshape(q.shape)

    def row_by_row(*arrays: jax.Array) -> jax.Array:
        row = jax.checkpoint(lambda parts: otherwise(*(x[None] for x in parts))[0])
        return lax.map(row, arrays)

    return lax.cond(jnp.max(count) <= max_runs, packed, row_by_row, q_bskgh, k_bskh, v_bskh, segments_bs)


def runs(segments_bs: jax.Array, max_runs: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    """Where the runs of each row lie, in the form of cuDNN's packed layout.

    Returns:
        The number of runs of each row, int32 [B]; and of the first M = `max_runs` of them, padded with -1: numbers
        of queries [B, M], numbers of keys [B, M], first slots [B, M + 1].
    """
    before = segments_bs[:, :-1]
    joined = (segments_bs[:, 1:] == before) | ((segments_bs[:, 1:] == -before) & (before > 0))
    run_bs = jnp.pad(jnp.cumsum(~joined, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
    run = jnp.arange(max_runs + 1, dtype=jnp.int32)[:, None]

    def tokens(condition: jax.Array) -> jax.Array:
        return jnp.sum(condition, axis=-1, dtype=jnp.int32)

    inside = run_bs[:, None] == run[None, :-1]
    queries = tokens(inside)
    keys = tokens(inside & (segments_bs >= 0)[:, None])
    keys = jnp.where(keys == 0, queries, keys)  # a run of -n alone has no keys to see: any, so that nothing is 0 / 0
    first = tokens(run_bs[:, None] < run[None])
    count = run_bs[:, -1] + 1
    exists = run[None, :, 0] < jnp.minimum(count, max_runs)[:, None]
    queries, keys = (jnp.where(exists[:, :-1], x, -1) for x in (queries, keys))
    return count, (queries, keys, jnp.where(exists, first, -1))


def _cudnn_packed(
    q_bsnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, lengths: tuple[jax.Array, jax.Array, jax.Array]
) -> jax.Array:
    # `jax.nn.dot_product_attention` does not pass offsets on to this.
    from jax._src.cudnn import fused_attention_stablehlo as fused

    queries, keys, first = lengths
    return fused.dot_product_attention(
        q_bsnh, k_bskh, v_bskh, q_seqlen=queries, kv_seqlen=keys, q_offsets=first, kv_offsets=first,
        scale=q_bsnh.shape[-1] ** -0.5, mask_type=fused.MaskType.PADDING_CAUSAL,
    )  # fmt: skip

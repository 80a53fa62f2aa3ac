"""Attention of the decoder, and the choice between its implementations.

B batch, S queries, T keys, K KV heads, G query heads per KV head, H head width.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh
from jax.typing import DTypeLike

from emu3_jax.errors import Emu3Error
from emu3_jax.models import attention_kernels, capability

# Queries per block. This bounds the score matrix of a long prompt to [B, K, G, block, T].
QUERY_BLOCK = 512

# Score of masked keys: below every real score, but finite, so that a row without any visible key gives no NaN.
MASKED = -1e30

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash", "splash-interpreted")


def self_attention(
    q_bskgh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, segments_bs: jax.Array | None, implementation: str
) -> jax.Array:
    """Causal self-attention of whole sequences, within segments. For training and all passes without a cache.

    On a mesh, each device computes its own rows and heads. If the mesh splits sequences, an all-to-all exchange gives
    each device whole sequences of a part of the heads (DeepSpeed Ulysses, arXiv 2309.14509). So all devices do equal
    work, none holds the keys of all heads, and kernels need no sequence offset. If the heads cannot be split evenly, a
    device keeps its queries and gathers the keys and values of the whole row. Only XLA's attention can do this.

    Args:
        q_bskgh: [B, S, K, G, H] queries, RoPE applied, not yet scaled.
        k_bskh: [B, S, K, H] keys.
        v_bskh: [B, S, K, H] values.
        segments_bs: int32 [B, S], or None if each row is one segment. A token attends only to its own segment. A token
            of segment -n attends to segment n, and no token attends to it; this is the reference's padding. Segment 0
            is padding of rows: no other token attends to it. It gets a finite, meaningless result, as do tokens
            without visible keys. For "cudnn" the tokens of a segment must be contiguous, and -n must follow n directly.
        implementation: "xla", "cudnn", "splash", or "auto" for the best one on the program's platform; see `choose`.

    Returns:
        [B, S, K, G, H] in the queries' dtype.

    Raises:
        Emu3Error: the named implementation cannot be used here.
    """
    mesh = jax.sharding.get_abstract_mesh()
    spec = nn.logical_to_mesh_axes(("batch", "sequence", "kv_heads"))
    packed = segments_bs is not None
    if mesh.empty or not _divides(mesh, spec, k_bskh.shape):
        chosen = choose(implementation, q_bskgh.shape, q_bskgh.dtype, packed)
        return _device_attention(chosen, q_bskgh, k_bskh, v_bskh, segments_bs)
    rows, sequence, _ = spec
    parts = _parts(mesh, sequence)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> jax.Array:
        deal = _deal(parts, *q.shape[2:4])
        shape = (q.shape[0], q.shape[1] * parts, *q.shape[2:])
        chosen = choose(implementation, shape, q.dtype, packed, undealt=None if deal else parts)
        if parts == 1:
            return _device_attention(chosen, q, k, v, segments)
        gathered = lax.all_gather(segments, sequence, axis=1, tiled=True) if packed else None
        if deal:

            def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
                return _device_attention(chosen, q, k, v, gathered)

            return _dealt(attention, q, k, v, repeats=deal, axis=sequence)
        k, v = (lax.all_gather(x, sequence, axis=1, tiled=True) for x in (k, v))
        first = lax.axis_index(sequence) * q.shape[1]
        return _xla_attention(q, k, v, q_segments=segments, k_segments=gathered, first_query=first)

    specs = (spec, spec, spec, type(spec)(rows, sequence))
    return jax.shard_map(local, in_specs=specs, out_specs=spec, check_vma=False)(q_bskgh, k_bskh, v_bskh, segments_bs)


def choose(
    implementation: str,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    packed: bool,
    *,
    undealt: int | None = None,
    platform: str = "",
) -> str:
    """Chooses an implementation: the named one, or for "auto" the platform's kernel if possible, else "xla".

    Args:
        implementation: one of `IMPLEMENTATIONS`. "splash-interpreted" runs Splash in Pallas' interpreter, for tests.
        shape: shape [B, S, K, G, H] of the queries on one device.
        dtype: dtype of the queries.
        packed: whether there are segments.
        undealt: if heads cannot be split evenly, the number of parts that the mesh splits sequences into; else None.
        platform: "cpu", "gpu" or "tpu", or "" for the platform that the program will run on.

    Returns:
        The name of the implementation, not "auto".

    Raises:
        Emu3Error: the named implementation cannot be used. The message gives the reason.
    """
    if implementation not in IMPLEMENTATIONS:
        raise Emu3Error(f"attention {implementation!r} is unknown: choose one of {', '.join(IMPLEMENTATIONS)}")
    platform = platform or capability.target_platform()
    if implementation == "auto":
        kernel = {"tpu": "splash", "gpu": "cudnn"}.get(platform)
        # `init` passes a single token, which needs no kernel.
        if kernel is None or shape[1] == 1:
            return "xla"
        obstacle = _obstacle(kernel, shape, dtype, packed=packed, undealt=undealt, platform=platform)
        return "xla" if obstacle else kernel
    obstacle = _obstacle(implementation, shape, dtype, packed=packed, undealt=undealt, platform=platform)
    if obstacle:
        raise Emu3Error(f'attention {implementation!r} cannot be used: {obstacle}; choose "auto" or "xla"')
    return implementation


# Implementations of attention over the cache in decoding. "xla" is `cached_attention`. "pallas" is `decode_kernels`,
# for one token per row on NVIDIA GPUs. "pallas-hopper" is `window_kernels_hopper`, for any number of tokens per row on
# NVIDIA Hopper. "pallas-tpu" is `window_kernels_tpu`, for any number of tokens per row on TPUs. With "-interpreted"
# they run in Pallas' interpreters, for tests.
KERNELS = (
    "auto", "xla", "pallas", "pallas-interpreted", "pallas-hopper", "pallas-hopper-interpreted", "pallas-tpu",
    "pallas-tpu-interpreted",
)  # fmt: skip

_MOST_TOKENS = 128  # more tokens per row come only in prefill, where XLA's attention computes larger products
SLOTS = 64  # the kernels for NVIDIA GPUs read blocks of this many slots of the cache
TPU_SLOTS = 512  # and the kernel for TPUs reads blocks of at most this many

# JAX has deprecated Pallas' Triton backend, which compiles "pallas": since JAX 0.11, lowering the kernel gives a
# DeprecationWarning. From JAX 0.12 on, "auto" does not choose the kernel.
TRITON_SUPPORTED = jax.__version_info__ < (0, 12)


def choose_kernels(
    kernels: str, width: int, dtype: DTypeLike, platform: str = "", window: int = 1, slots: int = SLOTS
) -> str:
    """Chooses an implementation of attention over the cache: the named one, or for "auto" the fastest.

    On TPUs "auto" is XLA's, because the kernel for TPUs has been compiled for them, but not run on one.

    Args:
        kernels: one of `KERNELS`.
        width: head width H.
        dtype: dtype of the queries.
        platform: "cpu", "gpu" or "tpu", or "" for the platform that the program will run on.
        window: number of tokens per row. "pallas" takes one only, and for more the choice is that of "auto".
        slots: number of slots of the cache. "auto" takes the kernels for NVIDIA GPUs if it is a multiple of `SLOTS`.

    Returns:
        The name of the implementation, not "auto".

    Raises:
        Emu3Error: the name is unknown, or the NVIDIA GPU, the head width or the dtype does not suit the kernel.
    """
    if kernels not in KERNELS:
        raise Emu3Error(f"kernels {kernels!r} are unknown: choose one of {', '.join(KERNELS)}")
    platform = platform or capability.target_platform()
    found = capability.cuda_capability() if platform == "gpu" else None
    if kernels == "pallas" and found is not None and found < capability.AMPERE:
        raise Emu3Error(
            f'kernels "pallas" need compute capability 8.0 (Ampere) or later, and this GPU has '
            f'{capability.text(found)}: choose "auto" or "xla"'
        )
    suits_hopper = width == 128 and jnp.dtype(dtype) == jnp.bfloat16
    if kernels.startswith("pallas-hopper") and not suits_hopper:
        raise Emu3Error(
            f"kernels {kernels!r} need heads of width 128 and dtype bfloat16, not width {width} and dtype "
            f'{jnp.dtype(dtype)}: choose "auto" or "xla"'
        )
    if kernels == "pallas-hopper" and found is not None and found != capability.HOPPER:
        raise Emu3Error(
            f'kernels "pallas-hopper" need compute capability 9.0 (Hopper), and this GPU has '
            f'{capability.text(found)}: choose "auto" or "xla"'
        )
    if kernels == "pallas-interpreted" and window > 1:
        return "xla"
    if kernels != "auto" and not (kernels == "pallas" and window > 1):
        return kernels
    if found is None or found < capability.AMPERE or slots % SLOTS:
        return "xla"
    if window > 1 or not TRITON_SUPPORTED:
        suits = suits_hopper and found == capability.HOPPER and window <= _MOST_TOKENS
        return "pallas-hopper" if suits else "xla"
    return "pallas" if width >= 32 and width & (width - 1) == 0 else "xla"  # legal widths of the kernel's products


def _obstacle(
    implementation: str,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    *,
    packed: bool,
    undealt: int | None,
    platform: str,
) -> str | None:
    """The reason that this implementation cannot be used, or None if it can."""
    if implementation == "xla":
        return None
    b, s, k, g, h = shape
    if undealt:
        return (
            f"the mesh splits sequences into {undealt} parts, and a device's {k} KV heads with {g} query heads each "
            "cannot be split evenly over them"
        )
    if implementation == "splash-interpreted":
        return None
    wanted = {"splash": "tpu", "cudnn": "gpu"}[implementation]
    if platform != wanted:
        return f"it needs a {wanted.upper()}, and the program will run on a {platform.upper()}"
    if implementation == "splash":
        if dtype != jnp.bfloat16:
            return f"it needs dtype bfloat16, and the decoder's dtype is {jnp.dtype(dtype)}"
        return None if h % 64 == 0 else f"it needs a head width that is a multiple of 64, and the decoder's is {h}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it needs dtype bfloat16 or float16, and the decoder's dtype is {jnp.dtype(dtype)}"
    found = capability.cuda_capability()
    if found is None:
        return "it needs an NVIDIA GPU, and this machine has none"
    if found < capability.AMPERE:
        return f"it needs compute capability 8.0 (Ampere) or later, and this GPU has {capability.text(found)}"
    widest = 256 if found >= capability.HOPPER else 128
    if h % 8 or h > widest:
        return f"on this GPU it needs a head width that is a multiple of 8 up to {widest}, and the decoder's is {h}"
    if packed and found < capability.HOPPER:
        return f"segments need compute capability 9.0 (Hopper) or later, and this GPU has {capability.text(found)}"
    if packed and b * s * k * g * h >= 2**31:
        return (
            "with segments, a device's queries must hold fewer than 2^31 numbers, and their shape is "
            f"[{b}, {s}, {k * g}, {h}]"
        )
    return None


def _device_attention(
    implementation: str, q_bskgh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, segments_bs: jax.Array | None
) -> jax.Array:
    """`self_attention` for the rows and heads of one device, by a chosen implementation."""
    if implementation.startswith("splash"):
        interpret = implementation != "splash"
        return attention_kernels.splash(q_bskgh, k_bskh, v_bskh, segments_bs, interpret=interpret)

    def xla(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> jax.Array:
        return _xla_attention(q, k, v, q_segments=segments, k_segments=segments, first_query=0)

    if implementation == "cudnn":
        return attention_kernels.cudnn(q_bskgh, k_bskh, v_bskh, segments_bs, otherwise=xla)
    return xla(q_bskgh, k_bskh, v_bskh, segments_bs)


def _parts(mesh: AbstractMesh, axes: str | tuple[str, ...] | None) -> int:
    """The number of parts that these mesh axes split an array into."""
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def _deal(parts: int, kv_heads: int, groups: int) -> int:
    """The number of copies per KV head so that `parts` devices get equally many heads; 0 if this is impossible."""
    if kv_heads % parts == 0:
        return 1
    repeats, rest = divmod(parts, kv_heads)
    return repeats if rest == 0 and groups % repeats == 0 else 0


def _dealt(
    attention: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    repeats: int,
    axis: Any,
) -> jax.Array:
    """`attention` of whole sequences for this device's part of the heads, between two all-to-all exchanges."""
    b, s, kv_heads, groups, h = q.shape
    q = q.reshape(b, s, kv_heads * repeats, groups // repeats, h)
    k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
    q, k, v = (lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v))
    out = lax.all_to_all(attention(q, k, v), axis, split_axis=1, concat_axis=2, tiled=True)
    return out.reshape(b, s, kv_heads, groups, h)


def _divides(mesh: AbstractMesh, spec: Any, shape: tuple[int, ...]) -> bool:
    """Whether the mesh divides these dimensions. It does not divide the single dummy token of `init`."""
    return not any(size % _parts(mesh, axes) for axes, size in zip(spec, shape, strict=False))


def _xla_attention(
    q_bskgh: jax.Array,
    k_bskh: jax.Array,
    v_bskh: jax.Array,
    *,
    q_segments: jax.Array | None,
    k_segments: jax.Array | None,
    first_query: jax.Array | int,
) -> jax.Array:
    """`self_attention` of queries in consecutive slots from `first_query` on, over keys from slot 0 on.

    It runs in blocks of queries. The backward pass recomputes the scores of a block, so all scores never exist at once.
    """

    @jax.checkpoint
    def block(q: jax.Array, segments: jax.Array | None, first: jax.Array | int) -> jax.Array:
        visible = _causal(q.shape[1], k_bskh.shape[1], jnp.asarray(first)[None])
        if segments is not None and k_segments is not None:
            visible = visible & (jnp.abs(segments)[:, :, None] == k_segments[:, None])
        return _masked_attention(q, jnp.swapaxes(k_bskh, 1, 2), jnp.swapaxes(v_bskh, 1, 2), visible)

    return _over_query_blocks(block, q_bskgh, q_segments, first_query)


def cached_attention(
    q_bskgh: jax.Array,
    k_bkth: jax.Array,
    v_bkth: jax.Array,
    k_scales_bkt: jax.Array | None,
    v_scales_bkt: jax.Array | None,
    *,
    first_query: jax.Array,
    start: jax.Array,
) -> jax.Array:
    """Causal attention of queries in consecutive slots over the keys of a cache; softmax in float32.

    Args:
        q_bskgh: [B, S, K, G, H] queries, RoPE applied, not yet scaled.
        k_bkth: [B, K, T, H] keys. A query in slot s attends to slot t if start[b] <= t <= s.
        v_bkth: [B, K, T, H] values.
        k_scales_bkt: float32 [B, K, T], scales of the keys of a narrow cache, or None.
        v_scales_bkt: float32 [B, K, T], scales of the values of a narrow cache, or None.
        first_query: int32 [B], slot of each row's query 0.
        start: int32 [B], first slot of each row.

    Returns:
        [B, S, K, G, H] in the queries' dtype.
    """

    def block(q: jax.Array, _: None, first: jax.Array) -> jax.Array:
        keys = k_bkth.shape[2]
        visible = _causal(q.shape[1], keys, first) & (jnp.arange(keys)[None, None] >= start[:, None, None])
        return _masked_attention(q, k_bkth, v_bkth, visible, k_scales_bkt=k_scales_bkt, v_scales_bkt=v_scales_bkt)

    return _over_query_blocks(block, q_bskgh, None, first_query)


def placed_attention(
    q_bskgh: jax.Array,
    k_bkth: jax.Array,
    v_bkth: jax.Array,
    k_scales_bkt: jax.Array | None,
    v_scales_bkt: jax.Array | None,
    *,
    visible: jax.Array,
) -> jax.Array:
    """As `cached_attention`, for queries of which bool [B, S, T] `visible` says which slots they see."""
    return _masked_attention(q_bskgh, k_bkth, v_bkth, visible, k_scales_bkt=k_scales_bkt, v_scales_bkt=v_scales_bkt)


def _over_query_blocks(
    block: Callable[..., jax.Array],
    q_bskgh: jax.Array,
    segments_bs: jax.Array | None,
    first_query: jax.Array | int,
) -> jax.Array:
    """Applies `block(queries, segments, slot of the first query)` to blocks of at most QUERY_BLOCK queries.

    `first_query` is an int32 scalar, or [B].
    """
    queries = q_bskgh.shape[1]
    if queries <= QUERY_BLOCK:
        return block(q_bskgh, segments_bs, first_query)
    blocks = -(-queries // QUERY_BLOCK)

    def split(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), (0, blocks * QUERY_BLOCK - queries), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(padded.reshape(x.shape[0], blocks, QUERY_BLOCK, *x.shape[2:]), 1, 0)

    firsts = QUERY_BLOCK * jnp.arange(blocks, dtype=jnp.int32)
    offsets = jnp.add.outer(firsts, first_query)
    out = lax.map(lambda parts: block(*parts), (*jax.tree.map(split, (q_bskgh, segments_bs)), offsets))
    return jnp.moveaxis(out, 0, 1).reshape(q_bskgh.shape[0], -1, *q_bskgh.shape[2:])[:, :queries]


def _causal(queries: int, keys: int, first_query: jax.Array) -> jax.Array:
    """bool [B, S, T]: whether key slot t is not later than the query's slot first_query[b] + s."""
    query = first_query[:, None, None] + jnp.arange(queries, dtype=jnp.int32)[None, :, None]
    return jnp.arange(keys, dtype=jnp.int32)[None, None] <= query


def _masked_attention(
    q_bskgh: jax.Array,
    k_bkth: jax.Array,
    v_bkth: jax.Array,
    visible: jax.Array,
    *,
    k_scales_bkt: jax.Array | None = None,
    v_scales_bkt: jax.Array | None = None,
) -> jax.Array:
    """`cached_attention` with all scores at once. `visible`, bool [B or 1, S, T], says which keys a query sees."""
    dtype = q_bskgh.dtype
    precision = matmul_precision(dtype)
    scores = jnp.einsum(
        "bskgh,bkth->bkgst", q_bskgh, k_bkth.astype(dtype), precision=precision, preferred_element_type=jnp.float32
    )
    if k_scales_bkt is not None:
        scores = scores * k_scales_bkt[:, :, None, None]
    scores = jnp.where(visible[:, None, None], scores * q_bskgh.shape[-1] ** -0.5, MASKED)
    weights = jax.nn.softmax(scores, axis=-1)
    if v_scales_bkt is not None and dtype == jnp.float16:
        # Weights of a long cache times scales of small values are subnormal in float16: 4% off at 8,000 keys.
        largest = jnp.maximum(jnp.max(v_scales_bkt, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        weights = weights * (v_scales_bkt / largest)[:, :, None, None]
        mixed = jnp.einsum(
            "bkgst,bkth->bskgh", weights.astype(dtype), v_bkth.astype(dtype), preferred_element_type=jnp.float32
        )
        return (mixed * largest[:, None, :, :, None]).astype(dtype)
    if v_scales_bkt is not None:
        weights = weights * v_scales_bkt[:, :, None, None]
    return jnp.einsum(
        "bkgst,bkth->bskgh", weights.astype(dtype), v_bkth.astype(dtype), precision=precision,
        preferred_element_type=dtype,
    )  # fmt: skip


def matmul_precision(dtype: DTypeLike) -> lax.Precision | None:
    """The precision of products: for float32 the highest (no TF32 or bfloat16 passes), else the backend's default."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None

"""The decoder: a LLaMA-like transformer over text and visual tokens, as a pure function of (params, inputs).

B batch, S sequence, T cache slots, D width, V vocabulary, K KV heads, G query heads per KV head (query head k * G + g
of the reference is head g of KV head k), H head width, F MLP width.

Logical axes of the weights: "vocab", "table_width" (D of the two tables), "width" (D of the norms), "embed" (D of
the matrices), "kv_heads" (K), "heads_per_kv" (G, or G + 2 in the fused projection), "head_dim" (H), "mlp" (F), "layers"
(in the stacked form). Logical axes of the activations: "batch", "sequence", "width", "lookup_batch", "lookup_width".
Logical axes have an effect only on a mesh.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from emu3_jax.config import DecoderConfig
from emu3_jax.models.adapters import PROJECTION, Adapter, project, weight_dtype
from emu3_jax.models.attention import (
    cached_attention,
    choose_kernels,
    matmul_precision,
    placed_attention,
    self_attention,
)
from emu3_jax.models.attention_kernels import ATTENTION
from emu3_jax.models.cache import KVCache
from emu3_jax.models.capability import target_platform
from emu3_jax.models.products import multiply

Params = dict[str, Any]  # nested dicts of arrays
Rotations = tuple[jax.Array, jax.Array]  # cosines and sines; see `rotations`


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, whose logical axis is `axis`.

    As in the reference, the norm is float32 and the product with the scale is in x's dtype.
    """

    epsilon: float
    adapter: Adapter | None = None
    axis: str = "width"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, (self.axis,))
        scale = self.param("scale", init, x.shape[-1:], weight_dtype(self.adapter))
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        return normed.astype(x.dtype) * scale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + scale.shape)


def rotations(positions_bs: jax.Array, width: int, theta: float) -> Rotations:
    """Cosines and sines of the rotary position embedding (RoPE), for all heads and layers.

    Args:
        positions_bs: int32 [B, S].
        width: head width H.
        theta: base of the frequencies.

    Returns:
        Cosines and sines, float32 [B, S, H / 2] each.
    """
    frequencies = 1.0 / np.float32(theta) ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    angles = positions_bs.astype(jnp.float32)[..., None] * frequencies[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rope(x_bs_h: jax.Array, rotations_bsr: Rotations) -> jax.Array:
    """Applies the rotary position embedding in float32. Element i is rotated with element i + H / 2.

    Args:
        x_bs_h: [B, S, ..., H] queries or keys.
        rotations_bsr: cosines and sines of the positions, from `rotations`.

    Returns:
        The rotated queries or keys, in the shape and dtype of `x_bs_h`.
    """
    shape = (*x_bs_h.shape[:2], *(1,) * (x_bs_h.ndim - 3), x_bs_h.shape[-1] // 2)
    cos, sin = (x.reshape(shape) for x in rotations_bsr)
    low, high = jnp.split(x_bs_h.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x_bs_h.dtype)


class Attention(nn.Module):
    """Grouped-query attention. One fused projection, grouped by KV head, so that it can be sharded over KV heads."""

    config: DecoderConfig
    implementation: str
    adapter: Adapter | None = None
    kernels: str = "auto"

    @nn.compact
    def __call__(
        self,
        x_bsd: jax.Array,
        rotations_bsr: Rotations,
        segments_bs: jax.Array | None,
        cache: KVCache | None,
        layer: int,
    ) -> tuple[jax.Array, KVCache | None]:
        c, adapter = self.config, self.adapter
        d, k, h = c.hidden_size, c.num_kv_heads, c.head_dim
        g = c.num_heads // k
        axes = ("embed", "kv_heads", "heads_per_kv", "head_dim")
        product = functools.partial(project, self, adapter, kernels=self.kernels)
        qkv = product("bsd,dkph->bskph", x_bsd, name="qkv", shape=(d, k, g + 2, h), axes=axes)
        if c.qk_norm:
            q_norm, k_norm = (RMSNorm(c.rms_norm_eps, adapter, "head_dim", name=name) for name in ("q_norm", "k_norm"))
            queries, key = q_norm(qkv[:, :, :, :g]), k_norm(qkv[:, :, :, g : g + 1])
            qkv = jnp.concatenate([queries, key, qkv[:, :, :, g + 1 :]], axis=3)
        if cache is None:
            queries, keys, values = _roped(qkv, rotations_bsr)
            mixed = self_attention(queries, keys, values, segments_bs, self.implementation)
        else:
            kernels = "xla"  # the only one that knows placements
            if cache.placement is None:
                kernels = choose_kernels(self.kernels, h, x_bsd.dtype, window=x_bsd.shape[1], slots=cache.slots)
            mixed, cache = _attend_cache(qkv, rotations_bsr, cache, layer, kernels)
        # One contracted axis: with three axes, XLA may reorder them and transpose the weight in every step.
        mixed = mixed.reshape(*x_bsd.shape[:2], c.num_heads * h)
        axes = ("kv_heads", "heads_per_kv", "head_dim", "embed")
        return product("bsn,nd->bsd", mixed, name="out", shape=(k, g, h, d), axes=axes), cache


def _roped(qkv_bskph: jax.Array, rotations_bsr: Rotations) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, S, K, G, H] and keys [B, S, K, H] with RoPE, and values [B, S, K, H]."""
    groups = qkv_bskph.shape[3] - 2
    queries_keys = rope(qkv_bskph[:, :, :, : groups + 1], rotations_bsr)
    return queries_keys[:, :, :, :groups], queries_keys[:, :, :, groups], qkv_bskph[:, :, :, groups + 1]


def _attend_cache(
    qkv_bskph: jax.Array, rotations_bsr: Rotations, cache: KVCache, layer: int, kernels: str
) -> tuple[jax.Array, KVCache]:
    """Writes keys and values to a layer of the cache, and computes attention over it.

    Args:
        qkv_bskph: [B, S, K, G + 2, H], the projected queries, key and value of each KV head, without RoPE.
        rotations_bsr: cosines and sines of the positions, from `rotations`.
        cache: the cache.
        layer: index of the layer.
        kernels: from `attention.KERNELS`, but not "auto".

    Returns:
        [B, S, K, G, H], for "pallas" [B, K, G, H]; and the cache.
    """
    name, interpret = kernels.removesuffix("-interpreted"), kernels.endswith("-interpreted")
    where = (cache.length, cache.start)
    # The modules with kernels import Pallas, which takes long. So they are imported only where they are used.
    if name == "pallas":
        from emu3_jax.models.decode_kernels import attend_one

        cos, sin = (part[:, 0] for part in rotations_bsr)
        mixed, kept = attend_one(qkv_bskph[:, 0], (cos, sin), cache.layer(layer), *where, interpret=interpret)
        return mixed, cache.with_layer(layer, *kept)
    if name == "pallas-hopper":
        from emu3_jax.models import window_kernels_hopper as hopper
        from emu3_jax.models.window_writes_hopper import CHUNK

        if qkv_bskph.shape[1] % CHUNK == 0:
            arguments = (qkv_bskph, rotations_bsr, cache.layer(layer), *where)
            mixed, kept = hopper.attend_projected(*arguments, interpret=interpret)
            return mixed, cache.with_layer(layer, *kept)
    queries, keys, values = _roped(qkv_bskph, rotations_bsr)
    cache = cache.write(layer, jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2))
    kept = cache.layer(layer)
    if name == "pallas-hopper":
        return hopper.attend_window(queries, kept, *where, interpret=interpret), cache
    if name == "pallas-tpu":
        from emu3_jax.models.window_kernels_tpu import attend_window

        return attend_window(queries, kept, *where, interpret=interpret), cache
    if cache.placement is not None:
        return placed_attention(queries, *kept, visible=cache.placement.visible), cache
    return cached_attention(queries, *kept, first_query=cache.length, start=cache.start), cache


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)). Gate and up are one fused projection."""

    config: DecoderConfig
    adapter: Adapter | None = None
    kernels: str = "auto"

    @nn.compact
    def __call__(self, x_bsd: jax.Array) -> jax.Array:
        d, f = self.config.hidden_size, self.config.intermediate_size
        product = functools.partial(project, self, self.adapter, kernels=self.kernels)
        axes = ("embed", None, "mlp")
        gate_up = product("bsd,dcf->bscf", x_bsd, name="gate_up", shape=(d, 2, f), axes=axes)
        hidden = _finite(jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1])
        return product("bsf,fd->bsd", hidden, name="down", shape=(f, d), axes=("mlp", "embed"))


class Block(nn.Module):
    """One transformer layer: pre-norm attention and pre-norm MLP, each added to the residual stream.

    Returns (residual stream, cache). Without a cache, this is the form of a scan body: (carry, None).
    """

    config: DecoderConfig
    implementation: str
    adapter: Adapter | None = None
    kernels: str = "auto"
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        x_bsd: jax.Array,
        rotations_bsr: Rotations,
        segments_bs: jax.Array | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> tuple[jax.Array, KVCache | None]:
        epsilon, adapter = self.config.rms_norm_eps, self.adapter
        attention = Attention(self.config, self.implementation, adapter, self.kernels, name="attention")
        normed = RMSNorm(epsilon, adapter, name="attention_norm")(x_bsd)
        mixed, cache = attention(normed, rotations_bsr, segments_bs, cache, layer)
        dropped = nn.Dropout(self.dropout, deterministic=False)
        x_bsd = _residual(x_bsd + dropped(mixed), cache)
        mlp = MLP(self.config, adapter, self.kernels, name="mlp")
        mixed = mlp(RMSNorm(epsilon, adapter, name="mlp_norm")(x_bsd))
        return _residual(x_bsd + dropped(mixed), cache), cache


def _residual(x_bsd: jax.Array, cache: KVCache | None) -> jax.Array:
    """Shards the residual stream. Generation steps (with a cache) are too short to split along the sequence."""
    x_bsd = _finite(x_bsd)
    x_bsd = nn.with_logical_constraint(x_bsd, ("batch", "sequence" if cache is None else None, "width"))
    if cache is None or jax.sharding.get_abstract_mesh().empty or target_platform() != "gpu":
        return x_bsd
    # Without the barrier, when GPUs share a layer, XLA recomputes the sum over all previous layers for each norm. On
    # two H200, that takes 28 us in the last layers.
    return jax.lax.optimization_barrier(x_bsd)


def _finite(x: jax.Array) -> jax.Array:
    """Clips float16 numbers to the largest finite one. A single infinity would turn all later tokens into NaN."""
    largest = jnp.finfo(jnp.float16).max
    return jnp.clip(x, -largest, largest) if x.dtype == jnp.float16 else x


class Embedding(nn.Module):
    """A table [V, D]: `lookup` uses it as the embedding, `logits` as the head. The two tables are not tied."""

    config: DecoderConfig
    weight_name: str
    rows: int
    adapter: Adapter | None = None
    kernels: str = "auto"

    def setup(self) -> None:
        width = self.config.hidden_size
        init = nn.with_logical_partitioning(nn.initializers.normal(width**-0.5), ("vocab", "table_width"))
        self.scales = None
        if self.has_variable("params", f"{self.weight_name}_codes"):  # see `models.quantization`
            self.table, self.scales = (
                self.get_variable("params", f"{self.weight_name}_{leaf}") for leaf in ("codes", "scales")
            )
            return
        self.table = self.param(self.weight_name, init, (self.rows, width), weight_dtype(self.adapter))

    def lookup(self, tokens_bs: jax.Array) -> jax.Array:
        # On a mesh, tokens are exchanged instead of the table. Each device looks up its part of the width for all rows.
        tokens_bs = nn.with_logical_constraint(tokens_bs, ("lookup_batch", None))
        x_bsd = self.table[tokens_bs].astype(self.config.dtype)
        # Reshard from width to rows in steps of one collective each; in one step, XLA's partitioner would replicate.
        for axes in (("lookup_batch", "table_width"), ("lookup_batch", "embed"), ("batch", "lookup_width")):
            x_bsd = nn.with_logical_constraint(x_bsd, (axes[0], None, axes[1]))
        return x_bsd

    def logits(self, x_bsd: jax.Array) -> jax.Array:
        if self.scales is not None:
            logits = multiply(x_bsd, self.table, self.scales, self.kernels)
        else:
            table, precision = self.table.astype(x_bsd.dtype), matmul_precision(x_bsd.dtype)
            logits = jnp.einsum("bsd,vd->bsv", x_bsd, table, precision=precision, preferred_element_type=jnp.float32)
        # Logits are not split along the vocabulary: the table is split by width, so it would be moved in every step.
        return nn.with_logical_constraint(logits, ("batch", None, None))


def _products(primitive: Any, *avals: Any, **params: Any) -> bool:
    """The remat policy "dots": keeps the results of projections (with the adapter's part added) and of attention."""
    named = jax.checkpoint_policies.save_only_these_names(PROJECTION, ATTENTION)
    # Without segments, cuDNN's residuals have no checkpoint names, because JAX makes them inside its own rule for
    # differentiation. With segments, `models.switching` names them.
    return primitive.name.startswith("dot_product_attention_fwd") or named(primitive, *avals, **params)


# What each layer keeps for the backward pass. The backward pass recomputes everything else.
REMAT_POLICIES: dict[str, Any] = {"full": jax.checkpoint_policies.nothing_saveable, "dots": _products}


class Decoder(nn.Module):
    """The whole decoder. It computes in `config.dtype`; logits are float32.

    Parameters have two forms (`models.stacking` converts between them). Bundles store, and decoding unrolls, one
    subtree per layer: `layers_0`, `layers_1`, ... Training scans over one subtree `layers` (with `stacked`), whose
    arrays have a leading layer axis.

    Attributes:
        config: shapes and numerics.
        visual_head: whether the head has only the visual rows (see `visual_head_params`). This is exact where only
            visual tokens are legal. Column 0 of the logits is then token id `config.tokens.visual_start`.
        stacked: whether to scan over stacked layers. Compile time does not grow with their number. Not with a cache.
        remat: what the backward pass recomputes in each layer: "none", "full" (everything) or "dots" (everything but
            products with weights, and attention if a fused kernel computes it).
        unroll: number of layers that one iteration of the scan computes. The number of layers or more: no loop, so XLA
            need not copy each layer's weights and kept results out of and into the stacks.
        attention: implementation of attention for whole sequences, see `attention.self_attention`.
        adapter: low-rank adapters beside frozen matrices. `training.lora` makes their parameters.
        kernels: implementation of attention over the cache, see `attention.choose_kernels`, and of products with
            codes, see `products.choose_products`.
        dropout: dropout rate of the embeddings and of the outputs of each attention and MLP. Needs a key "dropout".
    """

    config: DecoderConfig
    visual_head: bool = False
    stacked: bool = False
    remat: str = "none"
    unroll: int = 1
    attention: str = "auto"
    adapter: Adapter | None = None
    kernels: str = "auto"
    dropout: float = 0.0

    def setup(self) -> None:
        c = self.config
        self.embed = Embedding(c, "embedding", c.vocab_size, self.adapter)
        block, looped = Block, self.stacked and self.unroll < c.num_layers
        if self.remat != "none":
            # Outside a loop, `prevent_cse` keeps XLA from merging the recomputation with the forward pass. Inside a
            # loop XLA cannot merge them.
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=not looped)
        if self.stacked:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, nn.broadcast),
                length=c.num_layers,
                unroll=min(self.unroll, c.num_layers),
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            self.layers = scanned(c, self.attention, self.adapter, dropout=self.dropout)
        else:
            arguments = (c, self.attention, self.adapter, self.kernels, self.dropout)
            self.layers = [block(*arguments) for _ in range(c.num_layers)]
        self.embed_dropout = nn.Dropout(self.dropout, deterministic=False)
        self.norm = RMSNorm(c.rms_norm_eps, self.adapter)
        rows = c.tokens.visual_count if self.visual_head else c.vocab_size
        self.head = Embedding(c, "kernel", rows, self.adapter, self.kernels)

    def __call__(
        self, tokens_bs: jax.Array, cache: KVCache | None = None, *, last_only: bool | jax.Array = False
    ) -> tuple[jax.Array, KVCache | None]:
        """Logits of the next token, after each token of `tokens_bs`.

        Args:
            tokens_bs: int32 [B, S]. Without a cache: whole sequences, from position 0 on. With a cache: the tokens of
                the next S slots, or those of `cache.placement`. Slots before a row's `cache.start` are padding, and
                their results are meaningless.
            cache: keys and values of the previous tokens, or None to use no cache.
            last_only: compute only the logits of the last token (S becomes 1). With a cache, int32 [B] names another
                token of each row: the last one of rows that have padding after it.

        Returns:
            Logits, float32 [B, S, V]; and the cache with S more slots filled, or None.
        """
        if cache is None:
            hidden = self.hidden(tokens_bs)
        else:
            hidden, cache = self.hidden_cached(tokens_bs, cache, last_only=last_only)
            return self.head.logits(hidden), cache
        return self.head.logits(hidden if last_only is False else _last(hidden, last_only)), cache

    def hidden_cached(
        self, tokens_bs: jax.Array, cache: KVCache, *, last_only: bool | jax.Array = False
    ) -> tuple[jax.Array, KVCache]:
        """As `__call__` with a cache, but returns the hidden states [B, S, D] that the head multiplies."""
        rotations_bsr = self._rotations(cache.positions(tokens_bs.shape[1]))
        x_bsd = _residual(self.embed.lookup(tokens_bs), cache)
        for index, block in enumerate(self.layers):
            x_bsd, cache = block(x_bsd, rotations_bsr, None, cache, index)
        cache = cache.replace(length=cache.length + tokens_bs.shape[1])
        return self.norm(x_bsd if last_only is False else _last(x_bsd, last_only)), cache

    def logits(self, hidden_bsd: jax.Array) -> jax.Array:
        """The product with the head: float32 [B, S, V], given what `hidden_cached` returns."""
        return self.head.logits(hidden_bsd)

    def hidden(
        self, tokens_bs: jax.Array, positions_bs: jax.Array | None = None, segments_bs: jax.Array | None = None
    ) -> jax.Array:
        """The hidden states that the head multiplies, for losses that never hold all logits (`training.losses`).

        Args:
            tokens_bs: int32 [B, S].
            positions_bs: int32 [B, S], counted within each segment; by default 0, 1, ...
            segments_bs: int32 [B, S]. A token of segment n attends to earlier tokens of segment n. A token of segment
                -n attends to segment n, and no token attends to it. None: each row is one segment.

        Returns:
            [B, S, D] in the compute dtype, after the last norm.
        """
        if positions_bs is None:
            positions_bs = jnp.broadcast_to(jnp.arange(tokens_bs.shape[1], dtype=jnp.int32), tokens_bs.shape)
        x_bsd = _residual(self.embed_dropout(self.embed.lookup(tokens_bs)), None)
        rotations_bsr = self._rotations(positions_bs)
        if self.stacked:
            x_bsd, _ = self.layers(x_bsd, rotations_bsr, segments_bs)
        else:
            for block in self.layers:
                x_bsd, _ = block(x_bsd, rotations_bsr, segments_bs)
        return self.norm(x_bsd)

    def _rotations(self, positions_bs: jax.Array) -> Rotations:
        return rotations(positions_bs, self.config.head_dim, self.config.rope_theta)


def _last(x_bsd: jax.Array, index: bool | jax.Array) -> jax.Array:
    """The last token of each row, or the token with this index (int32 [B]): [B, 1, D]."""
    if isinstance(index, bool):
        return x_bsd[:, -1:]
    return jnp.take_along_axis(x_bsd, index[:, None, None], axis=1)


def visual_head_params(params: Params, config: DecoderConfig) -> Params:
    """`params` with only the visual rows of the head, for `Decoder(config, visual_head=True)`."""
    special = config.tokens
    rows = slice(special.visual_start, special.visual_end)
    return {**params, "head": {name: leaf[rows] for name, leaf in params["head"].items()}}

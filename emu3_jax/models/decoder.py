"""The decoder: a LLaMA-like transformer over text and visual tokens, as a pure function of (params, inputs).

B batch, S sequence, T cache slots, D width, V vocabulary, K KV heads, G query heads per KV head (the reference's query
head n is k * G + g), H head width, F MLP width.

Logical axes of the weights: "vocab", "embed" (D), "kv_heads" (K), "heads_per_kv" (G, or G + 2 in the fused projection),
"head_dim" (H), "mlp" (F).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from emu3_jax.config import DecoderConfig
from emu3_jax.models.attention import attend, matmul_precision
from emu3_jax.models.cache import KVCache


def _weight(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], fan_in: int):
    """A float32 master weight, drawn with variance 1 / fan_in, that knows its logical axes."""
    init = nn.initializers.normal(fan_in**-0.5)
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)


class RMSNorm(nn.Module):
    """x / rms(x) * scale: the norm in float32, the scale in x's dtype, as the reference does."""

    epsilon: float

    @nn.compact
    def __call__(self, x_bsd: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
        scale = self.param("scale", init, x_bsd.shape[-1:], jnp.float32)
        x32 = x_bsd.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        return normed.astype(x_bsd.dtype) * scale.astype(x_bsd.dtype)


def rope(x_bs_h: jax.Array, positions_bs: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding, halves rotated against each other; angles in float32.

    Args:
        x_bs_h: [B, S, ..., H] queries or keys.
        positions_bs: int32 [B, S].
        theta: base of the frequencies.
    """
    width = x_bs_h.shape[-1]
    frequencies = 1.0 / np.float32(theta) ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    angles = positions_bs.astype(jnp.float32)[..., None] * frequencies
    angles = angles.reshape(*angles.shape[:2], *(1,) * (x_bs_h.ndim - 3), width // 2)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    low, high = jnp.split(x_bs_h.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x_bs_h.dtype)


class Attention(nn.Module):
    """Grouped-query attention with one fused projection, laid out by KV head so that it shards over KV heads."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_bsd, positions_bs, cache: KVCache | None, layer: int):
        c = self.config
        d, k, h = c.hidden_size, c.num_kv_heads, c.head_dim
        g = c.num_heads // k
        precision = matmul_precision(x_bsd.dtype)
        w_qkv = _weight(self, "qkv", (d, k, g + 2, h), ("embed", "kv_heads", "heads_per_kv", "head_dim"), d)
        w_out = _weight(self, "out", (k, g, h, d), ("kv_heads", "heads_per_kv", "head_dim", "embed"), c.num_heads * h)
        qkv = jnp.einsum("bsd,dkph->bskph", x_bsd, w_qkv.astype(x_bsd.dtype), precision=precision)
        queries_keys = rope(qkv[:, :, :, : g + 1], positions_bs, c.rope_theta)
        keys = jnp.swapaxes(queries_keys[:, :, :, g], 1, 2)
        values = jnp.swapaxes(qkv[:, :, :, g + 1], 1, 2)
        if cache is None:
            first, start = jnp.zeros((), jnp.int32), jnp.zeros(x_bsd.shape[:1], jnp.int32)
        else:
            cache = cache.write(layer, keys, values)
            keys, values = cache.keys[layer], cache.values[layer]
            first, start = cache.length, cache.start
        mixed = attend(queries_keys[:, :, :, :g], keys, values, first, start)
        # One contracted axis: with three, XLA may choose another order of them and transpose the weight every step.
        mixed = mixed.reshape(*x_bsd.shape[:2], c.num_heads * h)
        w_out = w_out.reshape(c.num_heads * h, d).astype(x_bsd.dtype)
        return jnp.einsum("bsn,nd->bsd", mixed, w_out, precision=precision), cache


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one projection."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_bsd: jax.Array) -> jax.Array:
        d, f = self.config.hidden_size, self.config.intermediate_size
        precision = matmul_precision(x_bsd.dtype)
        w_gate_up = _weight(self, "gate_up", (d, 2, f), ("embed", None, "mlp"), d)
        w_down = _weight(self, "down", (f, d), ("mlp", "embed"), f)
        gate_up = jnp.einsum("bsd,dcf->bscf", x_bsd, w_gate_up.astype(x_bsd.dtype), precision=precision)
        hidden = jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1]
        return jnp.einsum("bsf,fd->bsd", hidden, w_down.astype(x_bsd.dtype), precision=precision)


class Block(nn.Module):
    """One transformer layer: pre-norm attention and pre-norm MLP, each added to the residual stream."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_bsd, positions_bs, cache: KVCache | None, layer: int):
        epsilon = self.config.rms_norm_eps
        normed = RMSNorm(epsilon, name="attention_norm")(x_bsd)
        mixed, cache = Attention(self.config, name="attention")(normed, positions_bs, cache, layer)
        x_bsd = x_bsd + mixed
        return x_bsd + MLP(self.config, name="mlp")(RMSNorm(epsilon, name="mlp_norm")(x_bsd)), cache


class Embedding(nn.Module):
    """The token table: looked up as the embedding, multiplied as the (untied) head."""

    config: DecoderConfig
    weight_name: str
    rows: int

    def setup(self):
        width = self.config.hidden_size
        self.table = _weight(self, self.weight_name, (self.rows, width), ("vocab", "embed"), width)

    def lookup(self, tokens_bs: jax.Array) -> jax.Array:
        return self.table[tokens_bs].astype(self.config.dtype)

    def logits(self, x_bsd: jax.Array) -> jax.Array:
        table = self.table.astype(x_bsd.dtype)
        precision = matmul_precision(x_bsd.dtype)
        return jnp.einsum("bsd,vd->bsv", x_bsd, table, precision=precision, preferred_element_type=jnp.float32)


class Decoder(nn.Module):
    """The whole decoder. Computes in `config.dtype`; logits are float32.

    `params` holds one subtree per layer (`layers_0`, ...), the form that bundles store and decoding unrolls.

    Attributes:
        config: shapes and numerics.
        visual_head: the head has only the visual rows (`visual_head_params` cuts them out), which is exact wherever
            only visual tokens are legal; column 0 of the logits is then token id `config.tokens.visual_start`.
    """

    config: DecoderConfig
    visual_head: bool = False

    def setup(self):
        c = self.config
        self.embed = Embedding(c, "embedding", c.vocab_size)
        self.layers = [Block(c) for _ in range(c.num_layers)]
        self.norm = RMSNorm(c.rms_norm_eps)
        self.head = Embedding(c, "kernel", c.tokens.visual_count if self.visual_head else c.vocab_size)

    def __call__(self, tokens_bs, cache: KVCache | None = None, *, last_only: bool = False):
        """Logits of the next token after each token of `tokens_bs`.

        Args:
            tokens_bs: int32 [B, S]. Without a cache, whole sequences that begin at position 0. With one, the tokens
                for the next S slots; slots before a row's `cache.start` hold padding, whose results mean nothing.
            cache: what came before; None means nothing did and nothing need be kept.
            last_only: logits of the last token alone (S becomes 1).

        Returns:
            (logits float32 [B, S, V], the cache with S more slots filled).
        """
        count = tokens_bs.shape[1]
        if cache is None:
            positions = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), tokens_bs.shape)
        else:
            positions = cache.positions(count)
        x_bsd = self.embed.lookup(tokens_bs)
        for index, block in enumerate(self.layers):
            x_bsd, cache = block(x_bsd, positions, cache, index)
        if cache is not None:
            cache = cache.replace(length=cache.length + count)
        if last_only:
            x_bsd = x_bsd[:, -1:]
        return self.head.logits(self.norm(x_bsd)), cache


def visual_head_params(params, config: DecoderConfig):
    """`params` with the head cut to its visual rows, for `Decoder(config, visual_head=True)`."""
    special = config.tokens
    return {**params, "head": {"kernel": params["head"]["kernel"][special.visual_start : special.visual_end]}}

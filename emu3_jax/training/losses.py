"""Next-token cross-entropy in chunks, so that the logits of a whole row never exist. See `training.head`.

B batch, S sequence, D width, V vocabulary, N tokens of one device, C tokens of one chunk.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from emu3_jax.models.attention import matmul_precision
from emu3_jax.training.head import CHUNK, HeadLayout, chunked, head_logits, own_rows


@flax.struct.dataclass
class LossSums:
    """Summed losses of text and visual targets. Add the sums of several batches with `jax.tree.map`.

    Attributes:
        text: float32 scalar, weighted negative log-likelihood of targets outside the visual ids, in nats.
        vision: float32 scalar, weighted negative log-likelihood of targets inside the visual ids, in nats.
        text_count: float32 scalar, sum of the weights of targets outside the visual ids.
        vision_count: float32 scalar, sum of the weights of targets inside the visual ids.
    """

    text: jax.Array
    vision: jax.Array
    text_count: jax.Array
    vision_count: jax.Array

    @property
    def count(self) -> jax.Array:
        """Sum of the weights of all targets, float32 scalar."""
        return self.text_count + self.vision_count


def next_tokens(tokens_bs: jax.Array, target_bs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Shifts a batch by one token: what each position must predict.

    Args:
        tokens_bs: int32 [B, S].
        target_bs: bool [B, S], which tokens are targets.

    Returns:
        int32 [B, S], the id of the next token; and bool [B, S], whether the next token is a target. The last position
        has no next token, so it is False there.
    """
    last = jnp.arange(tokens_bs.shape[1])[None] == tokens_bs.shape[1] - 1
    return jnp.roll(tokens_bs, -1, axis=1), jnp.where(last, False, jnp.roll(target_bs, -1, axis=1))


def chunked_cross_entropy(
    hidden_bsd: jax.Array,
    head_vd: jax.Array,
    labels_bs: jax.Array,
    mask_bs: jax.Array,
    visual: tuple[int, int],
    *,
    vision_weight: float = 1.0,
    chunk: int = CHUNK,
) -> tuple[jax.Array, LossSums]:
    """Cross-entropy of `labels_bs` under softmax(hidden . head), computed in float32 over chunks of tokens.

    Under differentiation, the forward pass computes the gradients too, while it has the logits. The backward pass need
    not compute the logits again, which saves a quarter of the head's work (a third if the head is frozen).

    Args:
        hidden_bsd: [B, S, D], output of the decoder's method `hidden`. Matrix products use its dtype.
        head_vd: [V, D], the head's kernel.
        labels_bs: int32 [B, S], the id that each position predicts (see `next_tokens`). All ids must be in [0, V).
        mask_bs: [B, S], bool, or the weight of each label in the sums. No gradient flows to it.
        visual: first visual id, and the last one plus 1.
        vision_weight: weight of visual targets in the objective.
        chunk: number of tokens per device whose logits exist at the same time.

    Returns:
        The objective, a float32 scalar: text + vision_weight * vision, whose gradients flow to `hidden_bsd` and
        `head_vd`; and the sums for text and visual targets, which have no gradients.
    """
    weights = mask_bs.astype(jnp.float32)
    is_visual = (labels_bs >= visual[0]) & (labels_bs < visual[1])
    by_kind = jnp.stack([jnp.where(is_visual, 0.0, weights), jnp.where(is_visual, weights, 0.0)])
    objective, sums = _weighted(_How(chunk, vision_weight), hidden_bsd, head_vd, labels_bs, by_kind)
    counts = by_kind.sum(axis=(1, 2))
    return objective, LossSums(text=sums[0], vision=sums[1], text_count=counts[0], vision_count=counts[1])


# ------------------------------------------------------------------------------------------------ gradients


@dataclasses.dataclass(frozen=True)
class _How:
    """The static arguments of `chunked_cross_entropy`."""

    chunk: int
    vision_weight: float


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted(
    how: _How, hidden: jax.Array, head: jax.Array, labels: jax.Array, by_kind: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The objective, and float32 [2]: summed losses of text and of visual targets, weighted by `by_kind` [2, B, S]."""
    layout = HeadLayout.current(hidden.shape)
    local = functools.partial(_local, layout=layout, how=how, differentiated=False)
    sums, _, _ = layout.spread(local, layout.inputs, (P(), None, None))(hidden, head, labels, by_kind)
    return sums[0] + how.vision_weight * sums[1], sums


def _weighted_forward(
    how: _How, hidden: jax.Array, head: jax.Array, labels: jax.Array, by_kind: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    layout = HeadLayout.current(hidden.shape)
    local = functools.partial(_local, layout=layout, how=how, differentiated=True)
    outputs = (P(), layout.hidden, layout.head)
    sums, d_hidden, d_head = layout.spread(local, layout.inputs, outputs)(hidden, head, labels, by_kind)
    zeros = (np.zeros(labels.shape, jax.dtypes.float0), jnp.zeros_like(by_kind))
    return (sums[0] + how.vision_weight * sums[1], sums), (d_hidden, d_head, zeros)


def _weighted_backward(how: _How, residuals: Any, cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    d_hidden, d_head, zeros = residuals
    pull = cotangents[0]
    return (d_hidden * pull.astype(d_hidden.dtype), d_head * pull.astype(d_head.dtype), *zeros)


_weighted.defvjp(_weighted_forward, _weighted_backward)


# ------------------------------------------------------------------------------------------------ one device


def _local(
    hidden: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    by_kind: jax.Array,
    *,
    layout: HeadLayout,
    how: _How,
    differentiated: bool,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """One device's work: the sums over all devices and, if `differentiated`, the gradients of `hidden` and `head`."""
    width = hidden.shape[-1]
    rows, first = layout.gather_head(head.astype(hidden.dtype))
    product = functools.partial(
        jnp.einsum, precision=matmul_precision(hidden.dtype), preferred_element_type=jnp.float32
    )

    def step(carry: Any, part: Any) -> tuple[Any, Any]:
        sums, d_rows = carry
        h_cd, label_c, weight_kc = part
        logits_cv = head_logits(h_cd, rows, first, len(head))
        top_c = layout.max_over_vocabulary(logits_cv.max(axis=-1))
        normaliser_c = top_c + jnp.log(layout.sum_over_vocabulary(jnp.exp(logits_cv - top_c[:, None]).sum(axis=-1)))
        mine_c, at_c = own_rows(label_c, first, len(rows))
        picked_c = jnp.where(mine_c, jnp.take_along_axis(logits_cv, at_c[:, None], axis=-1)[:, 0], 0.0)
        loss_c = normaliser_c - layout.sum_over_vocabulary(picked_c)
        sums += weight_kc @ loss_c
        if not differentiated:
            return (sums, d_rows), None
        pull_c = weight_kc[0] + how.vision_weight * weight_kc[1]
        hit_cv = mine_c[:, None] & (at_c[:, None] == jnp.arange(len(rows))[None])
        d_logits_cv = ((jnp.exp(logits_cv - normaliser_c[:, None]) - hit_cv) * pull_c[:, None]).astype(hidden.dtype)
        d_h_cd = product("cv,vd->cd", d_logits_cv, rows)
        d_rows += product("cv,cd->vd", d_logits_cv, h_cd)
        return (sums, d_rows), d_h_cd.astype(hidden.dtype)

    parts = (
        chunked(hidden.reshape(-1, width), how.chunk),
        chunked(labels.reshape(-1), how.chunk),
        jnp.swapaxes(jax.vmap(lambda w: chunked(w.reshape(-1), how.chunk))(by_kind), 0, 1),
    )
    start: Any = (jnp.zeros(2, jnp.float32), jnp.zeros(rows.shape, jnp.float32) if differentiated else None)
    (sums, d_rows), d_hidden = lax.scan(step, start, parts)
    sums = layout.sum_over_tokens(sums)
    if not differentiated:
        return sums, None, None
    d_hidden = layout.sum_over_vocabulary(d_hidden.reshape(-1, width)[: labels.size].reshape(hidden.shape))
    return sums, d_hidden, layout.scatter_head(d_rows, len(head)).astype(head.dtype)

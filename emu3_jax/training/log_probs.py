"""Log-probabilities of tokens, and the entropy beside them, in chunks. Preference tuning and GRPO share them.

B batch, S sequence, D width, V vocabulary, C tokens of one chunk. `training.head` says how a mesh splits the work.

`losses.chunked_cross_entropy` computes its gradients in the forward pass, because each token's weight is known by then.
Here the weights follow from all tokens of a sequence, so the backward pass computes the logits once more.

Two other policies need no further function. Logits are linear in the hidden states, so guided hidden states give guided
logits. For a policy that draws only some ids, give the head's rows of these ids.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from emu3_jax.models.attention import matmul_precision
from emu3_jax.training.head import CHUNK, HeadLayout, chunked, head_logits, own_rows


def token_log_probs(
    hidden_bsd: jax.Array, head_vd: jax.Array, labels_bs: jax.Array, *, chunk: int = CHUNK
) -> tuple[jax.Array, jax.Array]:
    """The log-probability of each label under softmax(hidden . head), and the entropy of that distribution, in nats.

    Args:
        hidden_bsd: [B, S, D], output of the decoder's method `hidden`. Matrix products use its dtype.
        head_vd: [V, D], the head's kernel.
        labels_bs: int32 [B, S], the id that each position predicts (see `losses.next_tokens`), in [0, V).
        chunk: number of tokens per device whose logits exist at the same time.

    Returns:
        Log-probabilities, float32 [B, S], whose gradients flow to `hidden_bsd` and `head_vd`; and entropies, float32
        [B, S], which have no gradients.
    """
    log_probs, entropy, _ = _log_probs(chunk, hidden_bsd, head_vd, labels_bs)
    return log_probs, lax.stop_gradient(entropy)


def sequence_log_probs(log_probs_bs: jax.Array, mask_bs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums the log-probabilities of each row's targets.

    Args:
        log_probs_bs: float32 [B, S], from `token_log_probs`.
        mask_bs: bool [B, S], which labels count.

    Returns:
        float32 [B] sums, and float32 [B] numbers of targets.
    """
    return jnp.where(mask_bs, log_probs_bs, 0.0).sum(axis=1), mask_bs.sum(axis=1, dtype=jnp.float32)


# ------------------------------------------------------------------------------------------------ gradients


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_probs(
    chunk: int, hidden: jax.Array, head: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities, entropies, and the logarithms of the softmax' denominators, all float32 [B, S]."""
    layout = HeadLayout.current(hidden.shape)
    local = functools.partial(_forward_local, layout=layout, chunk=chunk)
    inputs = (layout.hidden, layout.head, layout.tokens)
    return layout.spread(local, inputs, (layout.tokens,) * 3)(hidden, head, labels)


def _forward(chunk: int, hidden: jax.Array, head: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
    found = _log_probs(chunk, hidden, head, labels)
    return found, (hidden, head, labels, found[2])


def _backward(chunk: int, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    hidden, head, labels, normaliser = residuals
    layout = HeadLayout.current(hidden.shape)
    local = functools.partial(_backward_local, layout=layout, chunk=chunk)
    inputs = (layout.hidden, layout.head, layout.tokens, layout.tokens, layout.tokens)
    spread = layout.spread(local, inputs, (layout.hidden, layout.head))
    return *spread(hidden, head, labels, normaliser, cotangents[0]), np.zeros(labels.shape, jax.dtypes.float0)


_log_probs.defvjp(_forward, _backward)


# ------------------------------------------------------------------------------------------------ one device


def _forward_local(
    hidden: jax.Array, head: jax.Array, labels: jax.Array, *, layout: HeadLayout, chunk: int
) -> tuple[jax.Array, ...]:
    rows, first = layout.gather_head(head.astype(hidden.dtype))

    def step(carry: None, part: Any) -> tuple[None, Any]:
        h_cd, label_c = part
        logits_cv = head_logits(h_cd, rows, first, len(head))
        top_c = layout.max_over_vocabulary(logits_cv.max(axis=-1))
        below_cv = logits_cv - top_c[:, None]
        powers_cv = jnp.exp(below_cv)
        total_c = layout.sum_over_vocabulary(powers_cv.sum(axis=-1))
        mine_c, at_c = own_rows(label_c, first, len(rows))
        picked_c = jnp.where(mine_c, jnp.take_along_axis(below_cv, at_c[:, None], axis=-1)[:, 0], 0.0)
        log_p_c = layout.sum_over_vocabulary(picked_c) - jnp.log(total_c)
        # Padding rows have logits of -inf and no probability; their product would not be a number.
        mean_c = layout.sum_over_vocabulary((powers_cv * jnp.where(powers_cv > 0, below_cv, 0.0)).sum(axis=-1))
        return None, (log_p_c, jnp.log(total_c) - mean_c / total_c, top_c + jnp.log(total_c))

    parts = chunked(hidden.reshape(-1, hidden.shape[-1]), chunk), chunked(labels.reshape(-1), chunk)
    _, found = lax.scan(step, None, parts)
    return tuple(x.reshape(-1)[: labels.size].reshape(labels.shape) for x in found)


def _backward_local(
    hidden: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    normaliser: jax.Array,
    pull: jax.Array,
    *,
    layout: HeadLayout,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    width = hidden.shape[-1]
    rows, first = layout.gather_head(head.astype(hidden.dtype))
    product = functools.partial(
        jnp.einsum, precision=matmul_precision(hidden.dtype), preferred_element_type=jnp.float32
    )

    def step(d_rows: jax.Array, part: Any) -> tuple[jax.Array, jax.Array]:
        h_cd, label_c, normaliser_c, pull_c = part
        logits_cv = head_logits(h_cd, rows, first, len(head))
        mine_c, at_c = own_rows(label_c, first, len(rows))
        hit_cv = mine_c[:, None] & (at_c[:, None] == jnp.arange(len(rows))[None])
        d_logits_cv = ((hit_cv - jnp.exp(logits_cv - normaliser_c[:, None])) * pull_c[:, None]).astype(hidden.dtype)
        d_h_cd = product("cv,vd->cd", d_logits_cv, rows)
        return d_rows + product("cv,cd->vd", d_logits_cv, h_cd), d_h_cd.astype(hidden.dtype)

    parts = (
        chunked(hidden.reshape(-1, width), chunk),
        *(chunked(x.reshape(-1), chunk) for x in (labels, normaliser, pull)),
    )
    d_rows, d_hidden = lax.scan(step, jnp.zeros(rows.shape, jnp.float32), parts)
    d_hidden = layout.sum_over_vocabulary(d_hidden.reshape(-1, width)[: labels.size].reshape(hidden.shape))
    return d_hidden, layout.scatter_head(d_rows, len(head)).astype(head.dtype)

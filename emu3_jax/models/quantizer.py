"""The codebook of the vision tokenizer: looks up the vectors of codes, and searches the code of a vector.

Axes: P positions, N blocks of the codebook, K codes, C embedding width.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

# Block sizes of the search. They bound its memory for any size of picture and codebook.
POSITION_BLOCK = 64
CODE_BLOCK = 256
PRODUCT_BLOCK = 128  # positions of the search by dot products: 64 MiB of scores with 131,072 codes

CODEBOOK = ("quantize", "embedding")  # path of the codebook in the vision tokenizer's parameters


class Quantizer(nn.Module):
    """The codebook: `codebook_size` vectors of width `embed_dim` (upstream `Emu3VisionVQVectorQuantizer`)."""

    codebook_size: int
    embed_dim: int

    def setup(self) -> None:
        def uniform(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -1 / shape[0], 1 / shape[0])

        init = nn.with_logical_partitioning(uniform, ("codes", "code_width"))
        self.embedding = self.param("embedding", init, (self.codebook_size, self.embed_dim), jnp.float32)

    def lookup(self, codes: jax.Array) -> jax.Array:
        """The codebook vectors [..., C] of codes [...]."""
        return self.embedding[codes]

    def __call__(self, latents: jax.Array) -> jax.Array:
        """The nearest codes of latents [..., C], int32 [...]."""
        return nearest_codes(latents, self.embedding)


def nearest_codes(latents: jax.Array, codebook: jax.Array) -> jax.Array:
    """The index of the codebook row nearest to each latent. Of equally near rows it is the first.

    The search is exact. It first finds the smallest distance to each block of codes, then the nearest code in the best
    block. So only a minimum runs over the whole codebook, which compilers vectorise (unlike an argmin), and no array of
    positions x codes exists.

    Args:
        latents: float32 [..., C].
        codebook: float32 [K, C].

    Returns:
        int32 [...].
    """
    # The last block is padded with rows at infinity, which are never nearest.
    filled = jnp.pad(codebook, ((0, -len(codebook) % CODE_BLOCK), (0, 0)), constant_values=jnp.inf)
    blocks_nkc = filled.reshape(-1, CODE_BLOCK, latents.shape[-1])

    def search(latents_pc: jax.Array) -> jax.Array:
        nearest_pn = _squared_distance(latents_pc[:, None, None], blocks_nkc[None]).min(-1)
        block_p = nearest_pn.argmin(-1)
        code_p = _squared_distance(latents_pc[:, None], blocks_nkc[block_p]).argmin(-1)
        return (block_p * CODE_BLOCK + code_p).astype(jnp.int32)

    return _in_groups(search, latents, POSITION_BLOCK)


class DotProductQuantizer(Quantizer):
    """The codebook of Emu3.5's vision tokenizer: a latent's code is that of the largest dot product, not the nearest.

    Upstream takes a softmax first, which changes no order (`IndexPropagationQuantize`).
    """

    def __call__(self, latents: jax.Array) -> jax.Array:
        """The codes of latents [..., C], int32 [...]."""
        return codes_of_largest_product(latents, self.embedding)


def codes_of_largest_product(latents: jax.Array, codebook: jax.Array) -> jax.Array:
    """The index of the codebook row with the largest dot product with each latent. Of equal rows it is the first.

    Products are float32 at the highest precision. Positions are processed in groups, so that memory holds
    `PRODUCT_BLOCK` rows of scores, and not those of a whole picture.

    Args:
        latents: float32 [..., C].
        codebook: float32 [K, C].

    Returns:
        int32 [...].
    """

    def search(latents_pc: jax.Array) -> jax.Array:
        scores_pk = jnp.einsum("pc,kc->pk", latents_pc, codebook, precision=jax.lax.Precision.HIGHEST)
        # As in `nearest_codes`: a maximum runs over the whole codebook, an argmax over one block.
        fill = ((0, 0), (0, -len(codebook) % CODE_BLOCK))
        blocks_pnk = jnp.pad(scores_pk, fill, constant_values=-jnp.inf).reshape(len(latents_pc), -1, CODE_BLOCK)
        block_p = blocks_pnk.max(-1).argmax(-1)
        best_pk = jnp.take_along_axis(blocks_pnk, block_p[:, None, None], axis=1)[:, 0]
        return (block_p * CODE_BLOCK + best_pk.argmax(-1)).astype(jnp.int32)

    return _in_groups(search, latents, PRODUCT_BLOCK)


def _in_groups(search: Callable[[jax.Array], jax.Array], latents: jax.Array, size: int) -> jax.Array:
    """`search` of latents [..., C], int32 [...], for groups of `size` latents, one after the other."""
    flat = latents.reshape(-1, latents.shape[-1])
    count = len(flat)
    flat = jnp.pad(flat, ((0, -count % size), (0, 0)))
    codes = jax.lax.map(search, flat.reshape(-1, size, flat.shape[1]))
    return codes.reshape(-1)[:count].reshape(latents.shape[:-1])


def _squared_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """|a - b|^2 over the last axis. The form |a|^2 + |b|^2 - 2ab would lose digits by cancellation."""
    return sum((a[..., i] - b[..., i]) ** 2 for i in range(a.shape[-1]))

"""The decoder's head on a mesh, chunk by chunk: shared by the next-token loss and the log-probabilities of tokens.

The logits of a whole row take 7.6 GB at 10,240 tokens, so both compute them for one chunk of tokens after the other.

D width, V vocabulary, N tokens of one device, C tokens of one chunk.

On a mesh, `shard_map` makes all communication explicit. Each device takes its own tokens and gathers the head once, in
the compute dtype. The `tensor` axis splits the head's rows, so a tensor group shares the vocabulary. Each device sums
the head's gradient in float32 over its chunks; one reduction follows at the end. Without `shard_map`, XLA's partitioner
would reduce that gradient in every chunk.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from emu3_jax.models.attention import matmul_precision

# Tokens per chunk. 1024 x 184,622 float32 logits take 0.76 GB. Each chunk also reads and writes the head's gradient
# (3 GB), so smaller chunks cost time.
CHUNK = 1024
TILE = 128  # the head's rows are padded to a multiple of this


def head_logits(h_cd: jax.Array, rows_vd: jax.Array, first: jax.Array | int, vocabulary: int) -> jax.Array:
    """float32 [C, V] logits of the head's rows from `first` on. Padding rows past the vocabulary get -inf."""
    logits = jnp.einsum(
        "cd,vd->cv", h_cd, rows_vd, precision=matmul_precision(h_cd.dtype), preferred_element_type=jnp.float32
    )
    return jnp.where(first + jnp.arange(len(rows_vd))[None] < vocabulary, logits, -jnp.inf)


def own_rows(label_c: jax.Array, first: jax.Array | int, count: int) -> tuple[jax.Array, jax.Array]:
    """bool [C], which labels are rows `first .. first + count - 1`; and int32 [C], their index there (0 if not)."""
    at = label_c - first
    mine = (at >= 0) & (at < count)
    return mine, jnp.where(mine, at, 0)


def chunked(x: jax.Array, chunk: int) -> jax.Array:
    """Splits [N, ...] into [chunks, C, ...] with C <= `chunk`. Zeros pad the end; chunks are even, so they are few."""
    count = -(-len(x) // chunk)
    size = -(-len(x) // count)
    return jnp.pad(x, ((0, count * size - len(x)), *((0, 0),) * (x.ndim - 1))).reshape(count, size, *x.shape[1:])


@dataclasses.dataclass(frozen=True)
class HeadLayout:
    """How a mesh splits tokens and the head, and the collectives that follow. Without a mesh there are none.

    The fields name mesh axes. Axes of size 1 are left out.
    """

    mesh: Any = None
    batch: tuple[str, ...] = ()  # splits rows of tokens
    sequence: tuple[str, ...] = ()  # splits positions
    gathered: tuple[str, ...] = ()  # splits the head's width; an all-gather restores full width for the products
    vocabulary: tuple[str, ...] = ()  # splits the head's width too; an all-to-all turns it into a split of its rows

    @classmethod
    def current(cls, shape: tuple[int, ...]) -> "HeadLayout":
        """The layout for hidden states of this shape: empty without a mesh, or if the mesh splits them unevenly."""
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return cls()

        def axes(name: str) -> tuple[str, ...]:
            (found,) = nn.logical_to_mesh_axes((name,)) or (None,)
            return tuple(a for a in ((found,) if isinstance(found, str) else found or ()) if mesh.shape[a] > 1)

        batch, sequence, gathered, table = map(axes, ("batch", "sequence", "embed", "table_width"))
        for size, names in zip(shape, (batch, sequence), strict=False):
            if size % math.prod(mesh.shape[a] for a in names):
                return cls()
        return cls(mesh, batch, sequence, gathered, tuple(a for a in table if a not in gathered))

    @property
    def tokens(self) -> P:
        return P(self.batch, self.sequence)

    @property
    def inputs(self) -> tuple[P, P, P, P]:
        return self.hidden, self.head, self.tokens, P(None, self.batch, self.sequence)

    @property
    def hidden(self) -> P:
        return P(self.batch, self.sequence, None)

    @property
    def head(self) -> P:
        return P(None, self.gathered + self.vocabulary)

    def spread(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """Wraps `function` so that each device runs it on its own part."""
        if self.mesh is None:
            return function
        return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def gather_head(self, head: jax.Array) -> tuple[jax.Array, jax.Array | int]:
        """This device's rows of the head in full width, and the index of the first row.

        Zero rows pad each device's part to a multiple of `TILE`. Without padding, bfloat16 products on a GPU take three
        times as long, because 184,622 is no multiple of 8. `head_logits` gives padding rows no probability.
        """
        first: jax.Array | int = 0
        parts = lax.axis_size(self.vocabulary) if self.vocabulary else 1
        head = jnp.pad(head, ((0, -len(head) % (TILE * parts)), (0, 0)))
        if self.vocabulary:
            head = lax.all_to_all(head, self.vocabulary, split_axis=0, concat_axis=1, tiled=True)
            first = lax.axis_index(self.vocabulary) * len(head)
        if self.gathered:
            head = lax.all_gather(head, self.gathered, axis=1, tiled=True)
        return head, first

    def scatter_head(self, d_rows: jax.Array, vocabulary: int) -> jax.Array:
        """Reduces each device's gradient of its rows to this device's part of the head's gradient."""
        if self.gathered:
            d_rows = lax.psum_scatter(d_rows, self.gathered, scatter_dimension=1, tiled=True)
        replicas = tuple(a for a in self.batch + self.sequence if a not in self.gathered)
        if replicas:
            d_rows = lax.psum(d_rows, replicas)
        if self.vocabulary:
            d_rows = lax.all_to_all(d_rows, self.vocabulary, split_axis=1, concat_axis=0, tiled=True)
        return d_rows[:vocabulary]

    def sum_over_tokens(self, x: jax.Array) -> jax.Array:
        axes = self.batch + self.sequence
        return lax.psum(x, axes) if axes else x

    def sum_over_vocabulary(self, x: jax.Array) -> jax.Array:
        return lax.psum(x, self.vocabulary) if self.vocabulary else x

    def max_over_vocabulary(self, x: jax.Array) -> jax.Array:
        return lax.pmax(x, self.vocabulary) if self.vocabulary else x

"""The KV cache: a plain pytree, argument and result of the decoder, donated by the decode loop."""

import functools
from typing import ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from emu3_jax.config import DecoderConfig


@flax.struct.dataclass
class KVCache:
    """Keys and values of every layer for rows that are aligned to the right at prefill.

    All rows write the same slot at the same time, so a step's update is one in-place slice. Row b owns the slots
    `start[b] .. length-1`; the slots before `start[b]` are padding, which no query ever sees.

    Attributes:
        keys: one [B, K, T, H] array per layer (T slots).
        values: likewise.
        start: int32 [B], each row's first slot.
        length: int32 scalar, the slots written so far.
    """

    AXES: ClassVar = ("batch", "kv_heads", "cache_slots", "head_dim")  # logical axes of one layer's array

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    start: jax.Array
    length: jax.Array

    @classmethod
    def create(cls, config: DecoderConfig, start: jax.Array, slots: int) -> "KVCache":
        """An empty cache of `slots` slots for the rows whose first slots are `start` (int32 [B])."""
        shape = (start.shape[0], config.num_kv_heads, slots, config.head_dim)
        zeros = tuple(_place(jnp.zeros(shape, config.dtype)) for _ in range(2 * config.num_layers))
        # Strongly typed scalars: a weakly typed carry would recompile the decode loop on its second call.
        return cls(zeros[: config.num_layers], zeros[config.num_layers :], start, jnp.zeros((), jnp.int32))

    @property
    def slots(self) -> int:
        """T."""
        return self.keys[0].shape[2]

    def grow(self, slots: int) -> "KVCache":
        """The same cache with room for `slots` slots."""
        return self.replace(keys=_pad_slots(self.keys, slots), values=_pad_slots(self.values, slots))

    def write(self, layer: int, keys: jax.Array, values: jax.Array) -> "KVCache":
        """Puts [B, K, S, H] new keys and values into the slots from `length` on; `length` itself stays."""
        at = (0, 0, self.length, 0)
        new = [
            _place(lax.dynamic_update_slice(old[layer], update.astype(old[layer].dtype), at))
            for old, update in ((self.keys, keys), (self.values, values))
        ]
        keys, values = (
            (*old[:layer], array, *old[layer + 1 :]) for old, array in zip((self.keys, self.values), new, strict=True)
        )
        return self.replace(keys=keys, values=values)

    def positions(self, count: int) -> jax.Array:
        """int32 [B, count]: positions of the next `count` tokens, counted from each row's own start."""
        return self.length + jnp.arange(count, dtype=jnp.int32)[None] - self.start[:, None]


def _place(array: jax.Array) -> jax.Array:
    return nn.with_logical_constraint(array, KVCache.AXES)


@functools.partial(jax.jit, static_argnames="slots")
def _pad_slots(arrays: tuple[jax.Array, ...], slots: int) -> tuple[jax.Array, ...]:
    return tuple(jnp.pad(a, ((0, 0), (0, 0), (0, slots - a.shape[2]), (0, 0))) for a in arrays)

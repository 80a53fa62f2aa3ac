"""The KV cache: a plain pytree, argument and result of the decoder, donated by the decode loop."""

import functools
from typing import ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from emu3_jax.config import DecoderConfig
from emu3_jax.models.quantization import narrow_rows


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of every layer for rows that are aligned to the right at prefill.

    All rows write the same slot at the same time, so a step's update is one in-place slice. Row b owns the slots
    `start[b] .. length-1`; the slots before `start[b]` are padding, which no query ever sees.

    Attributes:
        keys: one [B, K, T, H] array per layer (T slots); in a narrow cache int8 codes.
        values: likewise.
        key_scales: of a narrow cache, one float32 [B, K, T] array per layer: a key is its codes times its scale. Else
            empty.
        value_scales: likewise.
        start: int32 [B], each row's first slot.
        length: int32 scalar, the slots written so far.
    """

    AXES: ClassVar = ("batch", "kv_heads", "cache_slots", "head_dim")  # logical axes of one layer's array

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    key_scales: tuple[jax.Array, ...]
    value_scales: tuple[jax.Array, ...]
    start: jax.Array
    length: jax.Array

    @classmethod
    def create(cls, config: DecoderConfig, start: jax.Array, slots: int, narrow: bool = False) -> "KVCache":
        """An empty cache of `slots` slots for the rows whose first slots are `start` (int32 [B])."""
        shape = (start.shape[0], config.num_kv_heads, slots, config.head_dim)

        def zeros(shape: tuple[int, ...], dtype: DTypeLike) -> tuple[jax.Array, ...]:
            return tuple(_place(jnp.zeros(shape, dtype)) for _ in range(config.num_layers))

        dtype = jnp.int8 if narrow else config.dtype
        scales = (zeros(shape[:3], jnp.float32), zeros(shape[:3], jnp.float32)) if narrow else ((), ())
        # Strongly typed scalars: a weakly typed carry would recompile the decode loop on its second call.
        return cls(zeros(shape, dtype), zeros(shape, dtype), *scales, start, jnp.zeros((), jnp.int32))

    @property
    def narrow(self) -> bool:
        """Whether keys and values are codes and scales."""
        return bool(self.key_scales)

    @property
    def slots(self) -> int:
        """T."""
        return self.keys[0].shape[2]

    def grow(self, slots: int) -> "KVCache":
        """The same cache with room for `slots` slots."""
        return self.replace(**{name: _pad_slots(getattr(self, name), slots) for name in _PER_SLOT})

    def layer(self, index: int) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
        """Keys, values, and their scales or None."""
        scales = (self.key_scales[index], self.value_scales[index]) if self.narrow else (None, None)
        return self.keys[index], self.values[index], *scales

    def with_layer(self, index: int, *arrays: jax.Array | None) -> "KVCache":
        """The cache with other arrays in one layer, in `layer`'s order."""
        new = dict(zip(_PER_SLOT, arrays, strict=True))

        def replaced(name: str) -> tuple[jax.Array, ...]:
            old = getattr(self, name)
            return (*old[:index], new[name], *old[index + 1 :]) if old else old

        return self.replace(**{name: replaced(name) for name in _PER_SLOT})

    def write(self, layer: int, keys: jax.Array, values: jax.Array) -> "KVCache":
        """Puts [B, K, S, H] new keys and values into the slots from `length` on; `length` itself stays."""
        key_scales = value_scales = None
        if self.narrow:
            (keys, key_scales), (values, value_scales) = narrow_rows(keys), narrow_rows(values)

        def written(old: jax.Array | None, new: jax.Array | None) -> jax.Array | None:
            if old is None:
                return None
            at = (0, 0, self.length, 0)[: new.ndim]
            return _place(lax.dynamic_update_slice(old, new.astype(old.dtype), at))

        new = (keys, values, key_scales, value_scales)
        return self.with_layer(layer, *map(written, self.layer(layer), new))

    def positions(self, count: int) -> jax.Array:
        """int32 [B, count]: positions of the next `count` tokens, counted from each row's own start."""
        return self.length + jnp.arange(count, dtype=jnp.int32)[None] - self.start[:, None]


_PER_SLOT = ("keys", "values", "key_scales", "value_scales")


def _place(array: jax.Array) -> jax.Array:
    return nn.with_logical_constraint(array, KVCache.AXES[: array.ndim])


@functools.partial(jax.jit, static_argnames="slots")
def _pad_slots(arrays: tuple[jax.Array, ...], slots: int) -> tuple[jax.Array, ...]:
    return tuple(jnp.pad(a, ((0, 0), (0, 0), (0, slots - a.shape[2]), (0, 0))[: a.ndim]) for a in arrays)

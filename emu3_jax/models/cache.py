"""The KV cache: a pytree that the decoder takes and returns, and that the decode loop donates."""

import functools
from collections.abc import Callable
from typing import ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from emu3_jax.config import DecoderConfig
from emu3_jax.models.quantization import narrow_rows


class Placement(flax.struct.PyTreeNode):
    """Where the next N tokens of each row go, if not to the next N slots.

    Attributes:
        slots: int32 [B, N], the slot of each token. It gives the token its position, too. Writes to slots from T on
            are dropped.
        visible: bool [B, N, T], whether a token sees the key in a slot, the keys of the N tokens among them.
    """

    slots: jax.Array
    visible: jax.Array


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of every layer. Prefill aligns the rows to the right.

    Row b owns the slots `start[b] .. length[b]-1`. The slots before `start[b]` are padding, which no query sees. Slots
    from `length[b]` on may hold anything: they are written before a query sees them.

    A narrow cache stores int8 codes and float32 scales: a key is its codes times its scale.

    Attributes:
        keys: one [B, K, T, H] array per layer (T slots), in the compute dtype, or int8 codes in a narrow cache.
        values: one [B, K, T, H] array per layer, as for keys.
        key_scales: in a narrow cache, one float32 [B, K, T] array per layer; else an empty tuple.
        value_scales: as `key_scales`, for values.
        start: int32 [B], first slot of each row.
        length: int32 [B], the slot after the last token of each row.
        lockstep: whether all rows have the same length. Then a write is one in-place slice.
        placement: where the next tokens go, or None for the slots from `length` on. Attention is then XLA's.
    """

    AXES: ClassVar = ("batch", "kv_heads", "cache_slots", "head_dim")  # logical axes of one layer's array

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    key_scales: tuple[jax.Array, ...]
    value_scales: tuple[jax.Array, ...]
    start: jax.Array
    length: jax.Array
    lockstep: bool = flax.struct.field(pytree_node=False, default=True)
    placement: Placement | None = None

    @classmethod
    def create(cls, config: DecoderConfig, start: jax.Array, slots: int, narrow: bool = False) -> "KVCache":
        """An empty cache of `slots` slots. `start` (int32 [B]) is the first slot of each row."""
        shape = (start.shape[0], config.num_kv_heads, slots, config.head_dim)

        def zeros(shape: tuple[int, ...], dtype: DTypeLike) -> tuple[jax.Array, ...]:
            return tuple(_place(jnp.zeros(shape, dtype)) for _ in range(config.num_layers))

        dtype = jnp.int8 if narrow else config.dtype
        scales = (zeros(shape[:3], jnp.float32), zeros(shape[:3], jnp.float32)) if narrow else ((), ())
        return cls(zeros(shape, dtype), zeros(shape, dtype), *scales, start, jnp.zeros(start.shape, jnp.int32))

    @property
    def narrow(self) -> bool:
        """Whether keys and values are stored as int8 codes with scales."""
        return bool(self.key_scales)

    @property
    def slots(self) -> int:
        """The number of slots T."""
        return self.keys[0].shape[2]

    def grow(self, slots: int) -> "KVCache":
        """The same cache, padded to `slots` slots."""
        return self.replace(**{name: _pad_slots(getattr(self, name), slots) for name in _PER_SLOT})

    def layer(self, index: int) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
        """Keys, values, key scales and value scales of a layer. The scales are None in a cache that is not narrow."""
        scales = (self.key_scales[index], self.value_scales[index]) if self.narrow else (None, None)
        return self.keys[index], self.values[index], *scales

    def with_layer(self, index: int, *arrays: jax.Array | None) -> "KVCache":
        """The cache with new arrays in one layer, in the order of `layer`."""
        new = dict(zip(_PER_SLOT, arrays, strict=True))

        def replaced(name: str) -> tuple[jax.Array, ...]:
            old = getattr(self, name)
            return (*old[:index], new[name], *old[index + 1 :]) if old else old

        return self.replace(**{name: replaced(name) for name in _PER_SLOT})

    def write(self, layer: int, keys: jax.Array, values: jax.Array) -> "KVCache":
        """Writes new keys and values [B, K, S, H] to the slots from `length` on, or to those of the placement.

        It does not change `length`.
        """
        key_scales = value_scales = None
        if self.narrow:
            (keys, key_scales), (values, value_scales) = narrow_rows(keys), narrow_rows(values)

        def written(old: jax.Array | None, new: jax.Array | None) -> jax.Array | None:
            if old is None:
                return None
            if self.placement is not None:
                return _written_to_slots(old, new.astype(old.dtype), self.placement.slots)
            if self.lockstep:
                return _place(_written(old, new.astype(old.dtype), self.length[0]))
            return _written_per_row(old, new.astype(old.dtype), self.length)

        new = (keys, values, key_scales, value_scales)
        return self.with_layer(layer, *map(written, self.layer(layer), new))

    def positions(self, count: int) -> jax.Array:
        """Positions of the next `count` tokens, int32 [B, count], counted from each row's start."""
        if self.placement is not None:
            return self.placement.slots - self.start[:, None]
        return (self.length - self.start)[:, None] + jnp.arange(count, dtype=jnp.int32)[None]


_PER_SLOT = ("keys", "values", "key_scales", "value_scales")


def _written(old: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
    """`old`, [B, K, T, H] or [B, K, T], with `new` in the slots from `slot` on."""
    return lax.dynamic_update_slice(old, new, (0, 0, slot, 0)[: old.ndim])


def _written_per_row(old: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    """As `_written`, with a slot per row, int32 [B]. On a mesh, each device writes its own rows and heads."""

    def local(old: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
        return jax.vmap(lambda old, new, slot: _written(old[None], new[None], slot)[0])(old, new, slots)

    return _on_each_device(local, old, new, slots)


def _written_to_slots(old: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    """As `_written`, with a slot per row and token, int32 [B, N]. Tokens beyond the last slot are dropped."""

    def local(old: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
        return jax.vmap(lambda old, new, at: old.at[:, at].set(new, mode="drop"))(old, new, slots)

    return _on_each_device(local, old, new, slots)


def _on_each_device(local: Callable[..., jax.Array], old: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    """`local(old, new, slots)`. On a mesh, each device computes it for its own rows and heads."""
    if jax.sharding.get_abstract_mesh().empty:
        return local(old, new, slots)
    batch = (KVCache.AXES[0], *(None,) * (slots.ndim - 1))
    spec, rows = (nn.logical_to_mesh_axes(axes) for axes in (KVCache.AXES[: old.ndim], batch))
    return jax.shard_map(local, in_specs=(spec, spec, rows), out_specs=spec, check_vma=False)(old, new, slots)


def _place(array: jax.Array) -> jax.Array:
    return nn.with_logical_constraint(array, KVCache.AXES[: array.ndim])


@functools.partial(jax.jit, static_argnames="slots")
def _pad_slots(arrays: tuple[jax.Array, ...], slots: int) -> tuple[jax.Array, ...]:
    return tuple(jnp.pad(a, ((0, 0), (0, 0), (0, slots - a.shape[2]), (0, 0))[: a.ndim]) for a in arrays)

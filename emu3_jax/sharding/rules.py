"""The table that maps logical axes to mesh axes, and the shardings that follow from it.

Models declare the logical axes of their weights and activations. No other place names mesh axes for them.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emu3_jax.compilation import own_settings
from emu3_jax.config import DecoderConfig, VisionTokenizerConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.models.adapters import Adapter
from emu3_jax.models.cache import KVCache
from emu3_jax.models.decoder import Decoder
from emu3_jax.models.vision import vision_module

LOGICAL_AXES: dict[str, str | tuple[str, ...] | None] = {
    # Weights of the decoder. `fsdp` and `sequence` split each matrix by width; `tensor` splits by head and by MLP unit.
    # The vocabulary size 184,622 = 2 * 92,311 has few divisors. So the embedding and the LM head are split by width.
    "embed": ("fsdp", "sequence"),
    "kv_heads": "tensor",
    "heads_per_kv": None,
    "head_dim": None,
    "mlp": "tensor",
    "layers": None,
    "rank": None,
    "vocab": None,
    "table_width": ("fsdp", "sequence", "tensor"),
    # Weights of the vision tokenizer: 1 GB in all, replicated on every device. Only its batches are split.
    "conv_time": None,
    "conv_rows": None,
    "conv_columns": None,
    "conv_in": None,
    "conv_out": None,
    "channels": None,
    "codes": None,
    "code_width": None,
    # Activations. "width" is also the axis of the norms' scales, which are too small to split.
    "batch": ("data", "fsdp"),
    "sequence": "sequence",
    "width": None,
    "cache_slots": None,
    # The embedding lookup. A device looks up its part of the table's width for all tokens, so only `data` splits the
    # tokens. Afterwards the activations change from a split by width to a split by batch.
    "lookup_batch": "data",
    "lookup_width": "sequence",
}

RULES = tuple(LOGICAL_AXES.items())
# Mesh axes that split weights by width only to save memory: each product gathers the weights, or sums over the axes.
_WIDTH_AXES = ("fsdp", "sequence")


@contextlib.contextmanager
def use_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Maps the models' logical axes to `mesh` inside the block, with the settings of `compilation.own_settings`.

    Args:
        mesh: from `make_mesh`; None means a single device, and only the settings change.
    """
    with own_settings():
        if mesh is None:
            yield
            return
        with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
            yield


def spec(*logical: str | None) -> P:
    """The `PartitionSpec` of an array with these logical axes. None stands for an unsplit dimension."""
    return P(*(None if name is None else LOGICAL_AXES[name] for name in logical))


def shardings(abstract: Any, mesh: Mesh, *, gathered: bool = False) -> Any:
    """Computes the sharding of each array in a tree from the logical axes that the model declared.

    Args:
        abstract: abstract arrays from `jax.eval_shape` of `Module.init`, or a tree derived from them, such as an
            optimiser's state. Leaves without an `nn.LogicallyPartitioned` box are replicated on every device.
        mesh: from `make_mesh`.
        gathered: whether only `tensor` splits weights. Then each device of `fsdp` and `sequence` has a copy.

    Returns:
        The same tree, with a `NamedSharding` in place of each array or box. Boxes without an array lose their box.

    Raises:
        Emu3Error: the mesh does not divide an axis of a weight evenly.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, P())
        if not hasattr(leaf.value, "shape"):  # optax's mark of a weight that another optimiser updates
            return leaf.value
        _check_even("/".join(_key(entry) for entry in path), leaf.names, leaf.value.shape, mesh)
        place = spec(*leaf.names)
        return NamedSharding(mesh, P(*map(_gathered, place)) if gathered else place)

    return jax.tree_util.tree_map_with_path(
        place, abstract, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    )


def decoder_shardings(
    config: DecoderConfig,
    mesh: Mesh,
    *,
    stacked: bool = False,
    adapter: Adapter | None = None,
    gathered: bool = False,
) -> dict[str, Any]:
    """Shardings of the decoder's parameters, in the same tree: one subtree per layer, or one in all if `stacked`.

    `gathered`: see `shardings`.
    """
    return shardings(_abstract_decoder(config, stacked, adapter), mesh, gathered=gathered)


def vision_shardings(config: VisionTokenizerConfig, mesh: Mesh) -> dict[str, Any]:
    """Shardings of the vision tokenizer's parameters, in the same tree."""
    return shardings(_abstract_vision(config), mesh)


# A run asks for the same shardings several times, and tracing `init` takes some tenths of a second.
@functools.lru_cache(maxsize=16)
def _abstract_decoder(config: DecoderConfig, stacked: bool, adapter: Adapter | None) -> Any:
    """Abstract parameters in Flax boxes that name the logical axes."""
    model = Decoder(config, stacked=stacked, adapter=adapter)
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


@functools.lru_cache(maxsize=16)
def _abstract_vision(config: VisionTokenizerConfig) -> Any:
    """As `_abstract_decoder`, of the vision tokenizer."""
    pixels = jnp.zeros((1, config.spatial_factor, config.spatial_factor, config.in_channels))
    return jax.eval_shape(vision_module(config).init, jax.random.key(0), pixels)["params"]


def cache_shardings(config: DecoderConfig, mesh: Mesh, narrow: bool = False, lockstep: bool = True) -> KVCache:
    """Shardings of a decoder's KV cache: rows over `data` and `fsdp`, KV heads over `tensor`.

    Args:
        config: the decoder's.
        mesh: from `make_mesh`.
        narrow: the cache is quantised, so it also has scales.
        lockstep: see `KVCache`.
    """
    layers = (NamedSharding(mesh, spec(*KVCache.AXES)),) * config.num_layers
    scales = (NamedSharding(mesh, spec(*KVCache.AXES[:-1])),) * config.num_layers if narrow else ()
    start, length = NamedSharding(mesh, spec("batch")), NamedSharding(mesh, P())
    return KVCache(layers, layers, scales, scales, start, length, lockstep)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a training batch, int [B, S]: rows over `data` and `fsdp`, positions over `sequence`."""
    return NamedSharding(mesh, spec("batch", "sequence"))


def batch_shards(mesh: Mesh | None) -> int:
    """The number of parts that the rows of a batch are split into. The number of rows must be a multiple of it."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in LOGICAL_AXES["batch"])


def _gathered(axes: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    """The mesh axes of a dimension without `_WIDTH_AXES`."""
    if isinstance(axes, tuple):
        return tuple(axis for axis in axes if axis not in _WIDTH_AXES) or None
    return None if axes in _WIDTH_AXES else axes


def _check_even(name: str, axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> None:
    for axis, size in zip(axes, shape, strict=True):
        mesh_axes = LOGICAL_AXES[axis] if axis else None
        mesh_axes = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
        parts = math.prod(mesh.shape[a] for a in mesh_axes)
        if size % parts:
            split = " * ".join(f"{a}={mesh.shape[a]}" for a in mesh_axes if mesh.shape[a] > 1)
            legal = ", ".join(str(d) for d in range(1, min(size, 4096) + 1) if size % d == 0)
            raise Emu3Error(
                f"weight {name} has size {size} along its axis {axis!r}, which mesh {split} does not divide: "
                f"set {' * '.join(mesh_axes)} to one of {legal}"
            )


def _key(entry: Any) -> str:
    return str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))))

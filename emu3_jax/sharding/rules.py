"""The one table from logical axes to mesh axes, and the shardings that follow from it and the models' declarations."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emu3_jax.compilation import own_settings
from emu3_jax.config import DecoderConfig, VisionConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.models.adapters import Adapter
from emu3_jax.models.cache import KVCache
from emu3_jax.models.decoder import Decoder
from emu3_jax.models.vision import VisionTokenizer

LOGICAL_AXES: dict[str, str | tuple[str, ...] | None] = {
    # Weights of the decoder. Every device of `fsdp` and `sequence` keeps its part of each matrix; `tensor` splits the
    # matrices by head and by MLP unit. The vocabulary (184,622 = 2 * 92,311) does not split, so tables do by width.
    "embed": ("fsdp", "sequence"),
    "kv_heads": "tensor",
    "heads_per_kv": None,
    "head_dim": None,
    "mlp": "tensor",
    "layers": None,
    "rank": None,
    "vocab": None,
    "table_width": ("fsdp", "sequence", "tensor"),
    # Weights of the vision tokenizer: 1 GB in all, whole on every device; its batches split.
    "conv_time": None,
    "conv_rows": None,
    "conv_columns": None,
    "conv_in": None,
    "conv_out": None,
    "channels": None,
    "codes": None,
    "code_width": None,
    # Activations; "width" is also that of the norms' scales, too small to split.
    "batch": ("data", "fsdp"),
    "sequence": "sequence",
    "width": None,
    "cache_slots": None,
    # On the way through the embedding table: tokens are whole wherever it is split, then rows take over from width.
    "lookup_batch": "data",
    "lookup_width": "sequence",
}

RULES = tuple(LOGICAL_AXES.items())


@contextlib.contextmanager
def use_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Within, the models' logical constraints mean axes of `mesh`, and JAX has our settings; None means no mesh."""
    with own_settings():
        if mesh is None:
            yield
            return
        with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
            yield


def spec(*logical: str | None) -> P:
    """The partition of an array whose dimensions have these logical axes."""
    return P(*(None if name is None else LOGICAL_AXES[name] for name in logical))


def shardings(abstract: Any, mesh: Mesh) -> Any:
    """Where each array of a tree lies, from the logical axes that the model declared for it.

    Args:
        abstract: what `jax.eval_shape` says of `Module.init`, or of anything made from it (an optimiser's state):
            leaves in `nn.LogicallyPartitioned` boxes; leaves without a box are whole on every device.
        mesh: from `make_mesh`.

    Returns:
        The tree without boxes, of `NamedSharding`.

    Raises:
        Emu3Error: an axis of a weight does not split evenly.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, P())
        _check_even("/".join(_key(entry) for entry in path), leaf.names, leaf.value.shape, mesh)
        return NamedSharding(mesh, spec(*leaf.names))

    return jax.tree_util.tree_map_with_path(
        place, abstract, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    )


def decoder_shardings(
    config: DecoderConfig, mesh: Mesh, *, stacked: bool = False, adapter: Adapter | None = None
) -> dict[str, Any]:
    """`NamedSharding`s like the decoder's parameters: one subtree per layer, or with `stacked` one for all."""
    model = Decoder(config, stacked=stacked, adapter=adapter)
    return shardings(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"], mesh)


def vision_shardings(config: VisionConfig, mesh: Mesh) -> dict[str, Any]:
    """`NamedSharding`s like the vision tokenizer's parameters."""
    pixels = jnp.zeros((1, config.spatial_factor, config.spatial_factor, config.in_channels))
    return shardings(jax.eval_shape(VisionTokenizer(config).init, jax.random.key(0), pixels)["params"], mesh)


def cache_shardings(config: DecoderConfig, mesh: Mesh, narrow: bool = False) -> KVCache:
    """`NamedSharding`s like a KV cache of `config`: rows over `data` and `fsdp`, KV heads over `tensor`."""
    layers = (NamedSharding(mesh, spec(*KVCache.AXES)),) * config.num_layers
    scales = (NamedSharding(mesh, spec(*KVCache.AXES[:-1])),) * config.num_layers if narrow else ()
    return KVCache(layers, layers, scales, scales, NamedSharding(mesh, spec("batch")), NamedSharding(mesh, P()))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where a training batch lies: int [B, S], rows over `data` and `fsdp`, positions over `sequence`."""
    return NamedSharding(mesh, spec("batch", "sequence"))


def batch_shards(mesh: Mesh | None) -> int:
    """The parts that the rows of a batch are split into: their number must be a multiple of it."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in LOGICAL_AXES["batch"])


def _check_even(name: str, axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> None:
    for axis, size in zip(axes, shape, strict=True):
        mesh_axes = LOGICAL_AXES[axis] if axis else None
        mesh_axes = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
        parts = math.prod(mesh.shape[a] for a in mesh_axes)
        if size % parts:
            split = " * ".join(f"{a}={mesh.shape[a]}" for a in mesh_axes if mesh.shape[a] > 1)
            legal = ", ".join(str(d) for d in range(1, min(size, 4096) + 1) if size % d == 0)
            raise Emu3Error(
                f"weight {name} has {size} along its axis {axis!r}, which mesh {split} does not divide: "
                f"choose a product of {' * '.join(mesh_axes)} among {legal}"
            )


def _key(entry: Any) -> str:
    return str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))))

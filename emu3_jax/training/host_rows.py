"""Which rows of a batch each process reads, and how its rows become arrays over the whole mesh."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from emu3_jax.errors import Emu3Error
from emu3_jax.sharding.rules import batch_sharding, batch_shards


class HostRows:
    """The rows of this process.

    Processes whose devices hold the same rows (where `tensor` or `sequence` spans processes) form a group and read the
    same data; groups read different ones.

    Attributes:
        count: rows of this process.
        group: the number of its group.
        groups: how many there are.
    """

    def __init__(self, mesh: jax.sharding.Mesh, batch_size: int):
        """Raises `Emu3Error` if the mesh does not split `batch_size` rows evenly."""
        parts = batch_shards(mesh)
        if batch_size % parts:
            raise Emu3Error(
                f"batch_size is {batch_size}, and the mesh splits rows into {parts} parts (data * fsdp): "
                f"make it a multiple of {parts}"
            )
        self._sharding: NamedSharding = batch_sharding(mesh)
        self._batch_size = batch_size
        # A length that every mesh splits: only rows are looked at.
        places: Mapping[Any, tuple[slice, ...]] = self._sharding.devices_indices_map((batch_size, mesh.size))
        held: dict[int, set[int]] = {}
        for device, (rows, _) in places.items():
            held.setdefault(device.process_index, set()).update(range(*rows.indices(batch_size)))
        groups = sorted({tuple(sorted(rows)) for rows in held.values()})
        if sum(map(len, groups)) != batch_size:
            raise Emu3Error(
                "the mesh gives processes rows that overlap only in part: choose axes so that data * fsdp is a "
                "multiple of the processes, or divides them"
            )
        mine = tuple(sorted(held[jax.process_index()]))
        self.count, self.group, self.groups = len(mine), groups.index(mine), len(groups)
        self._sum = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._at = {row: index for index, row in enumerate(mine)}

    def spread(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Global arrays [batch_size, S] from this process' rows [count, S]."""

        def place(local: np.ndarray) -> jax.Array:
            shape = (self._batch_size, *local.shape[1:])

            def part(index: Any) -> np.ndarray:
                rows = range(*index[0].indices(shape[0]))
                return local[[self._at[row] for row in rows], index[1]]

            return jax.make_array_from_callback(shape, self._sharding, part)

        return {name: place(array) for name, array in batch.items()}

    def total(self, number: int) -> jax.Array | int:
        """The sum of a number of each group; over several groups, like a step, under way when this returns."""
        if self.groups == 1:
            return number
        # Each group's number stands in its first row.
        columns = self._sharding.mesh.size  # a length that every mesh splits
        numbers = np.zeros((self.count, columns), np.int32)
        numbers[0, 0] = number
        return self._sum(self.spread({"numbers": numbers})["numbers"])

"""Which rows of a batch each process reads, and how these rows become global arrays on the mesh."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from emu3_jax.errors import Emu3Error
from emu3_jax.sharding.rules import batch_sharding, batch_shards, spec


class HostRows:
    """The rows of a batch that this process reads.

    If the mesh axis `tensor` or `sequence` spans processes, these processes hold the same rows. They form a group and
    read the same data. Different groups read different data.

    Attributes:
        mine: the numbers of the rows of this process in the whole batch, in order.
        count: number of rows of this process.
        group: index of this process' group.
        groups: number of groups.
    """

    def __init__(self, mesh: jax.sharding.Mesh, batch_size: int, together: int = 1):
        """Raises `Emu3Error` if the mesh does not split `batch_size` rows evenly, `together` rows as one."""
        parts = batch_shards(mesh)
        if batch_size % (parts * together):
            pairs = f", and {together} rows belong together" if together > 1 else ""
            raise Emu3Error(
                f"batch_size is {batch_size}, and the mesh splits rows into {parts} parts (data * fsdp){pairs}: "
                f"make it a multiple of {parts * together}"
            )
        self._by_row = NamedSharding(mesh, spec("batch"))
        self._sharding: NamedSharding = batch_sharding(mesh)
        self._batch_size = batch_size
        # Any column count that every mesh divides will do: only the row indices are used.
        places: Mapping[Any, tuple[slice, ...]] = self._sharding.devices_indices_map((batch_size, mesh.size))
        held: dict[int, set[int]] = {}
        for device, (rows, _) in places.items():
            held.setdefault(device.process_index, set()).update(range(*rows.indices(batch_size)))
        groups = sorted({tuple(sorted(rows)) for rows in held.values()})
        if sum(map(len, groups)) != batch_size:
            raise Emu3Error(
                "mesh: two processes share only some of their rows; choose axes so that data * fsdp is a multiple or "
                f"a divisor of the number of processes ({jax.process_count()})"
            )
        self.mine = tuple(sorted(held[jax.process_index()]))
        self.count, self.group, self.groups = len(self.mine), groups.index(self.mine), len(groups)
        self._sum = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._at = {row: index for index, row in enumerate(self.mine)}

    def spread(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Makes global arrays [batch_size, S] or [batch_size] from this process' rows [count, S] or [count]."""

        def place(local: np.ndarray) -> jax.Array:
            shape = (self._batch_size, *local.shape[1:])

            def part(index: Any) -> np.ndarray:
                rows = range(*index[0].indices(shape[0]))
                return local[([self._at[row] for row in rows], *index[1:])]

            return jax.make_array_from_callback(shape, self._sharding if local.ndim > 1 else self._by_row, part)

        return {name: place(array) for name, array in batch.items()}

    def total(self, number: int) -> jax.Array | int:
        """Sums `number` over all groups. With several groups the result is a device array that may not be ready yet."""
        if self.groups == 1:
            return number
        # The group's number goes into the group's first row, so that processes of one group count once.
        columns = self._sharding.mesh.size  # a column count that every mesh divides
        numbers = np.zeros((self.count, columns), np.int32)
        numbers[0, 0] = number
        return self._sum(self.spread({"numbers": numbers})["numbers"])

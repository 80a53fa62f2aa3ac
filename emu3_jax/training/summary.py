"""Texts that a run prints at its start: parameters, data, devices and memory."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from emu3_jax.printable import printable
from emu3_jax.sharding.plan import chip_bytes, memory_size

_SOURCES = 4  # most sources that are named; further ones are only counted


def parameters(tree: Any) -> int:
    """The number of parameters in a tree of arrays or `jax.ShapeDtypeStruct`."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def counted(number: int, noun: str) -> str:
    """A number with its noun, for example "1 step" or "2,000 steps"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def sources(records: Sequence[tuple[str, int]], noun: str = "record") -> str:
    """Lists paths with their numbers of records, for example "24 records in out/a, 1 record in out/b"."""
    named = [f"{counted(count, noun)} in {printable(path)}" for path, count in records[:_SOURCES]]
    if rest := records[_SOURCES:]:
        named.append(f"{counted(sum(count for _, count in rest), noun)} in {len(rest)} more")
    return ", ".join(named)


def devices(mesh: Mesh) -> str:
    """The line on devices, for example "devices: 4 (TPU v5 lite), mesh fsdp=4"."""
    kind = mesh.devices.flat[0].device_kind
    axes = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"devices: {mesh.size} ({kind}){f', mesh {axes}' if axes else ''}{processes}"


def memory(parts: Mapping[str, Any], mesh: Mesh) -> list[str]:
    """Lines on the memory per device of trees of sharded arrays. Activations are unknown before compilation."""
    sizes = {name: chip_bytes(tree) for name, tree in parts.items()}
    listed = ", ".join(f"{name} {memory_size(size)}" for name, size in sizes.items() if size)
    return [
        f"memory: {memory_size(sum(sizes.values()))} {_each_device(mesh)}, plus activations",
        f"memory by part: {listed}",
    ]


def step_memory(compiled: jax.stages.Compiled, mesh: Mesh) -> str:
    """Memory per device of a compiled step, as XLA reports it. Empty if the backend reports none."""
    try:
        found = compiled.memory_analysis()
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        found = None
    if found is None:
        return ""
    new = max(found.output_size_in_bytes - found.alias_size_in_bytes, 0)
    total = found.argument_size_in_bytes + new + found.temp_size_in_bytes
    return f"{memory_size(total)} {_each_device(mesh)}"


def _each_device(mesh: Mesh) -> str:
    """The words "of each device", with the device's memory limit if the backend reports one."""
    first = next(device for device in mesh.devices.flat if device.process_index == jax.process_index())
    limit = (first.memory_stats() or {}).get("bytes_limit")
    return f"of each device's {memory_size(limit)}" if limit else "of each device"

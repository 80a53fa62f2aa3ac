"""What a run says of itself at its start: plain lines about parameters, data, devices and memory."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from emu3_jax.printable import printable
from emu3_jax.sharding.plan import chip_bytes, memory_size

_SOURCES = 4  # that are named; of more, the rest is counted


def parameters(tree: Any) -> int:
    """How many there are in a tree of arrays, abstract ones too."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def counted(number: int, noun: str) -> str:
    """For example "1 step" or "2,000 steps"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def sources(records: Sequence[tuple[str, int]]) -> str:
    """For example "24 records in out/a, 1 record in out/b", of paths and how many records each has."""
    named = [f"{counted(count, 'record')} in {printable(path)}" for path, count in records[:_SOURCES]]
    if rest := records[_SOURCES:]:
        named.append(f"{counted(sum(count for _, count in rest), 'record')} in {len(rest)} more")
    return ", ".join(named)


def devices(mesh: Mesh) -> str:
    """For example "devices: 4 (TPU v5 lite), mesh fsdp=4"."""
    kind = mesh.devices.flat[0].device_kind
    axes = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"devices: {mesh.size} ({kind}){f', mesh {axes}' if axes else ''}{processes}"


def memory(parts: Mapping[str, Any], mesh: Mesh) -> list[str]:
    """What trees of abstract arrays take of each device, by their shardings. Activations are not known yet."""
    sizes = {name: chip_bytes(tree) for name, tree in parts.items()}
    listed = ", ".join(f"{name} {memory_size(size)}" for name, size in sizes.items() if size)
    return [f"memory: {memory_size(sum(sizes.values()))} {_each_device(mesh)}, and activations", f"of it {listed}"]


def step_memory(compiled: jax.stages.Compiled, mesh: Mesh) -> str:
    """What a compiled step takes of each device, by XLA; empty where it does not tell."""
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
    """With the memory that programs get of it, where JAX tells."""
    first = next(device for device in mesh.devices.flat if device.process_index == jax.process_index())
    limit = (first.memory_stats() or {}).get("bytes_limit")
    return f"of each device's {memory_size(limit)}" if limit else "of each device"

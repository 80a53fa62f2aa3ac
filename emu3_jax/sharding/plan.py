"""Ahead-of-time compilation for a TPU slice on a machine without TPUs, and what the programs take of its memory.

`training.plan` and `generation.plan` say which programs a config runs.
"""

import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from emu3_jax.errors import Emu3Error
from emu3_jax.sharding.collectives import collectives

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU.

    Attributes:
        memory: bytes of HBM that the vendor names.
        usable: bytes that XLA gives a program, from its own messages.
        dimensions: of a slice.
        options: for the topology; JAX sees both cores of a v4 chip as one device.
    """

    memory: float
    usable: int
    dimensions: int
    options: tuple[tuple[str, Any], ...] = ()


CHIPS = {
    "v4": Chip(32e9, int(30.75 * GIB), 3, (("chip_config_name", "megacore"),)),
    "v5e": Chip(16e9, int(15.75 * GIB), 2),
    "v5p": Chip(95e9, int(95.74 * GIB), 3),
    "v6e": Chip(32e9, int(31.25 * GIB), 2),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips to compile for; `limit` is the HBM in bytes that a program may take of each."""

    topology: str
    chip: Chip
    devices: tuple[Any, ...]
    limit: int


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a plan.

    Attributes:
        name: what it does.
        lower: lowers it, within `rules.use_mesh(mesh)`.
        arguments: what its arguments hold: trees of abstract arrays with shardings, by name.
        beside: what lies in memory while it runs and is no argument, likewise.
        flops: operations of one run over all chips, counted by hand; None where nobody counted.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    arguments: dict[str, Any]
    beside: dict[str, Any] = dataclasses.field(default_factory=dict)
    flops: float | None = None


def tpu_slice(topology: str, limit: float | None = None) -> Slice:
    """The chips of a slice.

    Args:
        topology: generation and shape, like "v5p:4x4x4" or "v5e:2x4".
        limit: GiB of HBM to compile for, where that is to be less than the chip has.

    Raises:
        Emu3Error: no such slice, or libtpu is not installed.
    """
    kind, _, shape = topology.partition(":")
    legal = "write v5p:4x4x4 or v4:2x2x2 (three sides), v5e:8x8 or v6e:2x4 (two sides)"
    chip = CHIPS.get(kind)
    if chip is None or not re.fullmatch("x".join([r"[1-9]\d{0,2}"] * chip.dimensions), shape):
        raise Emu3Error(f"topology {topology!r} is unknown: {legal}")
    usable = chip.usable
    if limit is not None:
        if not 0 < limit * GIB <= chip.usable:
            raise Emu3Error(f"an HBM limit of {limit} GiB is not legal: {kind} programs get up to {_gib(chip.usable)}")
        usable = int(limit * GIB)
    if importlib.util.find_spec("libtpu") is None:
        raise Emu3Error("TPU programs are compiled by libtpu, which is not installed: pip install 'emu3-jax[tpu]'")
    # libtpu would ask the metadata server which TPU this machine has, and wait; it compiles beside other processes.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    sides = [int(side) for side in shape.split("x")]
    options = dict(chip.options)
    if math.prod(sides) < 4:
        options["chips_per_host_bounds"] = [*sides, 1, 1][:3]
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise Emu3Error(f"topology {topology!r} is not legal: {error}: {legal}") from error
    return Slice(topology, chip, tuple(described.devices), usable)


def compile_plan(slice_: Slice, mesh: Mesh, programs: Sequence[Program]) -> dict[str, Any]:
    """Compiles the programs of a config; the plan as JSON's types.

    Bytes are of one chip, and so are XLA's FLOPs and the collectives; XLA counts the body of a loop once, the plan's
    `flops` are counted by hand. A program for which XLA finds no room has only its `total` and what follows from that.

    Raises:
        Emu3Error: a program cannot be compiled, for another reason than memory.
    """
    compiled = [_compile(program, slice_, len(mesh.devices.flat)) for program in programs]
    return {
        "topology": slice_.topology,
        "device": slice_.devices[0].device_kind,
        "chips": len(mesh.devices.flat),
        "mesh": dict(mesh.shape),
        "hbm_bytes": int(slice_.chip.memory),
        "usable_bytes": slice_.limit,
        "fits": all(program["fits"] for program in compiled),
        "programs": compiled,
    }


def chip_bytes(tree: Any) -> int:
    """Bytes that the abstract arrays of a tree take on one chip, by their shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _compile(program: Program, slice_: Slice, chips: int) -> dict[str, Any]:
    began = time.perf_counter()
    parts = {name: chip_bytes(tree) for name, tree in program.arguments.items()}
    beside = {name: chip_bytes(tree) for name, tree in program.beside.items()}
    known = sum(parts.values())
    options = {"xla_tpu_max_hbm_size_mib": str(slice_.limit // 2**20)} if slice_.limit < slice_.chip.usable else {}
    lowered = program.lower()
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        total = _wanted(str(error))
        if total is None:
            raise Emu3Error(f"XLA does not compile the {program.name} for {slice_.topology}: {error}") from error
        sizes = {**beside, **parts, "temporaries": max(total - known, 0)}
        total = max(total, known) + sum(beside.values())
        figures = {}
    else:
        memory = compiled.memory_analysis()
        new = max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)
        sizes = {
            **beside,
            **parts,
            # Arrays are filled up to whole tiles.
            "tiling": max(memory.argument_size_in_bytes - known, 0),
            "outputs": new,
            "temporaries": memory.temp_size_in_bytes,
            "code": memory.generated_code_size_in_bytes,
        }
        total = sum(sizes.values())
        found, trips_known = collectives(compiled.as_text())
        figures = {
            "xla_flops": float((compiled.cost_analysis() or {}).get("flops", 0.0)),
            "collectives": [dataclasses.asdict(collective) for collective in found],
            # False in a loop that ends by what it computes, as decoding does: its body is counted once, for one step.
            "collective_trips_known": trips_known,
        }
    return {
        "name": program.name,
        "fits": bool(figures) and total <= slice_.limit,
        "bytes": sizes,
        "total_bytes": total,
        "spare_bytes": slice_.limit - total,
        "flops": None if program.flops is None else program.flops / chips,
        **figures,
        "compile_seconds": round(time.perf_counter() - began, 1),
    }


def _wanted(message: str) -> int | None:
    """The bytes of HBM that XLA says a program would need, arguments included; None if that is not what it says."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = re.search(r"(?:temporaries \(|Used )(\d+(?:\.\d+)?)([KMGT])", message)
    return int(float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]]) if found else None


def describe(plan: dict[str, Any]) -> Iterator[str]:
    """Lines for people."""
    mesh = ",".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1) or "of one device"
    yield (
        f"{plan['topology']}: {plan['chips']} chips {plan['device']}, mesh {mesh}, {plan['hbm_bytes'] / 1e9:.0f} GB "
        f"of HBM a chip, programs get {_gib(plan['usable_bytes'])}"
    )
    for program in plan["programs"]:
        yield f"{program['name']}, each chip:"
        for name, size in program["bytes"].items():
            if size:
                yield f"  {name:<20} {memory_size(size):>12}"
        spare = program["spare_bytes"]
        verdict = f"fits, {_gib(spare)} to spare" if program["fits"] else f"does not fit, by {_gib(max(-spare, 0))}"
        yield f"  {'total':<20} {_gib(program['total_bytes']):>12}  {verdict}"
        if program["flops"] is not None:
            yield f"  {'FLOPs':<20} {program['flops'] / 1e12:>8.3f} T    counted by hand, without recomputation"
        if program.get("xla_flops", 0) > 0:
            yield f"  {'FLOPs by XLA':<20} {program['xla_flops'] / 1e12:>8.3f} T    bodies of loops counted once"
        for collective in program.get("collectives", ()):
            yield f"  {collective['kind']:<20} {memory_size(collective['bytes']):>12}  {collective['count']} times"
        if not program.get("collective_trips_known", True):
            yield "  (collectives of one step: the loop's trips are not known beforehand)"
    yield "fits" if plan["fits"] else "does not fit"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def memory_size(size: float) -> str:
    """Bytes of a device's memory for people."""
    return _gib(size) if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"

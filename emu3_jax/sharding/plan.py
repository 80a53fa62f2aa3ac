"""Compiles programs for a TPU slice on a machine without TPUs, and reports how much memory of a chip they need.

`training.plan` and `generation.plan` list the programs of a config.
"""

import dataclasses
import importlib.util
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from emu3_jax.errors import Emu3Error
from emu3_jax.printable import counted
from emu3_jax.sharding.bounds import Decoding, Peaks, Training, describe_bound, least_seconds, measure
from emu3_jax.sharding.chips import CHIPS, GIB, Chip
from emu3_jax.sharding.collectives import collectives

_MOST_SLICES = 64


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips to compile for: one slice, or several equal ones.

    Attributes:
        topology: generation and shape of each slice, such as "v5e:2x4".
        chip: the generation.
        devices: the devices of all slices.
        limit: bytes of HBM that a program may use on each device.
        sides: number of chips along each side of a slice.
        count: number of slices.
    """

    topology: str
    chip: Chip
    devices: tuple[Any, ...]
    limit: int
    sides: tuple[int, ...]
    count: int = 1

    @property
    def peaks(self) -> Peaks:
        """What one device does at most per second."""
        return Peaks.of(self.chip, self.sides)


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a plan.

    Attributes:
        name: what the program does, for the report.
        lower: lowers the program, inside `rules.use_mesh(mesh)`.
        arguments: the program's arguments by name, as trees of abstract arrays with shardings.
        beside: other arrays in memory during the run, in the same form.
        flops: FLOPs of one run summed over all chips, from a formula; None if there is no formula.
        rates: what the program trains on or makes, if the plan shall say how fast.
        runs: how often a training step or a batch of pictures runs it.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    arguments: dict[str, Any]
    beside: dict[str, Any] = dataclasses.field(default_factory=dict)
    flops: float | None = None
    rates: Training | Decoding | None = None
    runs: int = 1


def tpu_slice(topology: str, limit: float | None = None, count: int = 1) -> Slice:
    """Describes the chips of a TPU slice for compilation, or those of several equal slices.

    Args:
        topology: generation and shape, such as "v5p:4x4x4" or "v5e:2x4".
        limit: GiB of HBM per chip that programs may use; by default, all that XLA allows.
        count: number of slices, which the data centre's network joins.

    Raises:
        Emu3Error: the topology, the limit or the number is not legal, or libtpu is not installed.
    """
    kind, _, shape = topology.partition(":")
    legal = "write v5p:4x4x4 or v4:2x2x2 (three sides, like tpu7x:2x2x1), v5e:8x8 or v6e:2x4 (two sides)"
    chip = CHIPS.get(kind)
    if chip is None or not re.fullmatch("x".join([r"[1-9]\d{0,2}"] * chip.dimensions), shape):
        raise Emu3Error(f"topology {topology!r} is unknown: {legal}")
    sides = tuple(int(side) for side in shape.split("x"))
    if math.prod(sides) > chip.pod:
        raise Emu3Error(f"topology {topology!r} has {math.prod(sides)} chips: the largest {kind} slice has {chip.pod}")
    if not 1 <= count <= _MOST_SLICES:
        raise Emu3Error(f"{count} slices cannot be planned: the number of slices must be from 1 to {_MOST_SLICES}")
    usable = chip.usable
    if limit is not None:
        if not 0 < limit * GIB <= chip.usable:
            raise Emu3Error(f"an HBM limit of {limit} GiB is not legal: on {kind} the most is {_gib(chip.usable)}")
        usable = int(limit * GIB)
    if importlib.util.find_spec("libtpu") is None:
        raise Emu3Error("compiling for TPUs needs libtpu, which is not installed: pip install 'emu3-jax[tpu]'")
    # Without these, libtpu would wait for the metadata server of a TPU VM, and refuse to load in a second process.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    options = dict(chip.options)
    if count > 1:
        options["num_slices"] = count
    if math.prod(sides) < 4:
        options["chips_per_host_bounds"] = [*sides, 1, 1][:3]
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise Emu3Error(f"topology {topology!r} is not legal: {error}: {legal}") from error
    return Slice(topology, chip, tuple(described.devices), usable, sides, count)


def compile_plan(
    slice_: Slice, mesh: Mesh, programs: Sequence[Program], left_out: Sequence[str] = ()
) -> dict[str, Any]:
    """Compiles the programs of a config and reports their memory, FLOPs, traffic, collectives and least time.

    All figures are per device: per chip, except on TPU7x, whose chips are two devices each. `flops` comes from a
    formula; `xla_flops` comes from XLA, which counts the body of a loop once. `bounds.measure` adds the traffic and the
    least time. If a program does not fit into memory, its figures from XLA, collectives and times are missing.

    Args:
        slice_: from `tpu_slice`.
        mesh: a mesh of its devices.
        programs: the programs to compile.
        left_out: what the programs leave out and why, a line each.

    Returns:
        The plan, made of JSON types.

    Raises:
        Emu3Error: a program cannot be compiled for a reason other than memory.
    """
    compiled = [_compile(program, slice_, len(mesh.devices.flat)) for program in programs]
    return {
        "topology": slice_.topology,
        "slices": slice_.count,
        "device": slice_.devices[0].device_kind,
        "devices": len(mesh.devices.flat),
        "chips": len(mesh.devices.flat) // slice_.chip.devices,
        "mesh": dict(mesh.shape),
        "hbm_bytes": int(slice_.chip.memory),
        "usable_bytes": slice_.limit,
        "fits": all(program["fits"] for program in compiled),
        # Of all runs of all programs of a training step, or of a batch of pictures.
        "least_seconds": sum(map(least_seconds, compiled)) if all("bound" in each for each in compiled) else None,
        "programs": compiled,
        "left_out": list(left_out),
    }


def compile_ahead(lowered: jax.stages.Lowered, options: dict[str, str] | None = None) -> jax.stages.Compiled:
    """Compiles a program for devices that this machine lacks.

    JAX keeps such a program in its cache of compiled programs, cannot load it again, and warns. The warning says
    nothing to the reader of a plan, so it is left out.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
        return lowered.compile(compiler_options=options or {})


def chip_bytes(tree: Any) -> int:
    """Bytes that a tree of abstract arrays with shardings occupies on one chip."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _compile(program: Program, slice_: Slice, devices: int) -> dict[str, Any]:
    began = time.perf_counter()
    parts = {name: chip_bytes(tree) for name, tree in program.arguments.items()}
    beside = {name: chip_bytes(tree) for name, tree in program.beside.items()}
    known = sum(parts.values())
    options = {"xla_tpu_max_hbm_size_mib": str(slice_.limit // 2**20)} if slice_.limit < slice_.chip.usable else {}
    lowered = program.lower()
    try:
        compiled = compile_ahead(lowered, options)
    except jax.errors.JaxRuntimeError as error:
        total = _wanted(str(error))
        if total is None:
            raise Emu3Error(f"XLA cannot compile the {program.name} for {slice_.topology}: {error}") from error
        sizes = {**beside, **parts, "temporaries": max(total - known, 0)}
        total = max(total, known) + sum(beside.values())
        figures = {}
    else:
        memory = compiled.memory_analysis()
        new = max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)
        sizes = {
            **beside,
            **parts,
            # XLA pads arrays to whole tiles.
            "tiling": max(memory.argument_size_in_bytes - known, 0),
            "outputs": new,
            "temporaries": memory.temp_size_in_bytes,
            "code": memory.generated_code_size_in_bytes,
        }
        total = sum(sizes.values())
        text = compiled.as_text()
        found, trips_known = collectives(text)
        figures = {
            "xla_flops": float((compiled.cost_analysis() or {}).get("flops", 0.0)),
            "collectives": [dataclasses.asdict(collective) for collective in found],
            # False if a loop has no fixed trip count, such as the decode loop. Its body is counted once, for one step.
            "collective_trips_known": trips_known,
            **measure(text, slice_.peaks, devices, slice_.chip.devices, program.flops, program.rates, parts),
        }
    return {
        "name": program.name,
        "runs": program.runs,
        "fits": bool(figures) and total <= slice_.limit,
        "bytes": sizes,
        "total_bytes": total,
        "spare_bytes": slice_.limit - total,
        "flops": None if program.flops is None else program.flops / devices,
        **figures,
        "compile_seconds": round(time.perf_counter() - began, 1),
    }


def _wanted(message: str) -> int | None:
    """Reads from XLA's out-of-memory message how many bytes of HBM a program needs, arguments included.

    Returns None if the message reports another error.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = re.search(r"(?:temporaries \(|Used )(\d+(?:\.\d+)?)([KMGT])", message)
    return int(float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]]) if found else None


def describe(plan: dict[str, Any]) -> Iterator[str]:
    """Yields the lines of a readable report of a plan from `compile_plan`."""
    mesh = ",".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1) or "of one device"
    each = "chip" if plan["devices"] == plan["chips"] else "device"
    pairs = "" if each == "chip" else f" of {plan['devices'] // plan['chips']} devices each"
    several = f"{plan['slices']} slices of " if plan["slices"] > 1 else ""
    yield (
        f"{several}{plan['topology']}: {counted(plan['chips'], 'chip')} {plan['device']}{pairs}, mesh {mesh}, "
        f"{plan['hbm_bytes'] / 1e9:.0f} GB of HBM per {each}, of which programs can use {_gib(plan['usable_bytes'])}"
    )
    for program in plan["programs"]:
        yield f"{program['name']}, per {each}{_often(program['runs'])}:"
        for name, size in program["bytes"].items():
            if size:
                yield f"  {name:<20} {memory_size(size):>12}"
        spare = program["spare_bytes"]
        verdict = f"fits, {_gib(spare)} to spare" if program["fits"] else f"does not fit, by {_gib(max(-spare, 0))}"
        yield f"  {'total':<20} {_gib(program['total_bytes']):>12}  {verdict}"
        if program["flops"] is not None:
            yield f"  {'FLOPs':<20} {_flops(program['flops'])}    from a formula, without recomputation"
        if program.get("xla_flops", 0) > 0:
            yield f"  {'FLOPs by XLA':<20} {_flops(program['xla_flops'])}    loop bodies counted once"
        for collective in program.get("collectives", ()):
            yield f"  {collective['kind']:<20} {memory_size(collective['bytes']):>12}  {collective['count']} times"
        if not program.get("collective_trips_known", True):
            yield "  (collectives of one step: the number of steps is not known in advance)"
        yield from describe_bound(program)
    if plan["least_seconds"] is not None and len(plan["programs"]) > 1:
        yield f"all programs: at least {plan['least_seconds']:.2f} s"
    if any("bound" in program for program in plan["programs"]):
        yield "Least times are bounds from the chip's peaks. Nothing was run."
    for line in plan["left_out"]:
        yield f"left out: {line}"
    yield "fits" if plan["fits"] else "does not fit"


def _often(runs: int) -> str:
    """How often a program runs, where the sum of all programs cannot be understood without it."""
    if runs == 1:
        return ""
    return f", {runs} runs" if runs else ", not in the sum of all programs"


def _flops(count: float) -> str:
    """A number of FLOPs, right-aligned: in units of 10^12, small ones as they are."""
    return f"{count / 1e12:>8.3f} T" if count >= 1e9 else f"{count:>8,.0f}  "


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def memory_size(size: float) -> str:
    """Formats a number of bytes of device memory, in GiB or MiB."""
    return _gib(size) if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"

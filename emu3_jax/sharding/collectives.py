"""Counts the collectives of a compiled program by reading its optimised HLO text."""

import collections
import dataclasses
import re
from collections.abc import Iterator, Sequence

import numpy as np

from emu3_jax.sharding.hlo import Instruction, Program, Run

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
_MESH_GROUPS = re.compile(r"replica_groups=\w*\[('[^\]]*)\] \{([^}]*)\}")
_AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")
_IOTA_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}")
_CHAIN = re.compile(r'chain_id="(\d+)"')
# What XLA for TPUs hands to the runtime that exchanges between slices: the slices that take part, and the kind.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_target="\{([\d,]+)\}[^"]*",_xla_megascale_transfer_type="(\w+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """Totals over all collectives of one kind in a program.

    Attributes:
        kind: one of `KINDS`.
        count: number of executions per run of the program.
        bytes: sum over the executions, on one device: the size of the operands or of the results, the larger one.
        ici_bytes: bytes that one device sends inside its slice, by the algorithm that sends least.
        dcn_bytes: bytes that one device sends to other slices.
    """

    kind: str
    count: int
    bytes: int
    ici_bytes: int = 0
    dcn_bytes: int = 0


def collectives(hlo: str, slices: Sequence[int] = ()) -> tuple[list[Collective], bool]:
    """Counts the collectives that one run of a program executes.

    Args:
        hlo: text of the program, from `jax.stages.Compiled.as_text()`.
        slices: number of the slice of each device, in the order of the mesh; by default, there is one slice.

    Returns:
        The totals of each kind, and whether the trip count of every loop with collectives is known. The body of a loop
        with unknown trip count is counted once.
    """
    program = Program(hlo)
    runs = program.runs()
    known = not any(run.step and any(exchanges(program, run)) for run in runs)
    return totals(program, runs, slices), known


def totals(program: Program, runs: Sequence[Run], slices: Sequence[int] = ()) -> list[Collective]:
    """The totals of each kind over some computations of a program. See `collectives`."""
    sums: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0, 0, 0])
    for run in runs:
        for kind, size, instruction in exchanges(program, run):
            if instruction.opcode == "send":
                between = list(range(_slices_of(instruction)))
                ici, dcn = sent(kind, size, [between], between)
            else:
                ici, dcn = sent(kind, size, _groups(instruction, program.partitions), slices)
            for place, value in enumerate((1, size, ici, dcn)):
                sums[kind][place] += run.times * value
    return [Collective(kind, *(round(value) for value in sums[kind])) for kind in KINDS if kind in sums]


def exchanges(program: Program, run: Run) -> Iterator[tuple[str, int, Instruction]]:
    """Yields kind, bytes and instruction of each collective that a computation runs once, also inside its fusions.

    XLA for TPUs may advance one collective in several fusions that compute something else meanwhile. The same chain
    is yielded once. It writes a reduce-scatter as a fusion that slices the result of an all-reduce.
    """
    chains: set[str] = set()

    def inside(name: str) -> Iterator[tuple[str, int, Instruction]]:
        instructions = program.computations.get(name, {})
        for instruction in instructions.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                chain = _CHAIN.search(instruction.rest)
                if chain and chain[1] in chains:
                    continue
                if chain:
                    chains.add(chain[1])
                operands = sum(instructions[o].bytes for o in instruction.operands if o in instructions)
                # Asynchronous collectives return their operands along with the result. Subtract the operands.
                started = instruction.opcode != kind and kind != "all-reduce"
                if kind == "all-reduce" and name != run.name and _is_sliced(instruction, program.root(name)):
                    kind = "reduce-scatter"
                yield kind, max(operands, instruction.bytes - (operands if started else 0)), instruction
            elif instruction.opcode == "send" and (found := _BETWEEN_SLICES.search(instruction.rest)):
                kind = found[2].lower().replace("_", "-")
                kind = kind if kind in KINDS else "collective-permute"
                size = instruction.arrays[0].bytes
                yield kind, size * _slices_of(instruction) if kind == "all-gather" else size, instruction
            elif instruction.opcode == "fusion":
                for called in instruction.called:
                    yield from inside(called)

    yield from inside(run.name)


def _is_sliced(all_reduce: Instruction, root: Instruction) -> bool:
    """Whether a part of the all-reduce is all that its computation returns."""
    return root.opcode == "dynamic-slice" and root.operands[0] == all_reduce.name


def _slices_of(send: Instruction) -> int:
    """The number of slices that exchange with each other."""
    found = _BETWEEN_SLICES.search(send.rest)
    return found[1].count(",") + 1 if found else 1


def sent(kind: str, size: int, groups: Sequence[Sequence[int]], slices: Sequence[int] = ()) -> tuple[float, float]:
    """Bytes that one device sends inside its slice and to other slices, by the algorithm that sends least.

    Of `size` bytes, the larger of operand and result, a device of a group of n sends (n - 1) / n: for gathering or
    scattering, and twice that to reduce and to gather again. Groups that span slices first exchange inside each slice.

    Args:
        kind: one of `KINDS`.
        size: bytes on one device.
        groups: the devices that exchange with each other.
        slices: number of the slice of each device, or nothing for one slice.
    """
    if kind == "collective-permute":
        crosses = bool(slices) and any(slices[group[0]] != slices[group[-1]] for group in groups)
        return (0.0, size) if crosses else (size, 0.0)
    members = max(groups, key=len, default=())
    count = len(members)
    parts = len({slices[member] for member in members}) if slices else 1
    each = count // parts if parts else 0
    if count < 2:
        return 0.0, 0.0
    if "all-to-all" in kind:
        return size * (each - 1) / count, size * (count - each) / count
    twice = 2 if kind == "all-reduce" else 1
    return twice * size * (each - 1) / each, twice * size * (parts - 1) / parts / each


def _groups(instruction: Instruction, partitions: int) -> list[list[int]]:
    """The groups of devices of a collective; pairs of source and target for `collective-permute`."""
    text = instruction.rest
    if found := _MESH_GROUPS.search(text):
        return _mesh_groups(found[1], found[2])
    if found := _IOTA_GROUPS.search(text):
        shape, dims = ([int(d) for d in found[n].split(",")] for n in (1, 2))
        ids = np.arange(int(np.prod(dims))).reshape(dims)
        return (ids.transpose([int(d) for d in found[3].split(",")]) if found[3] else ids).reshape(shape).tolist()
    if found := _LISTED_GROUPS.search(text):
        return [[int(d) for d in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])]
    return [list(range(partitions))]


def _mesh_groups(mesh: str, chosen: str) -> list[list[int]]:
    """The groups of a text such as `mesh['a'=2,'b'=4] {'a','b':(1)2}`, whose second axis is the first half of b."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    parts = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in _AXIS.findall(chosen)}
    shape, inner = [], []
    for name, size in sizes.items():
        before, part = parts.get(name, (size, 1))
        inner += [len(shape) + 1] if name in parts else []
        shape += [before, part, size // before // part]
    outer = [axis for axis in range(len(shape)) if axis not in inner]
    ids = np.arange(int(np.prod(shape))).reshape(shape).transpose(outer + inner)
    return ids.reshape(-1, int(np.prod([shape[axis] for axis in inner]))).tolist()

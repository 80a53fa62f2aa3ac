"""Counts what a compiled program moves through HBM and computes, by reading its optimised HLO text.

XLA's own `cost_analysis` counts the body of a loop once, and counts copies into the vector memory of a chip as writes.
Here loops count as often as they run, and only arrays in HBM count: their memory space is 0. These rules make the count
a lower bound:

- An instruction reads each operand in HBM once and writes its result once. Tiles are not filled up.
- A slice reads what it returns, not the whole array. That holds inside fusions, too, such as those that slice one
  layer's weights from the stacked ones.
- An update in place reads and writes what it updates. So caches are not copied.
- Of the branches of a choice, the one that moves least counts.
- Matrix products in float32 at the highest precision count six times, because TPUs compute six products of bfloat16.
- Asynchronous copies and slices count where they start. The chain of fusions that advances a collective counts once.
- The workspaces of cuBLAS and cuDNN do not count.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np

from emu3_jax.sharding import collectives
from emu3_jax.sharding.collectives import KINDS, Collective
from emu3_jax.sharding.hlo import Array, Instruction, Program, Run

# Names for what another instruction has made, synchronisation, and ends of asynchronous operations.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "optimization-barrier", "while", "conditional", "call", "async-start", "async-update",
}  # fmt: skip
_SLICES = ("slice", "dynamic-slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # and which operand is the update
# Custom calls that rename, reserve or synchronise. The other ones are kernels.
_FREE_CALLS = re.compile(r"ConcatBitcast|AllocateBuffer|AssumeGatherIndicesInBound|AsyncCollective|Sharding|X64")
_LIBRARIES = ("__cublas$", "__cudnn$")  # targets of custom calls that GPUs leave to NVIDIA's libraries
_CONVOLUTION = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_ESTIMATE = re.compile(r'"cost_estimate":\{"flops":"?(\d+)')


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one device does.

    Attributes:
        read: bytes read from HBM.
        written: bytes written to HBM.
        flops: FLOPs of matrix products on floats, recomputation included; those of kernels where they state them.
        integer_ops: operations of matrix products whose two sides are 8-bit integers.
        kernels: runs of kernels that do not state their FLOPs.
        collectives: totals of each kind.
    """

    read: int
    written: int
    flops: int
    integer_ops: int
    kernels: int
    collectives: tuple[Collective, ...]


def count(hlo: str, slices: Sequence[int] = ()) -> tuple[Costs, Costs | None]:
    """Counts the costs of one run of a program.

    Args:
        hlo: text of the program, from `jax.stages.Compiled.as_text()`.
        slices: number of the slice of each device, in the order of the mesh; by default, there is one slice.

    Returns:
        The costs outside of loops whose trip count is unknown, and those of one trip of such loops, or None if there
        is none.
    """
    counter = _Counter(Program(hlo))
    runs = counter.runs()
    steps = [run for run in runs if run.step]
    return (
        counter.total([run for run in runs if not run.step], slices),
        counter.total(steps, slices) if steps else None,
    )


def executed_runs(program: Program) -> list[Run]:
    """The computations that `count` counts: of the branches of a choice, the one that moves least."""
    return _Counter(program).runs()


class _Counter:
    """Counts instructions of one program."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._demands = functools.cache(self._demands_of)

    def runs(self) -> list[Run]:
        return self._program.runs(choose=self._cheapest)

    def _cheapest(self, branches: list[str]) -> list[str]:
        """The branch that moves least through HBM, if there is any."""

        def moved(branch: str) -> int:
            return sum(
                run.times * sum(self._traffic(instruction, instructions))
                for run in self._program.runs(branch, self._cheapest)
                for instructions in [self._program.computations[run.name]]
                for instruction in instructions.values()
            )

        return [min(branches, key=moved)] if branches else []

    def total(self, runs: Sequence[Run], slices: Sequence[int]) -> Costs:
        sums = np.zeros(5, object)
        for run in runs:
            instructions = self._program.computations[run.name]
            for instruction in instructions.values():
                read, written = self._traffic(instruction, instructions)
                sums += [run.times * value for value in (read, written, *self._operations(instruction, instructions))]
            # Fusions leave their collectives out, so they are counted here.
            for _, _, exchange in collectives.exchanges(self._program, run):
                if exchange.name not in instructions:
                    inner = next(c for c in self._program.computations.values() if c.get(exchange.name) is exchange)
                    read, written = self._traffic(exchange, inner)
                    sums += [run.times * read, run.times * written, 0, 0, 0]
        return Costs(*(int(value) for value in sums), tuple(collectives.totals(self._program, runs, slices)))

    def _traffic(self, instruction: Instruction, around: dict[str, Instruction]) -> tuple[int, int]:
        """Bytes that one instruction reads from HBM and writes to it."""
        opcode, results = instruction.opcode, instruction.arrays
        operands = [around[name] for name in dict.fromkeys(instruction.operands) if name in around]
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            return 0, 0
        if opcode == "custom-call" and _FREE_CALLS.search(instruction.target):
            return 0, 0
        if opcode == "fusion":
            return self._fusion_traffic(instruction, around)
        if opcode == "send":  # to the runtime, which exchanges with other slices
            return sum(_hbm(operand.arrays) for operand in operands), 0
        if opcode == "recv":
            return 0, _hbm(results[:1])
        if opcode == "copy-start":  # (destination, source, context)
            return _hbm(results[1:2]), _hbm(results[:1])
        if opcode in ("slice-start", "dynamic-slice-start"):  # ((operands), result, context)
            result = results[len(instruction.operands)]
            return result.bytes if _hbm(operands[0].arrays) else 0, _hbm([result])
        if opcode.endswith("-start") and opcode != "all-reduce-start":
            taken = sum(len(operand.arrays) for operand in operands)
            return sum(_hbm(operand.arrays) for operand in operands), _hbm(results[taken : 2 * taken])
        if opcode in _SLICES:
            indices = sum(_hbm(operand.arrays) for operand in operands[1:])
            return (instruction.bytes if _hbm(operands[0].arrays) else 0) + indices, _hbm(results)
        if opcode in _UPDATES:
            update = around[instruction.operands[_UPDATES[opcode]]]
            return _hbm(update.arrays), update.bytes if _hbm(results) else 0
        unwritten = _unwritten(instruction)
        read = sum(_hbm(around[name].arrays) for name in dict.fromkeys(instruction.operands) if name in around)
        return read, _hbm([result for place, result in enumerate(results) if place not in unwritten])

    def _fusion_traffic(self, fusion: Instruction, around: dict[str, Instruction]) -> tuple[int, int]:
        (name,) = fusion.called
        demands = self._demands(name)
        read: dict[str, float] = {}
        for place, operand in enumerate(fusion.operands):
            if operand in around and place in demands:
                read[operand] = min(1.0, read.get(operand, 0.0) + demands[place])
        written = zip(fusion.arrays, self._written(name), strict=True)
        return (
            round(sum(share * _hbm(around[operand].arrays) for operand, share in read.items())),
            sum(size for array, size in written if array.space == 0),
        )

    def _results(self, name: str) -> list[Instruction]:
        """The instructions that make the results of a computation, without bitcasts."""
        instructions, root = self._program.computations[name], self._program.root(name)
        results = [instructions[operand] for operand in root.operands] if root.opcode == "tuple" else [root]
        return [_stripped(result, instructions) for result in results]

    def _passed(self, name: str) -> set[str]:
        """Arguments that a fused computation returns as they are, beside other results: they stay where they are."""
        if self._program.root(name).opcode != "tuple":
            return set()
        return {result.name for result in self._results(name) if result.opcode in ("parameter", "get-tuple-element")}

    def _written(self, name: str) -> list[int]:
        """Bytes that a fused computation writes of each of its arrays."""
        instructions, passed = self._program.computations[name], self._passed(name)
        sizes: list[int] = []
        for result in self._results(name):
            made = instructions.get(result.operands[0]) if result.opcode == "get-tuple-element" else result
            found = re.search(r"index=(\d+)", result.rest) if made is not result else None
            place = int(found[1]) if found else None
            if made is not None and made.opcode == "fusion":
                inner = self._written(made.called[0])
                sizes += inner if place is None else [inner[place]]
            elif made is not None and made.target.startswith(_LIBRARIES):
                written = [0 if n in _unwritten(made) else array.bytes for n, array in enumerate(made.arrays)]
                sizes += written if place is None else [written[place]]
            elif result.name in passed or _is_exchange(result):
                sizes += [0] * len(result.arrays)
            elif self._in_place(result, instructions):
                sizes.append(instructions[result.operands[_UPDATES[result.opcode]]].bytes)
            else:
                sizes += [array.bytes for array in result.arrays]
        return sizes

    def _in_place(self, result: Instruction, instructions: dict[str, Instruction]) -> bool:
        """Whether a result of a fusion updates one of its arguments, whose memory it then is."""
        if result.opcode not in _UPDATES:
            return False
        return _stripped(instructions[result.operands[0]], instructions).opcode == "parameter"

    def _demands_of(self, name: str) -> dict[int, float]:
        """Which share of each argument a fused computation reads, by the argument's number."""
        instructions, passed = self._program.computations[name], self._passed(name)
        results = [result for result in self._results(name) if result.name not in passed]
        in_place = {result.name for result in results if self._in_place(result, instructions)}
        shares = dict.fromkeys(instructions, 0.0) | {result.name: 1.0 for result in results}
        found: dict[int, float] = {}
        for instruction in reversed(instructions.values()):
            share = shares[instruction.name]
            if instruction.opcode == "parameter":
                found[int(instruction.rest.partition(")")[0])] = share
            elif share and not _is_exchange(instruction):
                for place, operand in enumerate(instruction.operands):
                    factor = self._share(instruction, place, instructions, instruction.name in in_place)
                    shares[operand] = min(1.0, shares[operand] + share * factor)
        return found

    def _share(self, user: Instruction, place: int, instructions: dict[str, Instruction], in_place: bool) -> float:
        """Which share of an operand an instruction reads, if its whole result is wanted."""
        if user.opcode == "fusion":
            return self._demands(user.called[0]).get(place, 0.0)
        if place == 0 and user.opcode in _SLICES:
            whole = instructions[user.operands[0]].arrays[0].elements
            return user.arrays[0].elements / whole if whole else 0.0
        return 0.0 if place == 0 and in_place else 1.0

    def _operations(self, instruction: Instruction, around: dict[str, Instruction]) -> tuple[int, int, int]:
        """FLOPs, integer operations, and runs of kernels without a statement, of an instruction and inside of it."""
        if instruction.opcode == "fusion":
            return self._fused_operations(instruction.called[0])
        if instruction.opcode in ("dot", "convolution"):
            sides = [around[name].arrays[0] for name in instruction.operands[:2]]
            operations = _dot(instruction, sides) if instruction.opcode == "dot" else _convolution(instruction, sides)
            if all(side.dtype == "f32" for side in sides):
                operations *= _passes(instruction)
            integers = all(side.dtype in ("s8", "u8", "s4", "u4") for side in sides)
            return (0, operations, 0) if integers else (operations, 0, 0)
        if instruction.opcode == "custom-call" and instruction.target == "tpu_custom_call":
            stated = _ESTIMATE.search(instruction.rest)
            return (int(stated[1]), 0, 0) if stated else (0, 0, 1)
        return 0, 0, 0

    @functools.cache  # noqa: B019 - counters live as long as one count
    def _fused_operations(self, name: str) -> tuple[int, int, int]:
        instructions = self._program.computations[name]
        found = [self._operations(instruction, instructions) for instruction in instructions.values()]
        flops, integers, kernels = (sum(column) for column in zip(*found, strict=True))
        return flops, integers, kernels


def _hbm(arrays: Sequence[Array]) -> int:
    """Bytes of those arrays that lie in HBM."""
    return sum(array.bytes for array in arrays if array.space == 0)


def _stripped(instruction: Instruction, instructions: dict[str, Instruction]) -> Instruction:
    while instruction.opcode in ("bitcast", "reshape") and instruction.operands[0] in instructions:
        instruction = instructions[instruction.operands[0]]
    return instruction


def _is_exchange(instruction: Instruction) -> bool:
    """Whether an instruction of a fusion starts or advances a collective."""
    if instruction.opcode == "custom-call":
        return "AsyncCollective" in instruction.target
    return instruction.opcode.removesuffix("-start") in KINDS


def _unwritten(call: Instruction) -> set[int]:
    """The results of a kernel that do not count as written.

    Kernels update in place what shares the memory of an operand. cuBLAS writes all of it. The last result of cuBLAS and
    cuDNN, of bytes, is a workspace.
    """
    if call.target.startswith(_LIBRARIES):
        last = len(call.arrays) - 1
        return {last} if last and call.arrays[last].dtype in ("s8", "u8") else set()
    found = re.search(r"output_to_operand_aliasing=\{(.*?)\}, \w", call.rest)
    return {int(place or 0) for place in re.findall(r"\{(\d*)\}: \(", found[1])} if found else set()


def _passes(instruction: Instruction) -> int:
    """Products of bfloat16 parts that a TPU computes for a product in float32."""
    found = re.search(r"operand_precision=\{(\w+)", instruction.rest)
    return {"highest": 6, "high": 3}.get(found[1], 1) if found else 1


def _dot(instruction: Instruction, sides: Sequence[Array]) -> int:
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
    summed = [sides[0].shape[int(axis)] for axis in found[1].split(",") if axis] if found else []
    return 2 * instruction.arrays[0].elements * int(np.prod(summed, dtype=np.int64))


def _convolution(instruction: Instruction, sides: Sequence[Array]) -> int:
    """FLOPs of a convolution without products with padding. XLA for TPUs writes products of matrices as convolutions.

    Axes of a batch become spatial axes whose windows have one place that is not padding.
    """
    labels = _CONVOLUTION.search(instruction.rest)
    if labels is None:
        return 0
    left, right, out = labels.groups()
    sizes = [dict(zip(names, array.shape, strict=True)) for names, array in
             ((left, sides[0]), (right, sides[1]), (out, instruction.arrays[0]))]  # fmt: skip
    products = 2 * sizes[2]["b"] * sizes[2]["f"] * sizes[1]["i"]
    for axis, name in enumerate(sorted(letter for letter in out if letter.isdigit())):
        window = [_window(instruction.rest, key, axis) for key in ("size", "stride", "pad", "lhs_dilate", "rhs_dilate")]
        products *= _products(sizes[0][name], sizes[2][name], *window)
    return products


def _window(text: str, key: str, axis: int) -> int:
    """A number of `window={...}` for one axis; of a padding, the one before."""
    window = re.search(r"window=\{([^}]*)\}", text)
    found = re.search(rf"\b{key}=([\dx_\-]+)", window[1]) if window else None
    return int(re.match(r"-?\d+", found[1].split("x")[axis])[0]) if found else int(key != "pad")  # type: ignore[index]


@functools.cache
def _products(size: int, out: int, window: int, stride: int, pad: int, dilation: int, window_dilation: int) -> int:
    """Over all places of a result's axis: how many places of the window lie on a value."""
    total, offsets = 0, np.arange(window) * window_dilation - pad
    for first in range(0, out, 4096):
        places = np.arange(first, min(first + 4096, out))[:, None] * stride + offsets
        total += int(((places >= 0) & (places % dilation == 0) & (places < size * dilation)).sum())
    return total

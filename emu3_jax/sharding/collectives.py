"""Counts the collectives of a compiled program by parsing its optimised HLO text."""

import collections
import dataclasses
import math
import re

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BITS = re.compile(r"[a-z]+(\d+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Totals over all collectives of one kind in a program.

    Attributes:
        kind: one of `KINDS`.
        count: number of executions per run of the program.
        bytes: sum over the executions, on one device: the size of the operands or of the results, the larger one.
    """

    kind: str
    count: int
    bytes: int


@dataclasses.dataclass
class _Computation:
    """One computation of the HLO.

    Attributes:
        collectives: kind and bytes of each collective in it.
        calls: name of each computation that it calls, and how often; 0 if the number is unknown.
        sizes: bytes of each instruction's result.
        constants: values of its integer constants.
        limit: name of the constant that its root compares a counter with, if any.
    """

    collectives: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    calls: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    constants: dict[str, int] = dataclasses.field(default_factory=dict)
    limit: str | None = None


def collectives(hlo: str) -> tuple[list[Collective], bool]:
    """Counts the collectives that one run of a program executes.

    Args:
        hlo: text of the program, from `jax.stages.Compiled.as_text()`.

    Returns:
        The totals of each kind, and whether the trip count of every loop with collectives is known. The body of a loop
        with unknown trip count is counted once.
    """
    computations, entry = _parse(hlo)
    totals: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    known = True

    def inside(name: str) -> bool:
        computation = computations.get(name)
        return computation is not None and (
            bool(computation.collectives) or any(inside(called) for called, _ in computation.calls)
        )

    def walk(name: str, times: int) -> None:
        nonlocal known
        for kind, size in computations[name].collectives:
            totals[kind][0] += times
            totals[kind][1] += times * size
        for called, trips in computations[name].calls:
            if inside(called):
                known = known and trips > 0
                walk(called, times * max(trips, 1))

    if entry is not None:
        walk(entry, 1)
    return [Collective(kind, *totals[kind]) for kind in KINDS if kind in totals], known


def _parse(hlo: str) -> tuple[dict[str, _Computation], str | None]:
    computations: dict[str, _Computation] = {}
    current, entry = _Computation(), None
    loops: list[tuple[_Computation, str, str, int]] = []
    for line in hlo.splitlines():
        if start := _COMPUTATION.match(line):
            current = computations[start[2]] = _Computation()
            entry = start[2] if start[1] else entry
            continue
        instruction = _INSTRUCTION.match(line)
        if not instruction:
            continue
        root, name, shape, opcode = instruction.groups()
        current.sizes[name] = _bytes(shape)
        rest = line[instruction.end() :]
        if opcode == "constant" and (value := re.match(r"(\d+)\)", rest)):
            current.constants[name] = int(value[1])
        if root and opcode == "compare" and "direction=LT" in rest:
            current.limit = rest.partition(")")[0].rpartition("%")[2]
        kind = opcode.removesuffix("-start")
        if kind in KINDS:
            operands = sum(current.sizes.get(o, 0) for o in re.findall(r"%([\w.\-]+)", rest.partition(")")[0]))
            # Asynchronous collectives return their operands along with the result. Subtract the operands.
            result = current.sizes[name] - (operands if opcode != kind and kind != "all-reduce" else 0)
            current.collectives.append((kind, max(operands, result)))
        elif opcode == "while":
            body, condition = (re.search(rf"{key}=%?([\w.\-]+)", rest)[1] for key in ("body", "condition"))
            trips = _TRIPS.search(rest)
            loops.append((current, body, condition, int(trips[1]) if trips else 0))
        else:
            branches = _BRANCHES.search(rest)
            called = _CALLED.findall(rest) + re.findall(r"[\w.\-]+", branches[1] if branches else "")
            current.calls += [(computation, 1) for computation in called]
    for caller, body, condition, trips in loops:
        # HLO for TPUs has no trip counts. The loop of a `lax.scan` counts from 0 to a constant in its condition.
        test = computations.get(condition, _Computation())
        caller.calls.append((body, trips or test.constants.get(test.limit or "", 0)))
    return computations, entry


def _bytes(shape: str) -> int:
    """Size in bytes of an HLO shape such as `f32[8,128]`. The size of a tuple is the sum of its elements."""
    total = 0
    for dtype, sizes in _ARRAY.findall(shape):
        bits = _BITS.match(dtype)
        width = 8 if dtype == "pred" else int(bits[1]) if bits else 0
        total += math.prod(int(size) for size in sizes.split(",") if size) * width // 8
    return total

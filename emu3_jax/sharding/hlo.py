"""Reads the text of an optimised HLO program: its computations, their instructions, and how often each one runs."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_COMMENT = re.compile(r"/\*.*?\*/")
_SPACE = re.compile(r"S\((\d+)\)")
_BITS = re.compile(r"[a-z]+(\d+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_PARTITIONS = re.compile(r"\bnum_partitions=(\d+)")
# Instructions whose computations run like the caller. Those that fusions and reductions name are part of them.
_RUNS_ITS_COMPUTATIONS = ("call", "conditional", "async-start")


@dataclasses.dataclass(frozen=True)
class Array:
    """Type of an array.

    Attributes:
        dtype: element type as HLO writes it, such as "bf16".
        shape: the sizes.
        space: memory space; on TPUs 0 is HBM, 1 is the vector memory on the chip.
    """

    dtype: str
    shape: tuple[int, ...]
    space: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size without the padding of tiles."""
        bits = _BITS.match(self.dtype)
        width = 8 if self.dtype == "pred" else int(bits[1]) if bits else 0
        return self.elements * width // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: its name.
        opcode: what it does, such as "fusion".
        type: type of its result, as HLO writes it.
        operands: names of its operands.
        rest: the text from the operands on.
        root: whether its result is that of its computation.
    """

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of the result: one, or those of a tuple in its order, nested ones too."""
        return tuple(
            Array(dtype, tuple(int(size) for size in sizes.split(",") if size), int(space[1]) if space else 0)
            for dtype, sizes, layout in _ARRAY.findall(self.type)
            for space in [_SPACE.search(layout)]
        )

    @property
    def bytes(self) -> int:
        """Size of the result. The size of a tuple is the sum of its arrays."""
        return sum(array.bytes for array in self.arrays)

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls, but not those of a loop."""
        branches = _BRANCHES.search(self.rest)
        return _CALLED.findall(self.rest) + re.findall(r"[\w.\-]+", branches[1] if branches else "")

    @property
    def target(self) -> str:
        """The target of a custom call, or an empty string."""
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found[1] if found else ""

    def computation(self, key: str) -> str:
        """The name after `key`, "body" or "condition" of a loop."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Run:
    """A computation that a program runs.

    Attributes:
        name: its name.
        times: how often one run of the program runs it, if loops whose trip count is unknown make one trip.
        step: whether it is inside a loop whose trip count is unknown.
    """

    name: str
    times: int
    step: bool


class Program:
    """A program's text, taken apart.

    Attributes:
        computations: the instructions of each computation by their names, in the order of the text.
        entry: name of the computation that runs first, or an empty string.
        partitions: number of devices.
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        found = _PARTITIONS.search(text[:100_000])
        self.partitions = int(found[1]) if found else 1
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if start := _COMPUTATION.match(line):
                current = self.computations[start[2]] = {}
                self.entry = start[2] if start[1] else self.entry
            elif match := _INSTRUCTION.match(line):
                root, name, type_, opcode = match.groups()
                rest = line[match.end() :]
                operands = tuple(re.findall(r"%([\w.\-#]+)", rest.partition(")")[0]))
                for operand in operands:
                    _name_element(operand, current)
                current[name] = Instruction(name, opcode, type_, operands, rest, bool(root))

    def runs(self, start: str = "", choose: Callable[[list[str]], list[str]] = list) -> list[Run]:
        """The computations that run by themselves, in the order of their calls; not those inside fusions.

        Args:
            start: the computation that runs first, by default the entry.
            choose: of the branches of a choice, gives those that count; by default all.
        """

        def below(run: Run) -> Iterator[Run]:
            yield run
            for instruction in self.computations[run.name].values():
                if instruction.opcode == "while":
                    trips = self.trips(instruction, self.computations[run.name])
                    body = instruction.computation("body")
                    if body in self.computations:
                        yield from below(Run(body, run.times * max(trips, 1), run.step or not trips))
                elif instruction.opcode in _RUNS_ITS_COMPUTATIONS:
                    called = [name for name in instruction.called if name in self.computations]
                    for name in choose(called) if instruction.opcode == "conditional" else called:
                        yield from below(dataclasses.replace(run, name=name))

        first = start or self.entry
        return list(below(Run(first, 1, False))) if first else []

    def trips(self, loop: Instruction, around: dict[str, Instruction]) -> int:
        """How often a loop's body runs, or 0 if the program's text does not say it.

        Args:
            loop: the loop.
            around: the instructions of its computation, by name.
        """
        if found := _TRIPS.search(loop.rest):
            return int(found[1])
        # HLO for TPUs has no trip counts. The loop of a `lax.scan` counts from 0 to a constant in its condition. Loops
        # that XLA makes of a product and its collective count in steps of 2.
        condition, body = loop.computation("condition"), loop.computation("body")
        if condition not in self.computations or body not in self.computations:
            return 0
        test = self.root(condition)
        if test.opcode != "compare" or "direction=LT" not in test.rest:
            return 0
        counter, limit = (self.computations[condition].get(name) for name in test.operands)
        last = _constant(limit, self.computations[condition])
        if counter is None or last is None:
            return 0
        first, step, place = None, None, re.search(r"index=(\d+)", counter.rest)
        if counter.opcode == "get-tuple-element" and place:
            index, start, root = int(place[1]), around.get(loop.operands[0]), self.root(body)
            if start is not None and start.opcode == "tuple":
                first = _constant(around.get(start.operands[index]), around)
            after = self.computations[body].get(root.operands[index]) if root.opcode == "tuple" else None
            if after is not None and after.opcode == "add":
                steps = (
                    _constant(self.computations[body].get(name), self.computations[body]) for name in after.operands
                )
                step = next((value for value in steps if value is not None), None)
        return max(-(-(last - (first or 0)) // (step or 1)), 0)

    def root(self, computation: str) -> Instruction:
        """The instruction whose result is that of a computation."""
        instructions = self.computations[computation]
        return next((i for i in instructions.values() if i.root), list(instructions.values())[-1])


def _name_element(operand: str, instructions: dict[str, Instruction]) -> None:
    """Adds the get-tuple-element that an operand such as "state#3" stands for: newer versions of XLA write it so."""
    source, sign, index = operand.rpartition("#")
    if not sign or operand in instructions:
        return
    _name_element(source, instructions)
    if source in instructions:
        type_ = _elements(instructions[source].type)[int(index)]
        rest = f"%{source}), index={index}"
        instructions[operand] = Instruction(operand, "get-tuple-element", type_, (source,), rest, False)


@functools.lru_cache(maxsize=64)
def _elements(type_: str) -> list[str]:
    """The types of a tuple's elements."""
    found, depth = [""], 0
    for character in _COMMENT.sub("", type_)[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            found.append("")
        else:
            found[-1] += character
    return [element.strip() for element in found]


def _constant(instruction: Instruction | None, around: dict[str, Instruction]) -> int | None:
    """The value of an integer constant, also of a copy of one, or None."""
    while instruction is not None and instruction.opcode in ("copy", "bitcast"):
        instruction = around.get(instruction.operands[0])
    value = re.match(r"(-?\d+)\)", instruction.rest) if instruction and instruction.opcode == "constant" else None
    return int(value[1]) if value else None

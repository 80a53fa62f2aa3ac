"""The least time of a compiled program, from the traffic and the FLOPs in its text and the peaks of the chip.

A bound is no forecast: it assumes that memory, arithmetic and network each work at their peak, and all at once.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from emu3_jax.sharding.chips import Chip
from emu3_jax.sharding.costs import Costs, count


@dataclasses.dataclass(frozen=True)
class Training:
    """What a program trains on.

    Attributes:
        tokens: number of tokens of a step, without padding, on all devices.
        attention: FLOPs of attention, forward and backward, on all devices. Kernels of attention do not state theirs.
    """

    tokens: int
    attention: float


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What a program of decoding makes.

    Attributes:
        noun: what a row makes, as a word.
        rows: number of rows that are made at once.
        passes: for each number of slots of the cache that is read, in rising order: the number, and how many passes.
            With guesses of several tokens a pass, the number if all guesses are right.
        window: number of tokens that a pass computes of each row.
    """

    noun: str
    rows: int
    passes: tuple[tuple[int, int], ...]
    window: int = 1


@dataclasses.dataclass(frozen=True)
class Peaks:
    """What one device of a slice does at most, per second. `Chip` explains the figures.

    Attributes:
        flops: FLOPs in bfloat16.
        integer_ops: operations in int8.
        bandwidth: bytes through HBM.
        ici: bytes sent inside the slice.
        dcn: bytes sent to other slices, or None if that is unknown.
    """

    flops: float
    integer_ops: float
    bandwidth: float
    ici: float
    dcn: float | None

    @classmethod
    def of(cls, chip: Chip, sides: Sequence[int]) -> "Peaks":
        # Two devices of one chip can share what the links bring in. So the links of the chip bound each of them.
        return cls(chip.flops, chip.integer_ops, chip.bandwidth, chip.ici(sides), chip.dcn)


def bound(
    costs: Costs, peaks: Peaks, formula: float | None = None, spared: float = 0.0, kernels: float = 0.0
) -> dict[str, Any]:
    """The least time of a program, and what sets it.

    Args:
        costs: what one device does.
        peaks: what it does at most per second.
        formula: FLOPs of one device by a formula, which replace smaller counts.
        spared: bytes of HBM traffic to leave out.
        kernels: FLOPs of kernels that do not state theirs.

    Returns:
        `seconds`, `by` ("memory", "compute" or "network"), and the seconds of each.
    """
    flops = (costs.flops + (kernels if costs.kernels else 0.0)) / peaks.flops + costs.integer_ops / peaks.integer_ops
    if formula is not None:
        flops = max(flops, formula / (peaks.integer_ops if costs.integer_ops else peaks.flops))
    ici = sum(collective.ici_bytes for collective in costs.collectives)
    dcn = sum(collective.dcn_bytes for collective in costs.collectives)
    network = max(
        # Two devices of one chip of TPU7x have no link between chips; what joins them is not in the table.
        ici / peaks.ici if ici and peaks.ici else 0.0,
        dcn / peaks.dcn if dcn and peaks.dcn else 0.0,
    )
    parts = {
        "memory": max(costs.read + costs.written - spared, 0) / peaks.bandwidth,
        "compute": flops,
        "network": network,
    }
    by = max(parts, key=lambda name: parts[name])
    return {"seconds": parts[by], "by": by, **{f"{name}_seconds": value for name, value in parts.items()}}


def measure(
    text: str,
    peaks: Peaks,
    devices: int,
    devices_per_chip: int,
    flops: float | None,
    rates: Training | Decoding | None,
    arguments: Mapping[str, int],
) -> dict[str, Any]:
    """The traffic and the least time of a compiled program.

    Args:
        text: its optimised HLO.
        peaks: what one device does at most per second.
        devices: number of devices that run it.
        devices_per_chip: devices of one chip.
        flops: FLOPs of one run, or of one step of a loop without a known end, on all devices, from a formula.
        rates: what it trains on or makes.
        arguments: bytes of its arguments on one device, by name. "cache" is what a decoding step reads.

    Returns:
        Of one device: `costs` of a run without its endless loop; `step_costs` of one step of that loop, or None;
        `bound` of a step if there is one, else of a run. With `rates` also "training" or "decoding".
    """
    costs, step = count(text)
    each = None if flops is None else flops / devices
    kernels = rates.attention / devices if isinstance(rates, Training) else 0.0
    found = bound(step or costs, peaks, each, kernels=kernels)
    result: dict[str, Any] = {
        "costs": dataclasses.asdict(costs),
        "step_costs": dataclasses.asdict(step) if step else None,
        "bound": found,
    }
    if isinstance(rates, Training) and flops is not None:
        result["training"] = _training(rates, found["seconds"], flops, devices, devices_per_chip, peaks)
    if isinstance(rates, Decoding) and step:
        chips = devices / devices_per_chip
        result["decoding"] = _decoding(rates, costs, step, peaks, arguments.get("cache", 0), each, chips)
    return result


def _training(
    training: Training, seconds: float, flops: float, devices: int, devices_per_chip: int, peaks: Peaks
) -> dict[str, Any]:
    """The most tokens per second and chip, and the highest MFU."""
    return {
        "tokens_per_second_per_chip": training.tokens / seconds / devices * devices_per_chip,
        "mfu": flops / (seconds * peaks.flops * devices),
    }


def _decoding(
    decoding: Decoding, once: Costs, step: Costs, peaks: Peaks, cache: int, formula: float | None, chips: float
) -> dict[str, Any]:
    """The least seconds, and the most pictures per minute and chip. Prefill and pixels are other programs.

    The program starts at least once for each size of the cache. A step reads the cache once: where less of it is read,
    that saves the difference.
    """
    largest = decoding.passes[-1][0]
    seconds = len(decoding.passes) * bound(once, peaks)["seconds"]
    for slots, passes in decoding.passes:
        seconds += passes * bound(step, peaks, formula, cache * (1 - slots / largest))["seconds"]
    return {
        "noun": decoding.noun,
        "rows": decoding.rows,
        "steps": sum(passes for _, passes in decoding.passes),
        "window": decoding.window,
        "seconds": seconds,
        "seconds_each": seconds / decoding.rows,
        "per_minute_per_chip": 60 * decoding.rows / seconds / chips,
    }


def least_seconds(program: dict[str, Any]) -> float:
    """The least time of all runs of one program of a plan, each with all its steps."""
    once = program["decoding"]["seconds"] if "decoding" in program else program["bound"]["seconds"]
    return program["runs"] * once


def describe_bound(program: dict[str, Any]) -> Iterator[str]:
    """Yields the lines of a report about the bound of one program of a plan."""
    if "bound" not in program:
        return
    costs, found = program["step_costs"] or program["costs"], program["bound"]
    per = "a step" if program["step_costs"] else "a run"
    yield f"  {'HBM reads':<20} {_bytes(costs['read']):>12}  {per}"
    yield f"  {'HBM writes':<20} {_bytes(costs['written']):>12}  {per}"
    flops = costs["flops"] + costs["integer_ops"]
    untold = f", without {costs['kernels']} runs of kernels" if costs["kernels"] else ""
    if flops or untold:
        yield f"  {'FLOPs counted':<20} {flops / 1e12:>8.3f} T    {per}, loops as often as they run{untold}"
    for name, where in (("ici_bytes", "sent over ICI"), ("dcn_bytes", "sent over DCN")):
        sent = sum(collective[name] for collective in costs["collectives"])
        if sent:
            yield f"  {where:<20} {_bytes(sent):>12}  {per}"
    parts = ", ".join(f"{name} {_time(found[f'{name}_seconds'])}" for name in ("memory", "compute", "network"))
    yield f"  {'least time':<20} {_time(found['seconds']):>12}  {per}, by {found['by']} ({parts})"
    if rates := program.get("training"):
        yield (
            f"  at most {rates['tokens_per_second_per_chip']:,.0f} tokens per second and chip, MFU {rates['mfu']:.1%}"
        )
    if rates := program.get("decoding"):
        many = f"{rates['rows']} {rates['noun']}{'s' if rates['rows'] > 1 else ''}"
        right = ", if all guesses are right" if rates["window"] > 1 else ""
        yield (
            f"  at least {rates['seconds']:.1f} s for {rates['steps']} steps of {many}{right}: "
            f"{rates['seconds_each']:.2f} s each, at most {rates['per_minute_per_chip']:.2f} per minute and chip"
        )


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-4 or not seconds else f"{seconds * 1e6:.2f} us"


def _bytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.2f} MiB"

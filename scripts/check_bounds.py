"""Checks the bounds of `emu3-jax plan` against steps that this machine runs.

    python scripts/check_bounds.py                     # needs an NVIDIA GPU with 80 GB; for `fsdp`, two with 141 GB
    python scripts/check_bounds.py decode --keep out   # keeps figures and compiled programs in out/
    python scripts/check_bounds.py --from out          # prints the tables from them, without a GPU

Each part is a run of `emu3-jax bench`, in its own process. XLA writes down the program that it compiles for the GPU,
and the arithmetic of a plan counts the bytes and FLOPs in it. Their peaks are measured: the bandwidth of a large copy,
and the rate of a bfloat16 product of two square matrices. The script prints its figures as JSON lines to standard
error, and two Markdown tables:

- Decode steps: bytes over bandwidth beside the time of a step. Bytes are counted by the shapes (weights and the used
  part of the cache) and by the program, without the slots of the cache that its kernel skips.
- Train steps: the bound beside the time of a step, and what explains the rest: recomputed FLOPs, bytes that a device
  sends, and where the GPU spends a step.

The exit code is 1 if a part fails.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from emu3_jax.sharding.costs import Costs, count, executed_runs
from emu3_jax.sharding.hlo import Instruction, Program

DECODE = ("decode", "--steps", "64", "--rows", "1", "8", "--profile")
TRAIN = ("train", "--remat", "dots", "--profile", "--mesh")
PARTS: dict[str, tuple[str, ...]] = {
    "decode": DECODE,
    "decode-int8": (*DECODE, "--quantize", "int8"),
    "lora": (*TRAIN, "fsdp=1", "--adapter", "16"),
    "full": (*TRAIN, "fsdp=1", "--layers", "6"),
    "fsdp": (*TRAIN, "fsdp=2", "--rows", "2"),
}
SMALL = ("--preset", "small", "--layers", "1", "--tokens", "16", "--steps", "1")
TINY: dict[str, tuple[str, ...]] = {
    "decode": ("decode", "--model", "--steps", "2"),
    "fsdp": ("train", *SMALL, "--adapter", "2", "--rows", "2", "--mesh", "fsdp=2"),
}
AIM = 0.15  # how far the bound of a decode step may be from its time
FIGURES, PEAKS = "figures.jsonl", "peaks.json"  # files of each part, and of all
Figures = list[dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"parts to run: {', '.join(PARTS)} (default: all that fit the machine)"
    )
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--keep", type=pathlib.Path, metavar="DIR", help="keep figures and compiled programs in DIR")
    kept.add_argument(
        "--from", dest="source", type=pathlib.Path, metavar="DIR", help="run nothing: print what --keep left in DIR"
    )
    parser.add_argument("--tiny", action="store_true", help="small shapes that a CPU can run, to test this script")
    options = parser.parse_args()
    known = TINY if options.tiny else PARTS
    for part in options.parts:
        if part not in known:
            parser.error(f"part {part!r} is unknown: choose from {', '.join(known)}")
    if options.source:
        parts = options.parts or [part for part in known if (options.source / part / FIGURES).exists()]
        for file in [options.source / PEAKS, *(options.source / part / FIGURES for part in parts or ["PART"])]:
            if not file.exists():
                parser.error(f"{file} does not exist: give a directory that --keep filled")
        report(parts, known, options.source)
        return 0
    if options.keep and options.keep.exists() and (options.keep.is_file() or any(options.keep.iterdir())):
        parser.error(f"{options.keep} holds something: give an empty or new directory")
    parts = options.parts or [part for part in known if part != "fsdp" or options.tiny or gpus() > 1]
    with tempfile.TemporaryDirectory() as temporary:
        root = options.keep or pathlib.Path(temporary)
        succeeded = [run(known[part], root / part, options.tiny) for part in parts]
        peaks = measured_peaks(options.tiny)  # at the end, because JAX reserves the GPU's memory
        show(peaks)
        (root / PEAKS).write_text(json.dumps(peaks) + "\n")
        report(parts, known, root)
    return int(not all(succeeded))


def report(parts: list[str], known: dict[str, tuple[str, ...]], root: pathlib.Path) -> None:
    """Prints the peaks and the tables of what `run` and `main` left in a directory."""
    peaks = json.loads((root / PEAKS).read_text())
    print(", ".join(f"{key} {value}" for key, value in peaks.items()))
    decoded, trained = [], []
    for part in parts:
        figures = [json.loads(line) for line in (root / part / FIGURES).read_text().splitlines()]
        texts = [file.read_text() for file in dumped(root / part)]
        if known[part][0] == "train":
            trained += train_lines(part, figures, texts, peaks)
        else:
            decoded += decode_lines(part, figures, texts, peaks)
    table(DECODED, decoded)
    table(TRAINED, trained)


def gpus() -> int:
    """The number of NVIDIA GPUs, from JAX in a process of its own, which leaves their memory free."""
    code = "import jax; print(len([d for d in jax.devices() if d.platform == 'gpu']))"
    return int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout)


def run(arguments: tuple[str, ...], directory: pathlib.Path, tiny: bool) -> bool:
    """Runs `emu3-jax bench`, and says whether it succeeded. `directory` gets its figures and XLA's main programs."""
    flags = [os.environ.get("XLA_FLAGS", ""), f"--xla_dump_to={directory}", "--xla_dump_hlo_as_text"]
    flags += ["--xla_dump_hlo_module_re=jit_(decode|_step)"]
    flags += ["--xla_force_host_platform_device_count=2"] if tiny else []
    # Programs from JAX's persistent cache are not compiled, so XLA does not write them down.
    environment = {**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-m", "emu3_jax.cli.main", "bench", *arguments]
    directory.mkdir(parents=True)
    with (
        open(directory / FIGURES, "w") as kept,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process,
    ):
        for line in process.stdout:
            if line.startswith("{"):
                print(line, end="", file=sys.stderr, flush=True)
                kept.write(line)
    return process.returncode == 0


def dumped(directory: pathlib.Path) -> list[pathlib.Path]:
    """The optimised programs that XLA wrote down, in the order of their compilation."""
    files = directory.glob("module_*.jit_*after_optimizations.txt")
    return sorted(files, key=lambda file: int(re.match(r"module_(\d+)", file.name)[1]))


def measured_peaks(tiny: bool) -> dict[str, float]:
    """Bandwidths of the device in GB/s, and its TFLOP/s of a bfloat16 product."""
    import jax
    import jax.numpy as jnp

    from emu3_jax.benchmarks.decode import bandwidths
    from emu3_jax.benchmarks.random_weights import normal

    side, calls = (256, 2) if tiny else (8192, 20)
    keys = jax.random.split(jax.random.key(0), 2)
    # Random numbers: for constant ones a GPU needs less power, and so runs faster.
    x, y = (normal(key, (side, side), side**-0.5, jnp.bfloat16) for key in keys)
    product, best = jax.jit(jnp.matmul), math.inf
    for _ in range(4):
        began = time.perf_counter()
        for _ in range(calls):
            x = product(x, y)
        jax.block_until_ready(x)
        best = min(best, (time.perf_counter() - began) / calls)
    return {**bandwidths(not tiny), "product_tflop_per_s": float(f"{2 * side**3 / best / 1e12:.4g}")}


def decode_lines(part: str, figures: Figures, texts: list[str], peaks: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Yields the figures of each decode step.

    Each number of pictures and size of the cache has a program, which several lengths share.
    """
    steps = [line for line in figures if "bytes_per_step" in line]
    sizes = list(dict.fromkeys((line["pictures"], line["cache_slots"]) for line in steps))
    programs = dict(zip(sizes, [count(text)[1] for text in texts], strict=True)) if len(texts) == len(sizes) else {}
    busy = [line["busy_ms"] for line in figures if "busy_ms" in line]
    skips = bool(figures) and figures[0].get("kernels", "xla") != "xla"
    for place, line in enumerate(steps):
        length, slots, measured = line["cache_length"], line["cache_slots"], line["ms_per_step"]
        moved = {"shapes": line["bytes_per_step"]}
        if step := programs.get((line["pictures"], slots)):
            skipped = line["cache_bytes"] * (slots - length) / length if skips else 0
            moved["program"] = round(step.read + step.written - skipped)
        yield {
            "part": part,
            "pictures": line["pictures"],
            "cache": length,
            "measured_ms": measured,
            **{f"gb_by_{name}": round(size / 1e9, 3) for name, size in moved.items()},
            **{
                f"bound_by_{name}": ratio(size / peaks["copy_gb_per_s"] / 1e6, measured) for name, size in moved.items()
            },
            # Kernels are a little slower under the profiler.
            **({"idle_ms": round(max(measured - busy[place], 0), 3)} if len(busy) == len(steps) else {}),
        }


def train_lines(part: str, figures: Figures, texts: list[str], peaks: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Yields the figures of a train step, per device."""
    step = next((line for line in figures if "ms_per_step" in line), None)
    if step is None or len(texts) != 1:
        return
    head, program = figures[0], Program(texts[0])
    costs, _ = count(texts[0])
    products, attention = executed(program, costs, head, step["rows"] // program.partitions)
    bounds = {
        "compute": (products + attention) / peaks["product_tflop_per_s"] / 1e9,
        "memory": (costs.read + costs.written) / peaks["copy_gb_per_s"] / 1e6,
    }
    kinds = next((line["kinds_ms"] for line in figures if "kinds_ms" in line), {})
    spent = {kind.replace(" ", "_") + "_ms": round(ms / program.partitions, 1) for kind, ms in kinds.items()}
    model = step["model_tflops"] * step["ms_per_step"] / 1e3 / program.partitions
    yield {
        "part": part,
        "measured_ms": step["ms_per_step"],
        "model_tflop": round(model, 2),
        "executed_tflop": round((products + attention) / 1e12, 2),
        "attention_tflop": round(attention / 1e12, 2),
        "hbm_gb": round((costs.read + costs.written) / 1e9, 1),
        "sent_gb": round(sum(collective.ici_bytes for collective in costs.collectives) / 1e9, 2),
        "collectives": [dataclasses.asdict(collective) for collective in costs.collectives],
        **{f"{name}_ms": round(ms, 1) for name, ms in bounds.items()},
        "bound": ratio(max(bounds.values()), step["ms_per_step"]),
        "spent": spent,
        **({"idle_ms": round(step["ms_per_step"] - sum(spent.values()), 1)} if spent else {}),
    }


def executed(program: Program, costs: Costs, head: dict[str, Any], rows: int) -> tuple[int, int]:
    """FLOPs of a train step on one device, recomputation included: those of matrix products and of attention.

    `count` knows products that XLA itself compiles. XLA calls cuBLAS for others, and cuDNN for attention: two products
    in the forward pass, and five in the backward pass, of the pairs of tokens that see each other.
    """
    from emu3_jax.benchmarks.train import PRESETS

    decoder = PRESETS[head["preset"]]
    pairs = rows * head["tokens"] * (head["tokens"] + 1) / 2
    product = round(2 * decoder.num_heads * decoder.head_dim * pairs)
    products, attention = costs.flops, 0
    for run in executed_runs(program):
        for instruction, instructions in calls(program, run.name):
            if instruction.target.startswith("__cublas$"):
                axes = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.rest)
                sides = instructions[instruction.operands[0]].arrays[0].shape
                summed = math.prod(sides[int(axis)] for axis in re.findall(r"\d+", axes[1]))
                products += run.times * 2 * instruction.arrays[0].elements * summed
            elif "$fmha" in instruction.target:
                attention += run.times * product * (5 if "Backward" in instruction.target else 2)
    return products, attention


def calls(program: Program, name: str) -> Iterator[tuple[Instruction, dict[str, Instruction]]]:
    """Yields the custom calls of a computation and of its fusions, each with the instructions around it."""
    instructions = program.computations[name]
    for instruction in instructions.values():
        if instruction.opcode == "custom-call":
            yield instruction, instructions
        elif instruction.opcode == "fusion":
            for called in instruction.called:
                yield from calls(program, called)


def ratio(bound: float, measured: float) -> float:
    """A bound divided by what was measured, both in the same unit."""
    return round(bound / measured, 3)


# The columns of the tables: head, and what a cell says of a line.
DECODED = {
    "step": lambda line: f"{line['part']}, pictures at once: {line['pictures']}",
    "tokens in the cache": lambda line: f"{line['cache']:,}",
    "GB by shapes": lambda line: f"{line['gb_by_shapes']:.2f}",
    "GB by the program": lambda line: f"{line['gb_by_program']:.2f}" if "gb_by_program" in line else "",
    "measured": lambda line: f"{line['measured_ms']:.2f} ms",
    "bound / measured, shapes": lambda line: f"{line['bound_by_shapes']:.2f}",
    "program": lambda line: f"{line['bound_by_program']:.2f}" if "bound_by_program" in line else "",
    f"within {AIM:.0%}": lambda line: (
        "yes" if abs(1 - line.get("bound_by_program", line["bound_by_shapes"])) <= AIM else "no"
    ),
    "GPU idle": lambda line: f"{line['idle_ms']:.2f} ms" if "idle_ms" in line else "",
}
TRAINED = {
    "step": lambda line: line["part"],
    "measured": lambda line: f"{line['measured_ms']:,.0f} ms",
    "bound / measured": lambda line: f"{line['bound']:.2f}",
    "compute": lambda line: f"{line['compute_ms']:,.0f} ms",
    "memory": lambda line: f"{line['memory_ms']:,.0f} ms, {line['hbm_gb']:,.0f} GB",
    "TFLOP of the model": lambda line: f"{line['model_tflop']:,.0f}",
    "executed": lambda line: f"{line['executed_tflop']:,.0f}, attention {line['attention_tflop']:,.0f}",
    "sent": lambda line: f"{line['sent_gb']:.1f} GB",
    "the GPU's time": lambda line: ", ".join(
        f"{name.removesuffix('_ms').replace('_', ' ')} {ms:,.0f} ms"
        for name, ms in {**line["spent"], **({"idle": line["idle_ms"]} if "idle_ms" in line else {})}.items()
    ),
}


def table(columns: dict[str, Any], lines: Figures) -> None:
    """Prints lines as JSON, and as a Markdown table."""
    for line in lines:
        show(line)
    if lines:
        print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
        for line in lines:
            print("| " + " | ".join(cell(line) for cell in columns.values()) + " |")


def show(figures: dict[str, Any]) -> None:
    print(json.dumps(figures), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

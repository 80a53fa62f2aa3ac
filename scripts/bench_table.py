"""Benchmarks decoding on this machine's GPU and prints one table. Run `python scripts/bench_table.py` in a checkout.

The script runs `emu3-jax bench` once per part, each in its own process. It copies the JSON lines of the benchmarks to
standard error, and prints a Markdown table: the goal for an H100 80 GB beside the measured figure. The exit code is 1
if a part fails.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

DECODE = ("decode", "--steps", "64")
EMU35 = (*DECODE, "--preset", "emu35-34b", "--automaton")
PARTS: dict[str, tuple[str, ...]] = {
    "exact": (*DECODE, "--rows", "1", "4", "8", "16", "--compare", "transformers"),
    "again": (*DECODE, "--rows", "1"),
    "int8": (*DECODE, "--rows", "1", "4", "8", "16", "--quantize", "int8", "--logits"),
    "int8-weights": (*DECODE, "--quantize", "int8-weights", "--logits"),
    "fp8": (*DECODE, "--quantize", "fp8", "--logits"),
    "parallel": (*DECODE, "--rows", "1", "8", "--parallel", "off", "8", "16", "32", "64"),
    "parallel-int8": (*DECODE, "--parallel", "off", "16", "32", "--quantize", "int8"),
    "emu35-int8": (*EMU35, "--parallel", "off", "16", "--quantize", "int8"),
    "vision": ("vision", "--size", "720", "--fast"),
    "two": (*DECODE, "--mesh", "tensor=2"),
}
# Milliseconds per pass, averaged over the picture, by part, pictures at once and tokens per pass.
PARALLEL_GOALS = {
    ("parallel", 1, 16): 6.7, ("parallel", 1, 32): 7.1, ("parallel", 1, 64): 8.4, ("parallel", 8, 16): 11,
    ("parallel-int8", 1, 32): 4.8,
}  # fmt: skip
Figures = list[dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everywhere = [part for part in PARTS if part not in ("two", "emu35-int8")]
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help=f"parts to run: {', '.join(PARTS)} (default: all except `two`, which needs two GPUs, and "
        "`emu35-int8`, the 34 B shapes)",
    )
    chosen = parser.parse_args().parts or everywhere
    for part in chosen:
        if part not in PARTS:
            parser.error(f"part {part!r} is unknown: choose from {', '.join(PARTS)}")
    results, failed = {}, False
    for part in chosen:
        results[part], ok = run(PARTS[part])
        failed |= not ok
    machine = next((line for figures in results.values() for line in figures if "device" in line), {})
    print(", ".join(f"{key} {machine[key]}" for key in ("device", "copy_gb_per_s", "jax") if key in machine))
    print("| what | goal (H100) | measured |\n|---|---|---|")
    for row in rows(results):
        print("| " + " | ".join(row) + " |")
    return int(failed)


def run(arguments: tuple[str, ...]) -> tuple[Figures, bool]:
    """The figures that `emu3-jax bench` printed, and whether it succeeded."""
    command = [sys.executable, "-m", "emu3_jax.cli.main", "bench", *arguments]
    figures = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("{"):
                print(line, end="", file=sys.stderr, flush=True)
                figures.append(json.loads(line))
    return figures, process.returncode == 0


def rows(results: dict[str, Figures]):
    """Yields (what, goal, measured) for everything that was measured."""
    pictures = {
        part: {line["pictures"]: line for line in figures if "ms_per_token_average" in line}
        for part, figures in results.items()
    }
    exact, narrow = pictures.get("exact", {}), pictures.get("int8", {})
    if 1 in exact:
        ms = exact[1]["ms_per_token_average"]
        shares = [
            line["share_of_copy"] for line in results["exact"] if line.get("pictures") == 1 and "gb_per_s" in line
        ]
        yield (
            "exact, one guided 720x720 picture",
            "5.8 ms per step, 90% of copy bandwidth",
            (f"{ms} ms, {min(shares):.0%} to {max(shares):.0%}"),
        )
        for name, aim in (("generate()", 23), ("torch.compile", 2.3)):
            times = [line["ms_per_token"] for line in results["exact"] if name in line.get("peer", "")]
            if times:
                ratio = min(times) / ms
                yield f"speed-up over {name} of transformers", f"{aim}", f"{ratio:.1f} (its best: {min(times)} ms)"
        yield "compile, prefill and decode, first calls", "60 s", f"{exact[1]['first_calls_s']} s"
        yield "sampler, share of a step", "3%", f"{exact[1]['sampler_share']:.1%}"
    again, two = pictures.get("again", {}), pictures.get("two", {})
    if 1 in again and 1 in exact:
        yield "the same, with programs from the persistent cache", "10 s", f"{again[1]['first_calls_s']} s"
    if 1 in again and 1 in two:
        ratio = again[1]["ms_per_token_average"] / two[1]["ms_per_token_average"]
        yield "two GPUs, tensor parallel, speed-up over one", "1.7", f"{ratio:.2f}"
    if 1 in narrow:
        yield "int8 weights and cache, one picture", "3.2 ms per step", f"{narrow[1]['ms_per_token_average']} ms"
    for part, figures in pictures.items():
        for count, line in figures.items():
            ratio = ""
            if 1 in figures and count > 1:
                ratio = f" ({line['pictures_per_minute'] / figures[1]['pictures_per_minute']:.2f} x batch size 1)"
            aim = {("exact", 8): "4.8 x batch size 1", ("int8", 8): "5 s per picture"}.get((part, count), "")
            yield (
                f"{part}, batch size {count}",
                aim,
                (
                    f"{line['ms_per_token_average']} ms per step, {line['seconds_per_picture']} s per picture, "
                    f"{line['pictures_per_minute']} per minute{ratio}, peak memory {line.get('peak_gb', '?')} GB"
                ),
            )
        error = next((line for line in results[part] if "logit_error" in line), None)
        if error:
            yield (
                f"{part}, logits of random weights",
                "",
                (f"relative error {error['logit_error']}, same likeliest token {error['same_likeliest']:.0%}"),
            )
    for part, figures in results.items():
        for line in figures:
            if "automaton_share" in line:
                window = line.get("parallel", 1)
                yield (
                    f"{part}, {line['pictures']} at once, W = {window}, automaton of interleave",
                    "1% of a pass",
                    f"{line['automaton_share']:.2%}, {line['automaton_ms']} ms",
                )
            if "ms_per_pass_average" not in line:
                continue
            times = (
                f"{seconds} s per picture at {name.removeprefix('seconds_per_picture_at_').replace('_', ' ')}"
                for name, seconds in line.items()
                if name.startswith("seconds_per_picture_at_")
            )
            aim = PARALLEL_GOALS.get((part, line["pictures"], line["parallel"]))
            yield (
                f"{part}, {line['pictures']} at once, {line['parallel']} tokens per pass",
                f"{aim} ms per pass" if aim else "",
                f"{line['ms_per_pass_average']} ms per pass; {', '.join(times)}",
            )
    sides = {line["side"]: line for line in results.get("vision", []) if "side" in line}
    if "emu3_jax" in sides:
        yield (
            "VQ 720x720, decode and encode",
            "0.4 s, 0.2 s",
            (f"{sides['emu3_jax']['decode_s']} s, {sides['emu3_jax']['encode_s']} s"),
        )
    if "emu3_jax, fast" in sides:
        fast = sides["emu3_jax, fast"]
        yield (
            "VQ 720x720, fast decode",
            "0.1 s, mean error under 1/255",
            (f"{fast['decode_s']} s, mean error {fast['mean_difference_255ths']}/255"),
        )


if __name__ == "__main__":
    sys.exit(main())

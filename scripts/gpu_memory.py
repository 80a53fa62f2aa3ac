"""Which precision fits which GPU: a model of 8 B shapes generates a picture and an answer in limited GPU memory.

    python scripts/gpu_memory.py DIR [CARD ...]

It needs an NVIDIA GPU with more memory than the cards of the table, 60 GB of disk under DIR and the extra `vocabulary`.
It writes a checkpoint of random weights with the published shapes, and converts it to a bfloat16 and an int8 bundle.
Each run is a process of its own. Its GPU memory is limited to the share of the card's memory that JAX may use, and it
uses the kernels and dtypes that the package would choose on that card. The script prints one JSON line for each run,
and a Markdown table at the end. The table has no times, because the runs use another card than the table names.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

# GiB that CUDA reports for the card, and the card's compute capability.
CARDS = {"T4": (14.56, "7.5"), "L4": (22.03, "8.9"), "A100 40 GB": (39.49, "8.0"), "this GPU": (None, None)}
SHARE = 0.95  # share of the card's memory that JAX may use; sets XLA_PYTHON_CLIENT_MEM_FRACTION
# Card, bundle, and further arguments of `load`.
RUNS = (
    ("T4", "int8", {}),
    ("T4", "int8", {"fast_pixels": True}),
    ("L4", "int8", {}),
    ("L4", "bfloat16", {}),
    ("A100 40 GB", "bfloat16", {}),
    ("this GPU", "bfloat16", {}),
    ("this GPU", "int8", {}),
)

RUN = """
import json, resource, sys, time
began = time.perf_counter()
import jax
import emu3_jax
from emu3_jax.errors import Emu3Error

def gib(what):
    return round(what / 2**30, 2)

def peak():
    return gib(jax.devices()[0].memory_stats()["peak_bytes_in_use"])

def since(started):
    return round(time.perf_counter() - started, 1)

arguments = json.loads(sys.argv[2])
figures = {"limit_gib": gib(jax.devices()[0].memory_stats()["bytes_limit"])}
try:
    started = time.perf_counter()
    model = emu3_jax.load(sys.argv[1], **arguments)
    jax.block_until_ready(model.language.params)
    figures |= {"dtype": model.language.config.dtype, "load_s": since(started), "loaded_gib": peak()}
    started = time.perf_counter()
    (picture,) = model.generate("a red apple", seed=0)
    figures |= {"picture": list(picture.size), "picture_s": since(started), "picture_gib": peak()}
    started = time.perf_counter()
    (answer,) = model.chat([picture], ["Describe the picture."], max_new_tokens=64)
    figures |= {"answer_s": since(started), "answer_gib": peak(), "fits": True}
except Exception as error:
    if not isinstance(error, Emu3Error) and "RESOURCE_EXHAUSTED" not in str(error):
        raise
    figures |= {"fits": False, "error": str(error)[:160]}
figures["host_peak_gib"] = gib(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(json.dumps(figures))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path, metavar="DIR")
    parser.add_argument(
        "cards", nargs="*", metavar="CARD", help=f"of {', '.join(map(repr, CARDS))} (default: all of them)"
    )
    parser.add_argument("--preset", choices=("8b", "small"), default="8b", help="small is for tests of this script")
    options = parser.parse_args()
    for card in options.cards:
        if card not in CARDS:
            parser.error(f"card {card!r} is unknown: choose from {', '.join(map(repr, CARDS))}")
    known = {"checkpoint", "bfloat16", "int8"}
    if options.directory.exists() and not options.directory.is_dir():
        parser.error(f"{options.directory} is a file: give an empty or new directory")
    if options.directory.exists() and {path.name for path in options.directory.iterdir()} - known:
        parser.error(f"{options.directory} holds other files: give an empty or new directory")
    total = device_gib()
    if total is None:
        parser.error("JAX finds no NVIDIA GPU here: run this on a machine with one, with emu3-jax[cuda12] or [cuda13]")
    runs = [run for run in RUNS if not options.cards or run[0] in options.cards]
    bundles = write_bundles(options.directory, options.preset, {bundle for _, bundle, _ in runs})
    rows, failed = [], False
    for card, bundle, arguments in runs:
        figures = measure(card, bundles[bundle], arguments, total)
        failed |= figures is None
        if figures is not None:
            rows.append((card, bundle, arguments, figures))
            print(json.dumps({"card": card, "bundle": bundle, **arguments, **figures}), flush=True)
    print("| card | JAX gets | bundle | decoder computes in | loaded | picture 720x720 | answer | fits |")
    print("|---|---|---|---|---|---|---|---|")
    for card, bundle, arguments, figures in rows:
        sizes = (
            f"{figures[name]} GiB" if name in figures else "" for name in ("loaded_gib", "picture_gib", "answer_gib")
        )
        name = f"{bundle}, --fast-pixels" if arguments else bundle
        fits = "yes" if figures["fits"] else "no"
        cells = (card, f"{figures['limit_gib']} GiB", name, figures.get("dtype", ""), *sizes, fits)
        print("| " + " | ".join(cells) + " |")
    return int(failed)


def write_bundles(directory: pathlib.Path, preset: str, kinds: set[str]) -> dict[str, pathlib.Path]:
    """The bundles of random weights, "bfloat16" and "int8". Writes the ones that do not exist."""
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    import bench_convert
    import small_checkpoint

    from emu3_jax.config import DecoderConfig, VisionConfig

    bundles = {kind: directory / kind for kind in sorted(kinds)}
    absent = [kind for kind, bundle in bundles.items() if not bundle.exists()]
    if absent:
        if preset == "8b":
            small_checkpoint.VISION = VisionConfig()
        area = 720 * 720 if preset == "8b" else 64 * 64
        decoder, vision = small_checkpoint.write_checkpoint(directory / "checkpoint", area)
        if preset == "8b":
            (decoder / "model.safetensors").unlink()
            bench_convert.write_checkpoint(decoder, DecoderConfig())
        convert = [sys.executable, "-m", "emu3_jax", "convert", str(decoder), str(vision), "-o"]
        for kind in absent:
            more = ("--quantize", kind) if kind == "int8" else ()
            began = time.perf_counter()
            # On the CPU, as on a machine whose GPU is too small for the checkpoint.
            subprocess.run(
                [*convert, str(bundles[kind]), *more], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
            )
            size = sum(file.stat().st_size for file in bundles[kind].rglob("*") if file.is_file())
            seconds = round(time.perf_counter() - began, 1)
            print(json.dumps({"bundle": kind, "bytes": size, "convert_s": seconds}), flush=True)
    return bundles


def device_gib() -> float | None:
    """The memory of the GPU in GiB, from JAX in a process of its own. None without an NVIDIA GPU."""
    code = "import jax; d = jax.devices()[0]; print(d.platform == 'gpu' and d.memory_stats()['bytes_limit'])"
    environment = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return None if done.stdout.strip() == "False" else int(done.stdout) * 2 / 2**30


def measure(card: str, bundle: pathlib.Path, arguments: dict, total: float) -> dict | None:
    """The figures of one run, or None if it failed for another reason than memory."""
    memory, capability = CARDS[card]
    share = SHARE if memory is None else SHARE * memory / total
    environment = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{share:.4f}"}
    if capability is not None:
        environment["EMU3_JAX_COMPUTE_CAPABILITY"] = capability
    command = [sys.executable, "-c", RUN, str(bundle), json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        print(f"{card}, {bundle.name}: failed with {done.returncode}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())

"""Prints a Markdown table of the TPU slices that LoRA and QLoRA of the 8 B model fit.

    python scripts/lora_plans.py

The script compiles each config for each slice. It needs libtpu (the extra `tpu`) but no TPU. Each chip computes one row
at a time, which determines `accumulation`.
"""

import json
import subprocess
import sys

from emu3_jax.training.config import load_config

CONFIGS = ("lora_t2i_8b", "qlora_t2i_8b")
SLICES = (("v5e-1", "v5e:1x1", 1), ("v5e-8", "v5e:2x4", 8), ("v5e-16", "v5e:4x4", 16), ("v6e-1", "v6e:1x1", 1),
          ("v5p-8", "v5p:2x2x1", 4))  # fmt: skip


def main() -> int:
    print("| config | slice | chips | `accumulation` | frozen weights per chip | total per chip | usable | fits |")
    print("|---|---|---|---|---|---|---|---|")
    for name in CONFIGS:
        file = f"configs/{name}.py"
        rows = load_config(file).batch_size
        for label, topology, chips in SLICES:
            accumulation = rows // chips
            command = [sys.executable, "-m", "emu3_jax", "plan", file, "--topology", topology, "--json"]
            command += ["--set", f"accumulation={accumulation}"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode > 1:
                return done.returncode
            plan = json.loads(done.stdout)
            (step,) = plan["programs"]
            frozen, total, usable = (
                f"{size / 2**30:.2f} GiB"
                for size in (step["bytes"]["frozen weights"], step["total_bytes"], plan["usable_bytes"])
            )
            fits = "yes" if plan["fits"] else "no"
            print(
                f"| {name} | {label} ({topology}) | {chips} | {accumulation} | {frozen} | {total} | {usable} | {fits} |"
            )
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

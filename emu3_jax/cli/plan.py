"""Compile a config for a TPU slice, on any machine: does it fit, and how fast can it be at most?

No TPU is needed, but the extra tpu is. Exit code 1 means that the config does not fit.

examples:
  emu3-jax plan configs/generate_8b.py --topology v5e:2x4
  emu3-jax plan configs/sft_t2i_8b.py --topology v5p:4x4x4 --json
"""

import argparse
import json
import sys

from emu3_jax.cli import common


def add_arguments(command: argparse.ArgumentParser) -> None:
    common.add_config(command, "a TrainConfig, VisionTrainConfig or GenerateConfig", "--set quantize=int8")
    command.add_argument(
        "--topology",
        required=True,
        metavar="KIND:SHAPE",
        help="kind and shape of the slice, for example v5p:4x4x4 or v5e:8x8",
    )
    command.add_argument(
        "--slices",
        type=int,
        default=1,
        metavar="N",
        help="number of such slices, joined by the data centre's network; the mesh axis `data` spans them (default: 1)",
    )
    command.add_argument(
        "--rows-per-chip",
        type=int,
        metavar="N",
        help="training rows per chip (default: the config's batch_size divided by accumulation and by chips)",
    )
    command.add_argument(
        "--hbm-limit",
        type=float,
        metavar="GIB",
        help="compile as if a chip had this memory: XLA spends spare memory to save time (default: all of it)",
    )
    command.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(options: argparse.Namespace) -> int:
    import jax

    from emu3_jax.errors import Emu3Error
    from emu3_jax.generation.config import GenerateConfig
    from emu3_jax.sharding import plan
    from emu3_jax.training.config import TrainConfig, load_config
    from emu3_jax.training.vision_config import VisionTrainConfig

    # A plan needs no accelerator, and must not take one from a run on this machine.
    jax.config.update("jax_platforms", "cpu")
    if options.rows_per_chip is not None and options.rows_per_chip < 1:
        raise Emu3Error(f"--rows-per-chip is {options.rows_per_chip}: it must be a whole number >= 1")
    config = load_config(options.config, options.set)
    slice_ = plan.tpu_slice(options.topology, options.hbm_limit, options.slices)
    if isinstance(config, TrainConfig):
        from emu3_jax.training.plan import left_out, programs

        (mesh, compiled), missing = programs(config, slice_, options.rows_per_chip), left_out(config)
    elif isinstance(config, VisionTrainConfig):
        from emu3_jax.training.vision_plan import programs

        (mesh, compiled), missing = programs(config, slice_, options.rows_per_chip), []
    elif isinstance(config, GenerateConfig):
        from emu3_jax.generation.plan import left_out, programs

        if options.rows_per_chip is not None:
            raise Emu3Error("--rows-per-chip is for training: set `pictures` of a GenerateConfig instead")
        (mesh, compiled), missing = programs(config, slice_), left_out(config)
    else:
        raise Emu3Error(
            f"{options.config}: config() returns a {type(config).__name__}, "
            "a plan needs a TrainConfig, VisionTrainConfig or GenerateConfig"
        )
    result = plan.compile_plan(slice_, mesh, compiled, missing)
    for program in result["programs"]:
        print(f"{program['name']}: compiled in {program['compile_seconds']} s", file=sys.stderr)
    print(json.dumps(result, indent=2) if options.json else "\n".join(plan.describe(result)))
    return 0 if result["fits"] else 1

"""How much TPU memory the pixels of a picture need. Compiles the published vision tokenizer's decoder for 720x720.

    python scripts/vision_plan.py v5e:1x1

It needs libtpu (the extra `tpu`), but no TPU. It prints two plans: exact pixels, and pixels with `--fast-pixels`.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from emu3_jax.config import VisionConfig
from emu3_jax.models.vision import VisionTokenizer, make_decoder
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.plan import Program, compile_plan, describe, tpu_slice
from emu3_jax.sharding.rules import use_mesh

SIDE = 720


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("topology", metavar="KIND:SHAPE", help="one chip, like v5e:1x1")
    slice_ = tpu_slice(command.parse_args().topology)
    mesh = make_mesh("tensor=-1", slice_.devices)
    place = NamedSharding(mesh, PartitionSpec())
    config = VisionConfig()
    pixels = jnp.zeros((1, config.spatial_factor, config.spatial_factor, config.in_channels))
    params = jax.eval_shape(VisionTokenizer(config).init, jax.random.key(0), pixels)["params"]
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), params)
    side = SIDE // config.spatial_factor
    codes = jax.ShapeDtypeStruct((1, side, side), jnp.int32, sharding=place)
    programs = [
        Program(name, functools.partial(make_decoder(config, fast).lower, params, codes), {"weights": params})
        for name, fast in (("exact pixels", False), ("pixels with --fast-pixels", True))
    ]
    with use_mesh(mesh):  # so that the programs are those for TPUs
        plan = compile_plan(slice_, mesh, programs)
    for program in plan["programs"]:
        print(f"{program['name']}: compiled in {program['compile_seconds']} s")
    for line in describe(plan):
        print(line)


if __name__ == "__main__":
    main()

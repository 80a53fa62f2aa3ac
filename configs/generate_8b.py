"""For `emu3-jax plan`: does generating 720x720 pictures with the 8 B model and guidance fit a TPU slice?

emu3-jax plan configs/generate_8b.py --topology v5e:2x4
emu3-jax plan configs/generate_8b.py --topology v6e:2x2 --set pictures=8
emu3-jax plan configs/generate_8b.py --topology v6e:1x1

configs/generate_8b_int8.py is for one chip of v5e.
"""

from emu3_jax.generation.config import GenerateConfig


def config() -> GenerateConfig:
    return GenerateConfig(mesh="tensor=-1")

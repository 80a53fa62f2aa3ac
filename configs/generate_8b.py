"""Pictures of 720x720 from the 8 B model with guidance, for planning: does it fit?

emu3-jax plan configs/generate_8b.py --topology v5e:2x4
emu3-jax plan configs/generate_8b.py --topology v6e:2x2 --set pictures=8
emu3-jax plan configs/generate_8b.py --topology v6e:1x1

configs/generate_8b_int8.py is for one chip of v5e.
"""

from emu3_jax.generation.config import GenerateConfig


def config() -> GenerateConfig:
    return GenerateConfig(mesh="tensor=-1")

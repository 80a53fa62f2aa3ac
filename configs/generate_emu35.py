"""For `emu3-jax plan`: does a guided picture of 1024x1024 pixels by the 34 B shapes of Emu3.5 fit a TPU slice?

    emu3-jax plan configs/generate_emu35.py --topology v5p:2x2x2
    emu3-jax plan configs/generate_emu35.py --topology v6e:4x4 --set mesh=fsdp=4,tensor=4
    emu3-jax plan configs/generate_emu35.py --topology v5e:2x4 --set quantize=int8

It plans a picture whose place is known, as `emu3-jax generate` draws it. The last program is the grammar, which
`emu3-jax interleave` adds to each step.
"""

from emu3_jax.config import EMU35_34B
from emu3_jax.generation.config import GenerateConfig


def config() -> GenerateConfig:
    return GenerateConfig(mesh="tensor=8", decoder=EMU35_34B)

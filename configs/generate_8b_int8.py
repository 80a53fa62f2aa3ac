"""A picture of 720x720 from the 8 B model with guidance, with int8 weights and cache, on one chip: does it fit?

    emu3-jax plan configs/generate_8b_int8.py --topology v5e:1x1
    emu3-jax plan configs/generate_8b_int8.py --topology v6e:1x1

It fits on a v5e chip from the prompt to the pixels: 12.63 of 15.75 GiB while pixels are decoded, 11.77 before. 8.62 GiB
are the decoder's weights, of which the embedding, which stays in bfloat16, has 1.41 GiB. In bfloat16
(configs/generate_8b.py) a picture does not fit there.
"""

from emu3_jax.generation.config import GenerateConfig


def config() -> GenerateConfig:
    return GenerateConfig(mesh="tensor=-1", quantize="int8")

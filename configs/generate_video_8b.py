"""A clip of 5 s from the 8 B model with guidance, for planning: does it fit, in how many steps, with how large a cache?

    emu3-jax plan configs/generate_video_8b.py --topology v5p:2x2x1
    emu3-jax plan configs/generate_video_8b.py --topology v5e:2x4

The paper (arXiv 2409.18869) names clips of 5 s at 24 frames a second, and a context of 131,072 tokens. The area is our
choice: 30 latent frames of 512x512 pixels, 64x64 tokens each, are 30 * (64 * 65 + 1) + 2 = 124,832 tokens and fit it.
No weights for clips are published.
"""

from emu3_jax.config import DecoderConfig
from emu3_jax.generation.config import GenerateConfig


def config() -> GenerateConfig:
    decoder = DecoderConfig(max_positions=131_072, clip_frames=120)
    return GenerateConfig(decoder, frames=5 * 24, area=512 * 512, mesh="tensor=-1")

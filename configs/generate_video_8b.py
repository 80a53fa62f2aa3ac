"""For `emu3-jax plan`: does generating a 5 s clip with the 8 B model and guidance fit a TPU slice?

    emu3-jax plan configs/generate_video_8b.py --topology v5p:2x2x1
    emu3-jax plan configs/generate_video_8b.py --topology v5e:2x4

The plan also says the number of steps and the size of the KV cache. The paper (arXiv 2409.18869) names clips of 5 s at
24 frames per second, and a context of 131,072 tokens. The picture size is our choice: 30 latent frames of 512x512
pixels have 64x64 tokens each, in all 30 * (64 * 65 + 1) + 2 = 124,832 tokens. No weights for clips are published.
"""

from emu3_jax.config import DecoderConfig
from emu3_jax.generation.config import GenerateConfig


def config() -> GenerateConfig:
    decoder = DecoderConfig(max_positions=131_072, clip_frames=120)
    return GenerateConfig(decoder, frames=5 * 24, area=512 * 512, mesh="tensor=-1")

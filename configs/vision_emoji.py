"""Trains the vision tokenizer of the former embedded model (2.9 M parameters) on emoji of 32x32 pixels and clips.

python scripts/build_emoji.py out/emoji
emu3-jax train configs/vision_emoji.py

A picture becomes 16x16 codes from a codebook of 2,048.
"""

from emu3_jax.config import VisionConfig
from emu3_jax.training.config import OptimizerConfig
from emu3_jax.training.vision_config import LossConfig, PixelConfig, VisionTrainConfig


def config() -> VisionTrainConfig:
    return VisionTrainConfig(
        directory="out/vision_emoji",
        vision=VisionConfig(
            codebook_size=2048,
            # The published model has 4 channels, in which all temporal layers compute. With 16, short runs learned
            # faster.
            embed_dim=8,
            latent_channels=8,
            base_channels=64,
            channel_multipliers=(1, 2),
            num_res_blocks=1,
            attention_stages=(1,),
        ),
        pixels=PixelConfig(
            ("out/emoji/vision_train.jsonl",), size=32, stills=96, clips=32, frames=8, in_memory=True, augment=0.6
        ),
        steps=11_000,
        optimizer=OptimizerConfig(
            learning_rate=6e-4,
            final_learning_rate=1e-5,
            warmup_steps=200,
            beta2=0.99,
            eps=1e-8,
            weight_decay=1e-4,
            clip_norm=1.0,
        ),
        loss=LossConfig(absolute=1.0, squared=2.0, structure=0.2),
        dtype="bfloat16",
        export_dtype="bfloat16",
        evaluation=("out/emoji/vision_heldout.jsonl",),
        log_every=20,
        checkpoint_every=2_000,
    )

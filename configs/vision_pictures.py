"""Trains the vision tokenizer of the next embedded model on pictures of 64x64 pixels and clips.

python scripts/build_pictures.py out/pictures64
emu3-jax train configs/vision_pictures.py

A picture becomes 16x16 codes from a codebook of 4,096. The run takes 19 minutes on one H200.
"""

from emu3_jax.config import VisionConfig
from emu3_jax.training.config import OptimizerConfig
from emu3_jax.training.vision_config import LossConfig, PixelConfig, VisionTrainConfig

DATA = "out/pictures64"


def config() -> VisionTrainConfig:
    return VisionTrainConfig(
        directory="out/vision_pictures",
        vision=VisionConfig(
            codebook_size=4096,
            embed_dim=8,
            latent_channels=8,
            base_channels=64,
            channel_multipliers=(1, 2, 2),
            num_res_blocks=1,
            attention_stages=(2,),
        ),
        pixels=PixelConfig(
            (f"{DATA}/pictures_train.jsonl", f"{DATA}/emoji/vision_train.jsonl", f"{DATA}/two_shapes/train.jsonl"),
            size=64,
            stills=96,
            clips=24,
            frames=8,
            in_memory=True,
            augment=0.6,
        ),
        steps=31_620,
        optimizer=OptimizerConfig(
            learning_rate=6e-4,
            final_learning_rate=1e-5,
            warmup_steps=200,
            beta2=0.99,
            eps=1e-8,
            weight_decay=1e-4,
            clip_norm=1.0,
        ),
        loss=LossConfig(absolute=1.0, squared=2.0, structure=0.3),
        dtype="bfloat16",
        export_dtype="bfloat16",
        evaluation=(f"{DATA}/pictures_heldout_concept.jsonl", f"{DATA}/emoji/vision_heldout.jsonl"),
        log_every=20,
        checkpoint_every=5_000,
    )

"""Trains a vision tokenizer in the shapes of the published one (270 M parameters). This config was never run.

    emu3-jax plan configs/vision_270m.py --topology v5p:2x2x4
    emu3-jax train configs/vision_270m.py

manifest.jsonl names pictures and clips, in the format that `emu3-jax prepare` reads. Training uses crops of 256x256
pixels and clips of 8 frames. The method is that of configs/vision_emoji.py.
"""

from emu3_jax.config import ImageConfig, VisionConfig
from emu3_jax.training.config import OptimizerConfig
from emu3_jax.training.vision_config import LossConfig, PixelConfig, VisionTrainConfig


def config() -> VisionTrainConfig:
    return VisionTrainConfig(
        directory="out/vision_270m",
        vision=VisionConfig(),
        pixels=PixelConfig(("manifest.jsonl",), size=256, stills=64, clips=16, frames=8),
        steps=500_000,
        image=ImageConfig(),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, final_learning_rate=1e-5, warmup_steps=2_000, beta2=0.99, eps=1e-8, weight_decay=1e-4
        ),
        loss=LossConfig(absolute=1.0, squared=1.0, adversarial=0.1, adversarial_from=50_000),
        dtype="bfloat16",
        remat=True,
        checkpoint_every=5_000,
        evaluate_every=5_000,
        log_every=50,
    )

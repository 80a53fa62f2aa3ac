"""Pretrains the 8 B model from random weights on pictures and captions, in both orders. Every token is a target.

    emu3-jax plan configs/pretrain_8b.py --topology v5p:4x4x8
    emu3-jax prepare manifest.jsonl --model out/emu3-stage1 -o out/data
    emu3-jax train configs/pretrain_8b.py

As in the paper (arXiv 2409.18869, 3.2), visual targets have weight 0.5, and the learning rate falls from 5e-5 as a
cosine. Batch size and number of steps are our choices for a slice of 128 chips.
"""

from emu3_jax.config import DecoderConfig
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import ImageToText, TextToImage
from emu3_jax.training.config import ModelConfig, OptimizerConfig, TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        directory="out/pretrain",
        model=ModelConfig("out/emu3-stage1", DecoderConfig(), random=True),
        data=DataConfig(
            (Source("out/data", TextToImage(loss="all", eos=True)), Source("out/data", ImageToText(loss="all"))),
            sequence_length=10_240,
        ),
        batch_size=128,
        steps=100_000,
        optimizer=OptimizerConfig(learning_rate=5e-5, final_learning_rate=0.0, warmup_steps=2_000, clip_norm=1.0),
        vision_weight=0.5,
        log_every=10,
        checkpoint_every=1_000,
    )

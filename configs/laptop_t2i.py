"""Trains a tiny text-to-picture model from random weights on a laptop's CPU in about ten minutes.

    python scripts/small_checkpoint.py out/checkpoint
    emu3-jax convert out/checkpoint/decoder out/checkpoint/vision -o out/bundle
    python scripts/photo_manifest.py out/photo
    emu3-jax prepare out/photo/manifest.jsonl --model out/bundle --area 16384 -o out/data
    emu3-jax train configs/laptop_t2i.py
    emu3-jax generate "a photo of a cat, top left" --model out/run/model --area 16384 --greedy -o out/pictures

The model has two layers and makes 128x128 pixels. It memorises nine pieces of one photograph: the loss falls from
12.1 = ln(184,622) to nearly 0. The pictures look like noise, because the vision tokenizer in out/bundle has random
weights.
"""

from emu3_jax.config import DecoderConfig
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import TextToImage
from emu3_jax.training.config import ModelConfig, OptimizerConfig, SampleConfig, TrainConfig


def config() -> TrainConfig:
    decoder = DecoderConfig(
        hidden_size=64,
        intermediate_size=176,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        max_positions=1024,
        image_area=128 * 128,
        dtype="float32",
    )
    return TrainConfig(
        directory="out/run",
        model=ModelConfig("out/bundle", decoder, random=True, dtype="float32", remat="none"),
        data=DataConfig((Source("out/data", TextToImage(loss="all")),), sequence_length=320),
        batch_size=4,
        steps=200,
        optimizer=OptimizerConfig(
            learning_rate=3e-3, final_learning_rate=3e-4, warmup_steps=10, clip_norm=1.0, weight_decay=0.0
        ),
        mesh="fsdp=1",
        checkpoint_every=50,
        evaluation=(("photo", Source("out/data", TextToImage())),),
        evaluate_every=100,
        samples=SampleConfig(("a photo of a cat, top left",), every=100),
    )

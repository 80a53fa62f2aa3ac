"""Fine-tuning of the 8 B model from text to pictures, all weights: the reference's recipe (its scripts/t2i_sft.sh).

    emu3-jax plan configs/sft_t2i_8b.py --topology v5p:4x4x4
    emu3-jax prepare manifest.jsonl --model out/emu3-gen -o out/data
    emu3-jax train configs/sft_t2i_8b.py

64 rows of 10,240 tokens a step: one for each chip of a slice of 64. By its plans a chip needs 13.5 GiB of a v5e:8x8;
of a v5p:4x4x4 13.7 GiB with `--hbm-limit 15`, and XLA takes 19.7 GiB where it may. For fewer chips: `--set
accumulation=...`.
"""

from emu3_jax.config import DecoderConfig
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import TextToImage
from emu3_jax.training.config import ModelConfig, TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        directory="out/sft_t2i",
        model=ModelConfig("out/emu3-gen", DecoderConfig()),
        data=DataConfig((Source("out/data", TextToImage()),), sequence_length=10_240),
        batch_size=64,
        steps=4_000,
        log_every=10,
    )

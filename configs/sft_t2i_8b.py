"""Fine-tunes all weights of the 8 B model on pictures with captions, by the recipe of Emu3 (its scripts/t2i_sft.sh).

    emu3-jax plan configs/sft_t2i_8b.py --topology v5p:4x4x4
    emu3-jax prepare manifest.jsonl --model out/emu3-gen -o out/data
    emu3-jax train configs/sft_t2i_8b.py

`emu3-jax convert BAAI/Emu3-Gen BAAI/Emu3-VisionTokenizer -o out/emu3-gen` makes the bundle. `--set model.bundle=DIR`
names another one.

A step has 64 rows of 10,240 tokens, one row for each of 64 chips. By `emu3-jax plan`, a chip of a v5e:8x8 needs 13.5
GiB. A chip of a v5p:4x4x4 needs 13.7 GiB with `--hbm-limit 15`; without the limit, XLA spends spare memory to save
time: 19.7 GiB. For fewer chips add `--set accumulation=...`. From 64 chips of v5p on, `--set mesh=data=-1,fsdp=32`
sends less, see docs/planning.md; set `batch_size` to a multiple of the chips.
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

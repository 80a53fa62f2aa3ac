"""Fine-tunes all weights of the 8 B model on questions and answers about pictures.

    emu3-jax plan configs/sft_i2t_8b.py --topology v5e:8x8
    emu3-jax prepare manifest.jsonl --model out/emu3-chat -o out/data
    emu3-jax train configs/sft_i2t_8b.py

`emu3-jax convert BAAI/Emu3-Chat BAAI/Emu3-VisionTokenizer -o out/emu3-chat` makes the bundle. `--set model.bundle=DIR`
names another one.

The loss counts only the answers. All other settings are those of sft_t2i_8b.py.
"""

from emu3_jax.config import DecoderConfig
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import ImageToText
from emu3_jax.training.config import ModelConfig, TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        directory="out/sft_i2t",
        model=ModelConfig("out/emu3-chat", DecoderConfig()),
        data=DataConfig((Source("out/data", ImageToText(loss="text")),), sequence_length=10_240),
        batch_size=64,
        steps=4_000,
        log_every=10,
    )

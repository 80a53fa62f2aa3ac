"""Fine-tuning of the 8 B model from text to pictures by QLoRA: adapters beside frozen weights of 4 bits (NF4).

    emu3-jax prepare PHOTOS --model out/emu3-gen --validation 0.05 -o out/data
    emu3-jax train configs/qlora_t2i_8b.py
    emu3-jax generate "a portrait of a lighthouse" --model out/qlora_t2i/model -o out/pictures

The recipe is that of lora_t2i_8b.py; the frozen weights take a quarter of the memory, and each step is slower. It is
for slices that the other does not fit, by docs/planning.md.
"""

from emu3_jax.config import DecoderConfig
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import TextToImage
from emu3_jax.models.adapters import Adapter
from emu3_jax.training.config import ModelConfig, OptimizerConfig, TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        directory="out/qlora_t2i",
        model=ModelConfig("out/emu3-gen", DecoderConfig()),
        data=DataConfig((Source("out/data", TextToImage()),), sequence_length=8_704),
        batch_size=16,
        steps=1_000,
        adapter=Adapter(rank=16, alpha=32.0, base="nf4"),
        optimizer=OptimizerConfig(learning_rate=1e-4, final_learning_rate=1e-5, clip_norm=1.0, weight_decay=0.0),
        log_every=10,
        checkpoint_every=100,
        evaluation=(("validation", Source("out/data/validation", TextToImage())),),
        evaluate_every=100,
    )

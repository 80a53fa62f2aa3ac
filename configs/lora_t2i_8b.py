"""Fine-tunes the 8 B model by LoRA on pictures with captions. The frozen weights are bfloat16.

    emu3-jax prepare PHOTOS --model out/emu3-gen --validation 0.05 -o out/data
    emu3-jax train configs/lora_t2i_8b.py
    emu3-jax generate "a portrait of a lighthouse" --model out/lora_t2i/model -o out/pictures

`emu3-jax convert BAAI/Emu3-Gen BAAI/Emu3-VisionTokenizer -o out/emu3-gen` makes the bundle. `--set model.bundle=DIR`
names another one.

A step has 16 rows of 8,704 tokens. A row holds one picture of 720x720 pixels and a caption of at most about 400
tokens. docs/planning.md lists the TPU slices that this config fits, and the `accumulation` for each.
`--set adapter.rank=32` makes larger adapters. If you called `prepare` without `--validation`, add
`--set "evaluation=()"`.
"""

from emu3_jax.config import DecoderConfig
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import TextToImage
from emu3_jax.models.adapters import Adapter
from emu3_jax.training.config import ModelConfig, OptimizerConfig, TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        directory="out/lora_t2i",
        model=ModelConfig("out/emu3-gen", DecoderConfig()),
        data=DataConfig((Source("out/data", TextToImage()),), sequence_length=8_704),
        batch_size=16,
        steps=1_000,
        adapter=Adapter(rank=16, alpha=32.0),
        optimizer=OptimizerConfig(learning_rate=1e-4, final_learning_rate=1e-5, clip_norm=1.0, weight_decay=0.0),
        log_every=10,
        checkpoint_every=100,
        evaluation=(("validation", Source("out/data/validation", TextToImage())),),
        evaluate_every=100,
    )

"""Tunes the 8 B model by DPO and LoRA on pairs of its own pictures (stage 3 of arXiv 2409.18869, 2.5).

    emu3-jax sample PROMPTS.txt -n 8 --model out/emu3-gen -o out/dpo_samples
    emu3-jax score out/dpo_samples --model out/emu3-gen --reward REWARD.py:NAME
    emu3-jax pairs out/dpo_samples -o out/dpo_pairs
    emu3-jax train configs/dpo_t2i_8b.py
    emu3-jax generate "a portrait of a lighthouse" --model out/dpo_t2i/model -o out/pictures

`emu3-jax convert BAAI/Emu3-Gen BAAI/Emu3-VisionTokenizer -o out/emu3-gen` makes the bundle. `--set model.bundle=DIR`
names another one.

A step has 8 pairs: 16 rows of 8,704 tokens, as in lora_t2i_8b.py. The paper trains all weights, and gives no beta, no
weight of the cross-entropy and no learning rate. The values here were not tried on the 8 B model.
"""

from emu3_jax.config import DecoderConfig
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import Preference
from emu3_jax.models.adapters import Adapter
from emu3_jax.training.config import ModelConfig, OptimizerConfig, TrainConfig
from emu3_jax.training.preference_config import PreferenceConfig


def config() -> TrainConfig:
    return TrainConfig(
        directory="out/dpo_t2i",
        model=ModelConfig("out/emu3-gen", DecoderConfig()),
        data=DataConfig((Source("out/dpo_pairs", Preference()),), sequence_length=8_704, packing=0),
        batch_size=16,
        steps=500,
        adapter=Adapter(rank=16, alpha=32.0),
        optimizer=OptimizerConfig(learning_rate=1e-5, final_learning_rate=1e-6, clip_norm=1.0, weight_decay=0.0),
        preference=PreferenceConfig(beta=0.1, cross_entropy=0.1),
        log_every=10,
        checkpoint_every=100,
    )

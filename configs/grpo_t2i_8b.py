"""Tunes the 8 B model by GRPO and LoRA on pictures that it draws itself and a reward of yours judges.

    emu3-jax train configs/grpo_t2i_8b.py --set grpo.prompts=PROMPTS.txt --set grpo.reward=REWARD.py:NAME
    emu3-jax generate "a portrait of a lighthouse" --model out/grpo_t2i/model -o out/pictures

`emu3-jax convert BAAI/Emu3-Gen BAAI/Emu3-VisionTokenizer -o out/emu3-gen` makes the bundle. PROMPTS.txt has one prompt
a line. docs/preference.md says what a reward is.

A step draws 8 pictures for each of 8 prompts: 64 rows of 8,704 tokens. They are drawn without guidance, so that a
picture takes one row, and 32 at once, so that their caches fit beside the weights. Emu3's paper has no such stage. The
values here were not tried on the published weights.
"""

from emu3_jax.config import DecoderConfig
from emu3_jax.data.config import DataConfig
from emu3_jax.models.adapters import Adapter
from emu3_jax.training.config import ModelConfig, OptimizerConfig, TrainConfig
from emu3_jax.training.grpo_config import GrpoConfig


def config() -> TrainConfig:
    return TrainConfig(
        directory="out/grpo_t2i",
        model=ModelConfig("out/emu3-gen", DecoderConfig()),
        data=DataConfig((), 8_704, packing=0),
        batch_size=64,
        steps=200,
        adapter=Adapter(rank=16, alpha=32.0),
        optimizer=OptimizerConfig(learning_rate=2e-5, final_learning_rate=2e-6, clip_norm=1.0, weight_decay=0.0),
        grpo=GrpoConfig("prompts.txt", "rewards.py:reward", n=8, draw_at_once=32, kl_weight=0.01),
        accumulation=4,
        log_every=1,
        checkpoint_every=20,
    )

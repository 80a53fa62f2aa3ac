"""Tunes the 8 B model by GRPO and LoRA on pictures that it draws itself and a reward of yours judges.

    emu3-jax train configs/grpo_t2i_8b.py --set grpo.prompts=PROMPTS.txt --set grpo.reward=REWARD.py:NAME
    emu3-jax generate "a portrait of a lighthouse" --model out/grpo_t2i/model -o out/pictures

`emu3-jax convert BAAI/Emu3-Gen BAAI/Emu3-VisionTokenizer -o out/emu3-gen` makes the bundle. PROMPTS.txt has one prompt
a line. docs/preference.md says what a reward is.

A step draws 8 pictures for each of 8 prompts: 64 rows of 8,704 tokens. They are drawn without guidance, so that a
picture takes one row. Emu3's paper has no such stage. The values here were not tried on the published weights.

Choose a mesh whose axis `tensor` splits the weights: with `fsdp`, each drawn token gathers all weights, unless
grpo.gather_weights=True and a whole copy fits. Set `accumulation` so that each part of the mesh computes one row at a
time. docs/planning.md has the memory of these:

    --set mesh=data=8,tensor=8 --set accumulation=8                               # v5e:8x8
    --set mesh=data=16,tensor=4 --set accumulation=4                              # v5p:4x4x4
    --set mesh=tensor=8 --set accumulation=64 --set grpo.draw_at_once=16          # v5e:2x4

One GPU computes and draws in parts, too: for example `--set accumulation=32 --set grpo.draw_at_once=16`.
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
        grpo=GrpoConfig("prompts.txt", "rewards.py:reward", n=8, kl_weight=0.01),
        log_every=1,
        checkpoint_every=20,
    )

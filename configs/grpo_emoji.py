"""Tunes the former embedded model, of 32x32 pixels, by GRPO: pictures of two shapes, rewarded by what they show.

    emu3-jax train configs/two_shapes_sft.py
    emu3-jax train configs/grpo_emoji.py
    emu3-jax evaluate configs/eval_two_shapes.py --set model=out/grpo_emoji/model

The first command and its data are in configs/two_shapes_sft.py: that model has never seen two shapes, and a reward
teaches nothing to a model that is never right. configs/grpo_pictures.py is for the embedded model. The reward is the
share of colours, shapes, relation and background that are right. No prompt names a pair of shapes that the evaluation
asks for.
"""

from emu3_jax.data.config import DataConfig
from emu3_jax.training.config import ModelConfig, OptimizerConfig, TrainConfig
from emu3_jax.training.grpo_config import GrpoConfig


def config() -> TrainConfig:
    return TrainConfig(
        directory="out/grpo_emoji",
        model=ModelConfig("out/two_shapes_sft/model", dtype="float32", remat="none"),
        # A picture takes about 285 tokens. The rest of a row is for the prompt.
        data=DataConfig((), 320, packing=0),
        batch_size=256,
        steps=400,
        optimizer=OptimizerConfig(
            learning_rate=5e-5, final_learning_rate=1e-6, warmup_steps=10, clip_norm=1.0, weight_decay=0.0
        ),
        grpo=GrpoConfig(
            "out/two_shapes/prompts.txt",
            "procedural",
            n=8,
            kl_weight=0.003,
            held_out="out/two_shapes/held_out.txt",
            workers=4,
        ),
        mesh="data=-1",
        log_every=5,
        checkpoint_every=100,
        keep=1,
        evaluate_every=50,
    )

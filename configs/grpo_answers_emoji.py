"""Tunes the embedded model by GRPO on questions about emoji, rewarded where an answer equals the reference answer.

    python scripts/build_pictures.py out/pictures64
    emu3-jax train configs/grpo_answers_emoji.py

The questions ask for a description, the category and the style of emoji; of coloured shapes also for colour, shape and
place. In each step the model draws 8 answers to each of 32 questions. The values here were only tried for a few steps,
with the former embedded model.
"""

from emu3_jax.checkpoints.embedded import embedded_bundle
from emu3_jax.data.config import DataConfig
from emu3_jax.training.config import ModelConfig, OptimizerConfig, TrainConfig
from emu3_jax.training.grpo_config import GrpoConfig


def config() -> TrainConfig:
    return TrainConfig(
        directory="out/grpo_answers_emoji",
        model=ModelConfig(str(embedded_bundle()), dtype="float32", remat="none"),
        # A picture takes about 285 tokens. The rest of a row is for question and answer.
        data=DataConfig((), 352, packing=0),
        batch_size=256,
        steps=100,
        optimizer=OptimizerConfig(
            learning_rate=4e-5, final_learning_rate=1e-6, warmup_steps=5, clip_norm=1.0, weight_decay=0.0
        ),
        grpo=GrpoConfig(
            "out/pictures64/emoji/i2t_closeups.jsonl",
            "answer_match",
            n=8,
            max_new_tokens=32,
            kl_weight=0.03,
            held_out="out/pictures64/emoji/i2t_heldout_concept.jsonl",
        ),
        mesh="data=-1",
        log_every=5,
        checkpoint_every=50,
        keep=1,
        evaluate_every=50,
    )

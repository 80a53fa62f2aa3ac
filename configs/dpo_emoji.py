"""Tunes the embedded model by DPO on pairs of its own pictures: the best against the worst of each prompt.

    emu3-jax sample PROMPTS.txt -n 8 --guidance 1 -o out/dpo_emoji/samples
    emu3-jax score out/dpo_emoji/samples --reward REWARD
    emu3-jax pairs out/dpo_emoji/samples --per-prompt 4 -o out/dpo_emoji/pairs
    emu3-jax train configs/dpo_emoji.py
    emu3-jax generate "noto emoji of pizza" --model out/dpo_emoji/run/model -o out/pictures

PROMPTS.txt has one prompt a line: with 1,000 lines there are up to 4,000 pairs, and 150 steps see each about once.
docs/preference.md lists rewards, says what training prints, and what these values did to emoji in unseen styles, with
the former embedded model.

All weights are trained. The log-probabilities of the pairs under the embedded model are computed before the first step.
"""

from emu3_jax.checkpoints.embedded import embedded_bundle
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import Preference
from emu3_jax.training.config import ModelConfig, OptimizerConfig, TrainConfig
from emu3_jax.training.preference_config import PreferenceConfig


def config() -> TrainConfig:
    return TrainConfig(
        directory="out/dpo_emoji/run",
        model=ModelConfig(str(embedded_bundle()), dtype="float32", remat="none"),
        # A picture takes about 285 tokens. The rest of a row is for the prompt.
        data=DataConfig((Source("out/dpo_emoji/pairs", Preference()),), 320, packing=0, in_memory=True),
        batch_size=64,
        steps=150,
        optimizer=OptimizerConfig(
            learning_rate=5e-5, final_learning_rate=5e-6, warmup_steps=5, clip_norm=1.0, weight_decay=0.0
        ),
        preference=PreferenceConfig(beta=0.1, cross_entropy=0.1),
        mesh="fsdp=1",
        log_every=5,
        checkpoint_every=50,
        keep=1,
    )

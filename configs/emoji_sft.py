"""Fine-tuning of the embedded model after configs/emoji_pretrain.py: no loss on prompts, all of it on what is asked.

emu3-jax train configs/emoji_sft.py
emu3-jax evaluate configs/eval_emoji.py --set model=out/emoji_sft/model
"""

import dataclasses
import pathlib
import runpy

from emu3_jax.data.config import Source
from emu3_jax.data.sequences import ImageToText, NextFrame, TextToImage
from emu3_jax.training.config import OptimizerConfig, TrainConfig

PRETRAINING = runpy.run_path(str(pathlib.Path(__file__).with_name("emoji_pretrain.py")))


def config() -> TrainConfig:
    pretraining, tokens = PRETRAINING["config"](), PRETRAINING["TOKENS"]
    sources = (
        Source(f"{tokens}/t2i_upright", TextToImage(prompt_dropout=0.1, eos=True), weight=4.0, parts=2),
        Source(f"{tokens}/i2t_train", ImageToText(), weight=4.0, parts=2),
        Source(f"{tokens}/clip_train", NextFrame(prompt_dropout=0.1, eos=True), weight=2.0),
    )
    return dataclasses.replace(
        pretraining,
        directory="out/emoji_sft",
        model=dataclasses.replace(
            pretraining.model, bundle="out/emoji_pretrain/model", decoder=None, random=False, noise=0.0
        ),
        data=dataclasses.replace(pretraining.data, sources=sources, seed=1),
        steps=2_000,
        optimizer=OptimizerConfig(
            learning_rate=2e-4, final_learning_rate=1e-5, warmup_steps=50, clip_norm=1.0, eps=1e-8
        ),
    )

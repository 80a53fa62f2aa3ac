"""Fine-tunes the decoder of configs/emoji_pretrain.py. The loss counts only pictures, clips and answers.

emu3-jax train configs/emoji_sft.py
emu3-jax evaluate configs/eval_emoji.py --set model=out/emoji_sft/model

The model memorises answers about training pictures long before it answers correctly about new pictures. So more than
half of the data are questions, most of them about close-ups, which pretraining did not have.
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
        Source(f"{tokens}/t2i_upright", TextToImage(prompt_dropout=0.1, eos=True), weight=3.0, parts=2),
        Source(f"{tokens}/i2t_train", ImageToText(), weight=2.0, parts=2),
        Source(f"{tokens}/i2t_closeups", ImageToText(), weight=4.0, parts=2),
        Source(f"{tokens}/clip_train", NextFrame(prompt_dropout=0.1, eos=True), weight=2.2),
        Source(f"{tokens}/clip_questions", ImageToText(), weight=1.0),
    )
    return dataclasses.replace(
        pretraining,
        directory="out/emoji_sft",
        model=dataclasses.replace(
            pretraining.model, bundle="out/emoji_pretrain/model", decoder=None, random=False, dropout=0.2
        ),
        data=dataclasses.replace(pretraining.data, sources=sources, seed=1),
        steps=4_400,
        optimizer=OptimizerConfig(
            learning_rate=4e-4, final_learning_rate=1e-5, warmup_steps=50, clip_norm=1.0, eps=1e-8
        ),
    )

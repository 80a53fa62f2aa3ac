"""Fine-tunes the 64-pixel model after configs/pictures_pretrain.py. The loss counts only what the model is asked for.

emu3-jax train configs/pictures_sft.py
emu3-jax evaluate configs/eval_pictures.py --set model=out/pictures_sft/model
"""

import dataclasses
import pathlib
import runpy

from emu3_jax.training.config import OptimizerConfig, TrainConfig

PRETRAINING = runpy.run_path(str(pathlib.Path(__file__).with_name("pictures_pretrain.py")))


def config() -> TrainConfig:
    pretraining = PRETRAINING["config"]()
    return dataclasses.replace(
        pretraining,
        directory="out/pictures_sft",
        model=dataclasses.replace(
            pretraining.model, bundle="out/pictures_pretrain/model", decoder=None, random=False, dropout=0.2
        ),
        data=dataclasses.replace(pretraining.data, sources=PRETRAINING["sources"]("vision"), seed=1),
        steps=6_000,
        optimizer=OptimizerConfig(
            learning_rate=4e-4, final_learning_rate=1e-5, warmup_steps=50, clip_norm=1.0, eps=1e-8
        ),
    )

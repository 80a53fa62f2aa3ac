"""Fine-tunes the embedded model after configs/pictures_pretrain.py. The loss counts only what the model is asked for.

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
        # After fine-tuning of 2,900 steps, tokens of drawings cost 3.1 to 3.3 nats even if they were trained on, and
        # few drawings could be recognised. So drawings get twice the weight, without dropout and with less noise.
        model=dataclasses.replace(
            pretraining.model, bundle="out/pictures_pretrain/model", decoder=None, random=False, dropout=0.0, noise=0.5
        ),
        data=dataclasses.replace(pretraining.data, sources=PRETRAINING["sources"]("vision", drawn=2.0), seed=1),
        batch_size=32,
        steps=16_500,
        optimizer=OptimizerConfig(
            learning_rate=2e-3, final_learning_rate=2e-5, warmup_steps=100, clip_norm=1.0, eps=1e-8
        ),
        evaluate_every=10_000,
        samples=None,
    )

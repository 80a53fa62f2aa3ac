"""Teaches the former embedded model, of 32x32 pixels, two coloured shapes. A short stage before reinforcement learning.

    bash scripts/emoji_model.sh
    python scripts/two_shapes.py out/two_shapes
    emu3-jax prepare out/two_shapes/train.jsonl --model out/emoji_sft/model --keep-size -o out/two_shapes_tokens/train
    emu3-jax train configs/two_shapes_sft.py
    emu3-jax evaluate configs/eval_two_shapes.py --set model=out/two_shapes_sft/model

The first command trains that model. The embedded model of today knows two shapes. The emoji data of
configs/emoji_sft.py stay in the mixture, so that the model does not forget them. The stage is short: afterwards the
model draws some pictures of two shapes all right and others not. Reinforcement learning needs both, see
docs/preference.md. `--set steps=N` makes the stage longer or shorter.
"""

import dataclasses
import pathlib
import runpy

from emu3_jax.data.config import Source
from emu3_jax.data.sequences import TextToImage
from emu3_jax.training.config import OptimizerConfig, TrainConfig

TUNING = runpy.run_path(str(pathlib.Path(__file__).with_name("emoji_sft.py")))


def config() -> TrainConfig:
    tuning = TUNING["config"]()
    # A quarter of the records, beside the emoji data in the proportions of the tuning before.
    two_shapes = Source("out/two_shapes_tokens/train", TextToImage(prompt_dropout=0.1, eos=True), weight=4.0, parts=2)
    return dataclasses.replace(
        tuning,
        directory="out/two_shapes_sft",
        model=dataclasses.replace(tuning.model, bundle=f"{tuning.directory}/model"),
        data=dataclasses.replace(tuning.data, sources=(two_shapes, *tuning.data.sources), seed=2),
        batch_size=128,
        steps=1_200,
        optimizer=OptimizerConfig(
            learning_rate=2e-4, final_learning_rate=1e-5, warmup_steps=30, clip_norm=1.0, eps=1e-8
        ),
        checkpoint_every=600,
        evaluate_every=600,
        samples=None,
    )

"""Tunes the embedded model by GRPO on scenes of several shapes, rewarded by what the pictures show.

    emu3-jax train configs/grpo_pictures.py
    emu3-jax evaluate configs/eval_pictures.py --set model=out/pictures_grpo/model

configs/grpo_emoji.py says how the reward is computed. The scenes are counted shapes and rows of shapes. (Nearly all
pictures of two shapes are right before, and a group of equal rewards teaches nothing.) The evaluation asks for other
scenes. The package's model is not tuned so; docs/embedded_model.md says what a run did.
"""

import dataclasses
import pathlib
import runpy

from emu3_jax.training.config import TrainConfig

EMOJI = runpy.run_path(str(pathlib.Path(__file__).with_name("grpo_emoji.py")))
SCENES = "out/pictures64/arrangements"


def config() -> TrainConfig:
    emoji = EMOJI["config"]()
    return dataclasses.replace(
        emoji,
        directory="out/pictures_grpo",
        model=dataclasses.replace(emoji.model, bundle="out/pictures_further/model"),
        # A picture takes about 285 tokens, the longest prompt 70.
        data=dataclasses.replace(emoji.data, sequence_length=384),
        steps=200,
        # With 5e-5, the mean reward did not rise in 83 steps. With 1.5e-4 it rose, and the model changed much.
        optimizer=dataclasses.replace(emoji.optimizer, learning_rate=1.5e-4, final_learning_rate=1e-5),
        grpo=dataclasses.replace(emoji.grpo, prompts=f"{SCENES}/prompts.txt", held_out=f"{SCENES}/held_out.txt"),
    )

"""Tunes the embedded model by GRPO on scenes of shapes, rewarded by what the pictures show.

    emu3-jax train configs/grpo_pictures.py
    emu3-jax evaluate configs/eval_pictures.py --set model=out/pictures_grpo/model

configs/grpo_emoji.py says how the reward is computed. Here the scenes have two shapes, several that are counted, or a
row. No prompt is one that the evaluation asks for. The embedded model is not tuned so; docs/embedded_model.md says why.
"""

import dataclasses
import pathlib
import runpy

from emu3_jax.training.config import TrainConfig

EMOJI = runpy.run_path(str(pathlib.Path(__file__).with_name("grpo_emoji.py")))
DATA = "out/pictures64"


def config() -> TrainConfig:
    emoji = EMOJI["config"]()
    return dataclasses.replace(
        emoji,
        directory="out/pictures_grpo",
        model=dataclasses.replace(emoji.model, bundle="out/pictures_sft/model"),
        # A picture takes about 285 tokens, the longest prompt 70.
        data=dataclasses.replace(emoji.data, sequence_length=384),
        grpo=dataclasses.replace(
            emoji.grpo, prompts=f"{DATA}/scene_prompts.txt", held_out=f"{DATA}/scene_held_out.txt"
        ),
    )

"""Tunes the embedded model by DPO on pairs of its own pictures: scenes of shapes, and drawings.

    head -n 1500 out/pictures64/arrangements/prompts.txt > out/scenes.txt
    python scripts/style_prompts.py out/pictures64/emoji --kinds held-out undrawn seen --count 1500 -o out/drawings.txt
    emu3-jax sample out/scenes.txt --model MODEL -n 8 --guidance 1 -o out/dpo_scenes
    emu3-jax sample out/drawings.txt --model MODEL -n 8 --guidance 1 -o out/dpo_drawings
    emu3-jax score out/dpo_scenes --model MODEL --reward procedural
    emu3-jax score out/dpo_drawings --model MODEL --reward judge --data out/pictures64/emoji
    emu3-jax pairs out/dpo_scenes --per-prompt 4 -o out/dpo_scene_pairs
    emu3-jax pairs out/dpo_drawings --per-prompt 4 -o out/dpo_drawing_pairs
    emu3-jax train configs/dpo_pictures.py --set model.bundle=MODEL

MODEL is out/pictures_further/model. The scenes are rewarded by what they show, the drawings by a judge. No prompt is
one that the evaluation asks for.
"""

import dataclasses
import pathlib
import runpy

from emu3_jax.data.config import Source
from emu3_jax.data.sequences import Preference
from emu3_jax.training.config import TrainConfig

EMOJI = runpy.run_path(str(pathlib.Path(__file__).with_name("dpo_emoji.py")))


def config() -> TrainConfig:
    emoji = EMOJI["config"]()
    sources = tuple(Source(f"out/dpo_{kind}_pairs", Preference()) for kind in ("scene", "drawing"))
    return dataclasses.replace(
        emoji,
        directory="out/pictures_dpo",
        model=dataclasses.replace(emoji.model, bundle="out/pictures_further/model"),
        # A picture takes about 285 tokens, the longest prompt 70.
        data=dataclasses.replace(emoji.data, sources=sources, sequence_length=384),
        steps=200,
    )

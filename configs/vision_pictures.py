"""Trains the vision tokenizer of the embedded model (4.1 M parameters) on pictures of 64x64 pixels and clips.

python scripts/build_pictures.py out/pictures64
emu3-jax train configs/vision_pictures.py

A picture becomes 16x16 codes from a codebook of 4,096. The run takes 16 minutes on one H200. Its result is the bundle
scripts/picture_data/tokenizer.
"""

import dataclasses
import pathlib
import runpy

from emu3_jax.training.vision_config import VisionTrainConfig

DATA = "out/pictures64"
EMOJI = runpy.run_path(str(pathlib.Path(__file__).with_name("vision_emoji.py")))


def config() -> VisionTrainConfig:
    emoji = EMOJI["config"]()
    return dataclasses.replace(
        emoji,
        directory="out/vision_pictures",
        vision=dataclasses.replace(
            emoji.vision, codebook_size=4096, channel_multipliers=(1, 2, 2), attention_stages=(2,)
        ),
        pixels=dataclasses.replace(
            emoji.pixels,
            manifests=(
                f"{DATA}/pictures_train.jsonl",
                f"{DATA}/emoji/vision_train.jsonl",
                f"{DATA}/two_shapes/train.jsonl",
            ),
            size=64,
            clips=24,
        ),
        steps=21_000,
        loss=dataclasses.replace(emoji.loss, structure=0.3),
        evaluation=(f"{DATA}/pictures_heldout_concept.jsonl", f"{DATA}/emoji/vision_heldout.jsonl"),
        checkpoint_every=5_000,
    )

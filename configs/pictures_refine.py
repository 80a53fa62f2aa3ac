"""Fine-tunes the embedded model once more after configs/pictures_sft.py, on further views of its pictures and clips.

    python scripts/picture_views.py out/pictures64
    emu3-jax prepare out/pictures64/SET.jsonl --model out/pictures_start --keep-size -o out/pictures_tokens/SET
    emu3-jax train configs/pictures_refine.py
    emu3-jax evaluate configs/eval_pictures.py --set model=out/pictures_refine/model

SET stands for views_questions and views_clips.
"""

import dataclasses
import pathlib
import runpy

from emu3_jax.data.config import Source
from emu3_jax.data.sequences import ImageToText, NextFrame
from emu3_jax.training.config import OptimizerConfig, TrainConfig

PRETRAINING = runpy.run_path(str(pathlib.Path(__file__).with_name("pictures_pretrain.py")))
SFT = runpy.run_path(str(pathlib.Path(__file__).with_name("pictures_sft.py")))
TOKENS = PRETRAINING["TOKENS"]
WEIGHTS = {f"{TOKENS}/questions_train": 1.0, f"{TOKENS}/emoji/clip_train": 0.5}  # of what now has further views


def sources() -> tuple[Source, ...]:
    """The sources of the fine-tuning before, and the views."""
    kept = PRETRAINING["sources"]("vision", drawn=1.5)
    return (
        *(dataclasses.replace(source, weight=WEIGHTS.get(source.path, source.weight)) for source in kept),
        Source(f"{TOKENS}/views_questions", ImageToText(), weight=7.0, parts=4),
        Source(f"{TOKENS}/views_clips", NextFrame(loss="vision", prompt_dropout=0.1, eos=True), weight=2.0, parts=3),
    )


def config() -> TrainConfig:
    sft = SFT["config"]()
    return dataclasses.replace(
        sft,
        directory="out/pictures_refine",
        model=dataclasses.replace(sft.model, bundle="out/pictures_sft/model"),
        data=dataclasses.replace(sft.data, sources=sources(), seed=2),
        steps=7_000,
        optimizer=OptimizerConfig(
            learning_rate=1e-3, final_learning_rate=1e-5, warmup_steps=100, clip_norm=1.0, eps=1e-8
        ),
        # Answers have few tokens beside pictures.
        vision_weight=0.05,
        evaluate_every=4_000,
    )

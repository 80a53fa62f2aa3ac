"""Fine-tunes the embedded model after configs/pictures_refine.py, on views that keep the colours.

    python scripts/picture_views.py out/pictures64 --name further --seed 2 --keep-colours
    emu3-jax prepare out/pictures64/SET.jsonl --model out/pictures_start --keep-size -o out/pictures_tokens/SET
    emu3-jax train configs/pictures_further.py
    emu3-jax evaluate configs/eval_pictures.py --set model=out/pictures_further/model

SET stands for further_questions and further_clips.
"""

import dataclasses
import pathlib
import runpy

from emu3_jax.training.config import TrainConfig

REFINEMENT = runpy.run_path(str(pathlib.Path(__file__).with_name("pictures_refine.py")))
TOKENS = REFINEMENT["TOKENS"]
# Most emoji sets differ by their colours, which the views before did not keep.
WEIGHTS = {f"{TOKENS}/views_questions": 10.0, f"{TOKENS}/views_clips": 2.0}


def config() -> TrainConfig:
    refinement = REFINEMENT["config"]()
    sources = tuple(
        dataclasses.replace(source, path=source.path.replace("views", "further"), weight=WEIGHTS[source.path])
        if source.path in WEIGHTS
        else source
        for source in refinement.data.sources
    )
    return dataclasses.replace(
        refinement,
        directory="out/pictures_further",
        model=dataclasses.replace(refinement.model, bundle="out/pictures_refine/model"),
        data=dataclasses.replace(refinement.data, sources=sources, seed=3),
        steps=12_000,
        evaluate_every=6_000,
    )

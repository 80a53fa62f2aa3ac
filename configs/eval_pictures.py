"""Evaluates the embedded model on pictures, clips, scenes and stories that are held out of its training.

    python scripts/build_pictures.py out/pictures64
    emu3-jax evaluate configs/eval_pictures.py                     # what scripts/pictures_model.sh trains
    emu3-jax evaluate configs/eval_pictures.py --set model=None    # the bundle in the package

The command prints the figures as JSON. configs/eval_emoji.py says what they are. Two shapes, counts and rows of shapes,
stories and edits are read exactly from the pixels.
"""

from emu3_jax.evaluation.config import FIGURES, FURTHER_FIGURES, EvaluateConfig


def config() -> EvaluateConfig:
    return EvaluateConfig(
        directory="out/evaluation_pictures",
        data="out/pictures64",
        model="out/pictures_further/model",
        figures=(*FIGURES, *FURTHER_FIGURES),
        cases=256,
        procedural_guidance=2.0,
    )

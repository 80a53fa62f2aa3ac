"""Evaluates how well a model draws two coloured shapes and their relation, of pairs that are held out of training.

emu3-jax evaluate configs/eval_two_shapes.py
emu3-jax evaluate configs/eval_two_shapes.py --set cases=32

The pictures are read exactly: no judge is needed.
"""

from emu3_jax.evaluation.config import EvaluateConfig


def config() -> EvaluateConfig:
    return EvaluateConfig(
        directory="out/two_shapes_evaluation", figures=("two_shapes",), cases=256, procedural_guidance=2.0
    )

"""Evaluates a model that configs/stories.py trained: stories and edits with subjects that the training did not have.

emu3-jax evaluate configs/eval_stories.py
emu3-jax evaluate configs/eval_stories.py --set cases=32

The figures are shares of right answers: stories that the model invents, stories that it illustrates, and edits. Texts
and pictures are read exactly.
"""

from emu3_jax.evaluation.config import EvaluateConfig


def config() -> EvaluateConfig:
    return EvaluateConfig(
        directory="out/stories_evaluation",
        model="out/stories_run/model",
        figures=("stories",),
        cases=256,
        procedural_guidance=2.0,
    )

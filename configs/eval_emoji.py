"""Evaluation of the embedded model, or one trained like it, on the emoji that it was not trained on.

    python scripts/build_emoji.py out/emoji
    emu3-jax evaluate configs/eval_emoji.py
    emu3-jax evaluate configs/eval_emoji.py --set model=out/emoji_sft/model --set cases=64 --set codebook_cases=500

Prints the figures as JSON and writes them, with a page of pictures, to out/evaluation: how well the vision tokenizer
reconstructs concepts it never saw (PSNR, SSIM, use of the codebook), whether generated pictures show what was asked
for at five guidance scales (by a judge that is trained once and kept beside the data, with its ceilings on the true
pictures), whether descriptions and categories are right, whether shapes have the colour, form and place or motion
asked for, also in a clip whose first half is given, and how much animated subjects move, beside the true clips.
"""

from emu3_jax.evaluation.config import EvaluateConfig


def config() -> EvaluateConfig:
    return EvaluateConfig(directory="out/evaluation", data="out/emoji", cases=256, procedural_guidance=2.0)

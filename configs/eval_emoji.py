"""Evaluates the former embedded model, of 32x32 pixels, on emoji that are held out of its training.

    bash scripts/emoji_model.sh
    emu3-jax evaluate configs/eval_emoji.py
    emu3-jax evaluate configs/eval_emoji.py --set cases=64 --set codebook_cases=500

configs/eval_pictures.py measures the embedded model on more. On emoji alone, at its size of 64x64 pixels:

    emu3-jax evaluate configs/eval_emoji.py --set model=None --set data=out/pictures64/emoji

The command prints the figures as JSON. It writes them to out/evaluation, with a page of pictures. The figures are:

- reconstruction: PSNR, SSIM and codebook use of the vision tokenizer on unseen concepts
- text_to_image: do generated pictures show the prompt, at five guidance scales? A classifier, the judge, decides. It
  is trained once and cached beside the data. Its scores on the true pictures are reported as upper bounds.
- image_to_text: are descriptions and categories right?
- procedural: do shapes have the colour, form and place or motion that the prompt names? Also for clips whose first
  half is given.
- motion: how much do animated subjects move, compared with the true clips?
"""

from emu3_jax.evaluation.config import EvaluateConfig


def config() -> EvaluateConfig:
    return EvaluateConfig(
        directory="out/evaluation", model="out/emoji_sft/model", data="out/emoji", cases=256, procedural_guidance=2.0
    )

"""Evaluates a vision tokenizer on a folder of pictures: PSNR, SSIM, codebook use, rFID and LPIPS.

    emu3-jax evaluate configs/eval_reconstruction.py --set model=out/emu3-gen --set data=val2017
    emu3-jax evaluate configs/eval_reconstruction.py --set model=out/emu3-gen --set data=val2017 \\
        --set reconstruction.features=scorers.py:inception --set reconstruction.pairwise=scorers.py:lpips_alex

The bundle needs no more than a vision tokenizer. Each picture is resized so that its shorter side has
`reconstruction.side` pixels, and the square in its middle is cut out. docs/evaluation.md shows scorers.py.
"""

from emu3_jax.evaluation.config import EvaluateConfig, ReconstructionConfig


def config() -> EvaluateConfig:
    return EvaluateConfig(
        directory="out/reconstruction",
        data="pictures",
        figures=("reconstruction",),
        reconstruction=ReconstructionConfig(side=256),
    )

"""Emu3 at its full size: the repository's configs, and how many weights its matrices hold."""

import pathlib

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"

# Weights of the 8 B model's layers and tables, without norms.
EMU3_MATRICES = 32 * (4096 * (2 * 32 + 2 * 8) * 128 + 3 * 4096 * 14336) + 2 * 184622 * 4096

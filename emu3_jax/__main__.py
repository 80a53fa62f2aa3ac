"""`python -m emu3_jax` is `emu3-jax`."""

from emu3_jax.cli.main import program

program()

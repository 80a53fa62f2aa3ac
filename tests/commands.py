"""Commands of `emu3-jax` in this process."""

from emu3_jax.cli.main import main

# Of `generate` and `video`: a small picture or clip, into the folder `out`.
OPTIONS = ("--area", "1024", "-o", "out", "--quiet")


def run(*arguments) -> int:
    """The exit code of one command."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse's own errors
        return stop.code

"""`python -m emu3_jax`, and the installed command `emu3-jax`."""

import atexit
import os
import signal
import sys
import typing


def program() -> None:
    """Runs the command line. Ctrl-C ends it with one line from here on: while the rest is imported, and at the end."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in the background of a script
        signal.signal(signal.SIGINT, _stop)
        # What is registered first runs last: after that, Python would let the signal kill the process without a word.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    from emu3_jax.cli.main import program as run

    run()


def _stop(number: int, frame: object) -> typing.NoReturn:
    if not getattr(sys.modules.get("emu3_jax.cli.interruption"), "told", False):
        os.write(2, b"emu3-jax: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    program()

"""`python -m emu3_jax`, and the installed command `emu3-jax`."""

import atexit
import os
import signal
import sys
import typing


def program() -> None:
    """Runs the command line.

    From here on, Ctrl-C and SIGTERM end it with one line: while the rest is imported, and at the end, too.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as SIGINT is in the background of a script
            signal.signal(number, _stop)
            # What is registered first runs last: after that, Python would let the signal kill the process without a
            # word.
            atexit.register(signal.signal, number, signal.SIG_IGN)
    from emu3_jax.cli.main import program as run

    run()


def _stop(number: int, frame: object) -> typing.NoReturn:
    if not getattr(sys.modules.get("emu3_jax.cli.interruption"), "told", False):
        os.write(2, b"emu3-jax: terminated\n" if number == signal.SIGTERM else b"emu3-jax: interrupted\n")
    os._exit(128 + number)


if __name__ == "__main__":
    program()

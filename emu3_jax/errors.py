"""The one error that people see: a sentence that names the culprit and the remedy."""

from emu3_jax.printable import one_line


class Emu3Error(ValueError):
    """Bad input. The message is one line: what is wrong, what was found, what is legal, what to do.

    The command line prints it without a traceback and exits with code 2. A message may repeat what a file says: it is
    made printable, and at most 300 characters long.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))

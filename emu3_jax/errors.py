"""The error class for bad input. Its message names the cause and the remedy in one line."""

from emu3_jax.printable import one_line


class Emu3Error(ValueError):
    """Bad input. The message is one line: what is wrong, what was found, what is legal, what to do.

    The command line prints the message without a traceback and exits with code 2. A message may quote text from a
    file. So control characters are escaped, and a message of more than 300 characters is shortened.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))

"""The error classes for bad input. A message names the cause and the remedy in one line."""

from emu3_jax.printable import one_line


class Emu3Error(ValueError):
    """Bad input. The message is one line: what is wrong, what was found, what is legal, what to do.

    The command line prints the message without a traceback and exits with code 2. A message may quote text from a
    file. So control characters are escaped, and a message of more than 300 characters is shortened.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


class RowError(Emu3Error):
    """Bad input in one row of a request.

    Attributes:
        row: index of the row.
        reason: the message without the row, for callers that have a better name for it.
    """

    def __init__(self, row: int, reason: str):
        super().__init__(f"row {row}: {reason}")
        self.row, self.reason = row, reason

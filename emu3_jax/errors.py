"""The one error that people see: a sentence that names the culprit and the remedy."""


class Emu3Error(ValueError):
    """Bad input. The message is one line: what is wrong, what was found, what is legal, what to do.

    The command line prints it without a traceback and exits with code 2.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))

"""`emu3-jax`: finds the command, runs it, and turns errors into one line and an exit code."""

import argparse
import contextlib
import errno
import gc
import importlib
import logging
import os
import signal
import sys
import traceback
import typing
import warnings
from collections.abc import Sequence

import emu3_jax
from emu3_jax.cli import interruption
from emu3_jax.cli.environment import explained, quiet_libtpu, start_jax
from emu3_jax.cli.interruption import Interruption, watched
from emu3_jax.cli.output import OutputError, guarded, open_closed_streams
from emu3_jax.cli.usage import Parser
from emu3_jax.errors import Emu3Error
from emu3_jax.files import remove_temporaries
from emu3_jax.progress import by_default
from emu3_jax.user_code import left_behind

COMMANDS = {
    "generate": "generate pictures from prompts",
    "chat": "answer questions about pictures and clips",
    "video": "generate clips from prompts, or continue a clip",
    "interleave": "write texts and pictures in turn",
    "serve": "serve a model: a page, and an endpoint for OpenAI's clients",
    "tokenize": "encode pictures and clips to codes",
    "detokenize": "decode codes to pictures and clips",
    "convert": "convert PyTorch checkpoints to a bundle",
    "quantize": "write a bundle of half the size, with int8 or fp8 weights",
    "export": "export a bundle to PyTorch checkpoints",
    "merge": "merge a LoRA adapter into a bundle",
    "doctor": "check a bundle or checkpoint, and say what to do",
    "prepare": "prepare training data from captioned pictures and clips",
    "sample": "draw pictures of many prompts as a data set with log-probabilities",
    "score": "score sampled pictures by a reward",
    "pairs": "make preference pairs of sampled pictures, by rewards or votes",
    "train": "train or fine-tune a model, as a config file says",
    "evaluate": "measure a model on held-out data",
    "plan": "say whether a config fits a TPU slice, on any machine",
    "bench": "measure speed and memory",
}

SHELLS = ("bash", "zsh", "fish")  # that `--print-completion` knows
CLOSED = 141  # as a shell reports SIGPIPE


_DESCRIPTION = """Emu3 in JAX: generate pictures and clips from prompts, ask questions about pictures, and train.

A bundle is a directory that holds a model. Without --model, commands use a small embedded model.

examples:
  emu3-jax generate "3d emoji of red heart" -o out
  emu3-jax chat out/000.png --prompt "Describe the image."
  emu3-jax generate --help
"""


class _Completion(argparse.Action):
    """`--print-completion SHELL`."""

    def __call__(self, parser, namespace, values, option_string=None) -> typing.NoReturn:
        from emu3_jax.cli.completion import script

        print(script(parser, values))
        parser.exit()


def parser() -> Parser:
    """The whole command line. Commands are imported here, their heavy imports only when they run."""
    root = Parser(prog="emu3-jax", description=_DESCRIPTION)
    root.add_argument(
        "--version", action="version", version=f"%(prog)s {emu3_jax.__version__}", help="print the version"
    )
    root.add_argument(
        "--print-completion",
        action=_Completion,
        choices=SHELLS,
        default=argparse.SUPPRESS,
        metavar="SHELL",
        help=f"print a script for a shell, which completes commands, options and files: {', '.join(SHELLS)}",
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"emu3_jax.cli.{name}")
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return root


def main(arguments: Sequence[str] | None = None, *, last: bool = False) -> int:
    """Runs one command. `last`: the process ends with it.

    Returns:
        0, 2 after bad input, 130 after Ctrl-C, 143 after SIGTERM, 141 where nobody reads the output any more, 1 after a
        fault of its own.
    """
    state = Interruption()
    try:
        with guarded(), watched(state, last=last):
            return _run(arguments, state)
    except KeyboardInterrupt:  # between two instructions of this function
        return _interrupted(state)


def _run(arguments: Sequence[str] | None, state: Interruption) -> int:
    try:
        try:
            options = parser().parse_args(arguments)
        except SystemExit:
            sys.stdout.flush()  # of --help and the like
            raise
        start_jax()
        with by_default(not getattr(options, "quiet", False)):
            code = options.run(options) or 0
        sys.stdout.flush()  # a full disk shows itself here
        return code
    except OutputError as output:
        if output.error.errno == errno.EPIPE:
            return _failed(CLOSED)
        return _fail(f"error: cannot write to standard output: {output.error.strerror}", 2)
    except Emu3Error as error:
        if state.came:  # what a reader made of it
            return _interrupted(state)
        return _fail(f"error: {error}", 2)
    except KeyboardInterrupt:
        return _interrupted(state)
    except OSError as error:
        return _system_error(error, state)
    except Exception as error:
        return _fault(error, state)


def _system_error(error: OSError, state: Interruption) -> int:
    """The exit code after an error of the system that nothing explained so far."""
    if error.filename is not None:
        reason = Emu3Error(f"cannot use {os.fsdecode(error.filename)}: {error.strerror}")
        return _fail(f"error: {reason}", 2)
    return _fault(error, state)


def _fault(error: Exception, state: Interruption) -> int:
    """A fault of ours, unless the exception is what a compiled function made of Ctrl-C or SIGTERM, or the machine's."""
    if state.came:
        return _interrupted(state)
    reason = explained(error)
    if reason is not None:
        return _fail(f"error: {reason}", 2)
    traceback.print_exception(error)
    return _failed(1)


def _interrupted(state: Interruption) -> int:
    interruption.tell(state.number, lambda message: print(message, file=sys.stderr, flush=True))
    return _failed(state.code)


def _fail(message: str, code: int) -> int:
    print(f"emu3-jax: {message}", file=sys.stderr)
    return _failed(code)


def _failed(code: int) -> int:
    """Returns `code`, unless other processes of a run wait for this one: then it ends here."""
    if "emu3_jax.distributed" not in sys.modules:
        return code
    from emu3_jax import distributed

    return distributed.end_failed(code)


def set_up_messages() -> None:
    """Our own warnings become lines on standard error. PYTHONWARNINGS shows those of libraries too."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("emu3-jax: warning: %(message)s"))
    logger = logging.getLogger("emu3_jax")
    logger.addHandler(handler)
    logger.propagate = False
    logging.raiseExceptions = False  # where standard error cannot be written
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    with contextlib.suppress(ImportError):  # only Orbax needs it
        import absl.logging

        absl.logging.set_verbosity(absl.logging.ERROR)


def program() -> None:
    """The installed command: the process ends with `main`'s code."""
    open_closed_streams()
    set_up_messages()
    quiet_libtpu()
    code = main(last=True)
    if code in interruption.CODES or left_behind():
        # Threads that still compute, and destructors, must not keep a process whose user wants it gone.
        for number in interruption.MESSAGES:
            signal.signal(number, signal.SIG_IGN)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        remove_temporaries()
        os._exit(code)
    gc.freeze()  # or the interpreter, before it ends, walks through all that JAX made
    sys.exit(code)


if __name__ == "__main__":
    program()

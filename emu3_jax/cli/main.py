"""`emu3-jax`: finds the command, runs it, and turns errors into one line and an exit code."""

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence

from emu3_jax.errors import Emu3Error

COMMANDS = {
    "convert": "PyTorch checkpoints to a bundle",
    "export": "a bundle back to PyTorch checkpoints",
    "doctor": "check a bundle or checkpoint: what is wrong and what to do",
    "tokenize": "pictures and clips to codes",
    "detokenize": "codes to pictures and clips",
    "generate": "prompts to pictures",
    "video": "prompts to clips",
    "chat": "answers about pictures",
    "prepare": "captioned pictures and clips to training data",
    "train": "pretrain or fine-tune by a config file",
    "evaluate": "figures of a model on held-out data",
    "plan": "compile a config for a TPU slice: memory, FLOPs, collectives",
    "bench": "measure: figures as JSON lines",
}


def parser() -> argparse.ArgumentParser:
    """The whole command line. Commands are imported here, their heavy imports only when they run."""
    root = argparse.ArgumentParser(
        prog="emu3-jax", description="Emu3 in JAX: pictures, clips and text as one sequence."
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"emu3_jax.cli.{name}")
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, 2 after bad input, 130 after Ctrl-C, 1 after a fault of its own."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except Emu3Error as error:
        print(f"emu3-jax: error: {error}", file=sys.stderr)
        return _failed(2)
    except KeyboardInterrupt:
        print("emu3-jax: interrupted", file=sys.stderr)
        return _failed(130)
    except Exception:
        traceback.print_exc()
        return _failed(1)


def _failed(code: int) -> int:
    """Returns `code`, unless other processes of a run wait for this one: then it ends here."""
    if "emu3_jax.distributed" not in sys.modules:
        return code
    from emu3_jax import distributed

    return distributed.end_failed(code)


if __name__ == "__main__":
    sys.exit(main())

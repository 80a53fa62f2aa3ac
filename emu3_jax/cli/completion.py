"""Scripts by which shells complete commands, options, choices and files, made of the parser by shtab."""

import argparse

from emu3_jax.cli import common
from emu3_jax.errors import Emu3Error

_PATHS = (common.path, common.path_text, common.place, common.place_text)
_DIRECTORIES = ("BUNDLE", "DIR", "FRAMES", "NEW")  # what stands for them in --help


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script of `shell` ("bash", "zsh" or "fish") for `parser`.

    Raises:
        Emu3Error: shtab is not installed.
    """
    try:
        import shtab
    except ImportError as missing:
        raise Emu3Error("completion needs shtab, which is not installed: pip install shtab") from missing
    _complete_paths(parser, shtab.FILE, shtab.DIRECTORY)
    return shtab.complete(parser, shell)


def _complete_paths(parser: argparse.ArgumentParser, file: dict, directory: dict) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_paths(command, file, directory)
        elif action.type in _PATHS:
            action.complete = directory if action.metavar in _DIRECTORIES else file

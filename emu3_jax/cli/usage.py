"""The parser of the command line. An error is one line: the wrong word, the nearest legal word, the help."""

import argparse
import difflib
import sys
import typing
from collections.abc import Iterable, Sequence

from emu3_jax.printable import one_line, shown

_NEAR = 3  # most legal words that an error line suggests


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and exit code 2.

    It reports unknown words before missing arguments. Each parser reports its own unknown words and does not leave them
    to the parent parser, so the line names the right command. Options cannot be abbreviated: a later option with the
    same beginning would break a script that abbreviates.
    """

    def __init__(self, *arguments: typing.Any, **options: typing.Any):
        defaults = {"allow_abbrev": False, "formatter_class": _Formatter}
        super().__init__(*arguments, **{**defaults, **options})
        self._words: Sequence[str] = ()
        self._positionals.title = "arguments"
        # For `type=int` and `type=float`, whose errors argparse words itself.
        self.register("type", int, whole_number)
        self.register("type", float, number)

    def format_help(self) -> str:
        """The help with a short usage. The usage of argparse would name every option, in many lines."""
        self.usage = self.usage or f"{self.prog} {self._short_usage()}".replace("%", "%%")
        return super().format_help()

    def _short_usage(self) -> str:
        """Arguments, the options that must be given, and `[options]` for the others."""
        choices = [group for group in self._mutually_exclusive_groups if group.required]
        positionals, required = [], []
        for action in self._actions:
            group = next((group for group in choices if action in group._group_actions), None)
            if group is not None:
                if action is group._group_actions[0]:
                    positionals.append(f"({' | '.join(map(_usage, group._group_actions))})")
            elif not action.option_strings:
                positionals.append(_usage(action))
            elif action.required:
                required.append(_usage(action))
        parts = [*positionals, *required]
        return " ".join(["[options]", *parts] if self._subparsers else [*parts, "[options]"])

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: typing.Any = None) -> typing.Any:
        self._words = sys.argv[1:] if args is None else list(args)
        found, rest = super().parse_known_args(self._words, namespace)
        if rest:
            self.error(f"unexpected argument {shown(rest[0])}")
        return found, rest

    def error(self, message: str) -> typing.NoReturn:
        """Ends the process. Names an unknown option rather than `message`: it may be a misspelt required option."""
        unknown = next(self._unknown_options(), None)
        if unknown is not None:
            message = f"unknown option {unknown}{self._instead(unknown)}"
        elif self._mutually_exclusive_groups and message.startswith("the following arguments are required"):
            # argparse names no group here, although all its members may be missing too.
            message += f"; usage: {self.prog} {self._short_usage()}"
        print(one_line(f"emu3-jax: error: {message} (see {self.prog} --help)"), file=sys.stderr)
        sys.exit(2)

    def _check_value(self, action: argparse.Action, value: typing.Any) -> None:
        """argparse calls this for each value of an argument with choices, commands among them."""
        if action.choices is None or value in action.choices:
            return
        if isinstance(action, argparse._SubParsersAction):
            self.error(f"unknown command {shown(value)}{_suggestion(str(value), action.choices)}")
        legal = [str(choice) for choice in action.choices]
        raise argparse.ArgumentError(
            action, f"{shown(value)} is not one of {', '.join(legal)}{_suggestion(str(value), legal)}"
        )

    def _unknown_options(self) -> typing.Iterator[str]:
        known = self._option_string_actions
        has_commands = any(action.nargs == argparse.PARSER for action in self._actions)
        for word in self._words:
            option = len(word) > 1 and word[0] == "-"
            if word == "--" or (has_commands and not option):
                return  # the rest holds no options, or belongs to the command
            if not option or " " in word or self._negative_number_matcher.match(word):
                continue  # argparse treats these as values
            name = word.partition("=")[0]
            if name not in known and (word[1] == "-" or word[:2] not in known):
                yield name

    def _instead(self, unknown: str) -> str:
        if unknown in ("--version", "--print-completion"):  # options of the program, not of a command
            return f": write it before the command, emu3-jax {unknown}"
        return _suggestion(unknown, self._option_string_actions)


def whole_number(text: str) -> int:
    """The type of arguments that are whole numbers."""
    try:
        return int(text)  # also refuses more than 4,300 digits
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number") from error


def number(text: str) -> float:
    """The type of arguments that are numbers."""
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a number") from error


class _Formatter(argparse.HelpFormatter):
    """Wraps the paragraphs of a description to the terminal's width. Keeps the lines of indented examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(part if "\n  " in part else fill(part, width, indent) for part in paragraphs)


def _usage(action: argparse.Action) -> str:
    several = " ..." if action.nargs in (argparse.ONE_OR_MORE, argparse.ZERO_OR_MORE, argparse.PARSER) else ""
    choices = f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.dest
    named = f"{action.metavar or choices}{several}"
    return f"{action.option_strings[0]} {named}" if action.option_strings else named


def _suggestion(word: str, legal: Iterable[str]) -> str:
    """The end of a line about an unknown word."""
    legal = list(legal)
    begins = [name for name in legal if name.startswith(word) and len(word.strip("-")) > 1]
    near = begins[:_NEAR] or difflib.get_close_matches(word, legal, n=1)
    return f": did you mean {' or '.join(near)}?" if near else ""

"""The parser of commands: wrong words get one line, which names the culprit, the nearest legal word, and the help."""

import argparse
import difflib
import sys
import typing
from collections.abc import Iterable, Sequence

from emu3_jax.printable import one_line, shown

_NEAR = 3  # legal words that a line suggests


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and exit code 2.

    It finds words that it does not know before arguments that are missing, and no parser leaves unknown words to the
    one above it: so the line names the command in which the mistake is. Options cannot be shortened, for a script with
    a shortened one breaks when another option of the same beginning comes.
    """

    def __init__(self, *arguments: typing.Any, **options: typing.Any):
        defaults = {"allow_abbrev": False, "formatter_class": _Formatter}
        super().__init__(*arguments, **{**defaults, **options})
        self._words: Sequence[str] = ()
        self._positionals.title = "arguments"

    def format_help(self) -> str:
        """argparse's own usage names every option, in many lines."""
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
        """Ends the process. An unknown option comes before `message`: it may be what a missing argument was called."""
        unknown = next(self._unknown_options(), None)
        if unknown is not None:
            message = f"unknown option {unknown}{self._instead(unknown)}"
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
                return  # what follows is no option, or is the command's
            if not option or " " in word or self._negative_number_matcher.match(word):
                continue  # argparse takes these for values
            name = word.partition("=")[0]
            if name not in known and (word[1] == "-" or word[:2] not in known):
                yield name

    def _instead(self, unknown: str) -> str:
        if unknown in ("--version", "--print-completion"):  # options of the program, not of a command
            return f": write it before the command, emu3-jax {unknown}"
        return _suggestion(unknown, self._option_string_actions)


class _Formatter(argparse.HelpFormatter):
    """Fills the paragraphs of a description to the terminal's width, but keeps the lines of indented ones: examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(part if "\n  " in part else fill(part, width, indent) for part in paragraphs)


def _usage(action: argparse.Action) -> str:
    several = " ..." if action.nargs in (argparse.ONE_OR_MORE, argparse.ZERO_OR_MORE, argparse.PARSER) else ""
    named = f"{action.metavar or action.dest}{several}"
    return f"{action.option_strings[0]} {named}" if action.option_strings else named


def _suggestion(word: str, legal: Iterable[str]) -> str:
    """The end of a line about an unknown word."""
    legal = list(legal)
    begins = [name for name in legal if name.startswith(word) and len(word.strip("-")) > 1]
    near = begins[:_NEAR] or difflib.get_close_matches(word, legal, n=1)
    return f": did you mean {' or '.join(near)}?" if near else ""

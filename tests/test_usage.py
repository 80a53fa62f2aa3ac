"""The command line itself: version, help, lines about wrong words, and completion by a shell. No command runs here."""

import argparse
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest

import emu3_jax
from emu3_jax.cli.main import COMMANDS, main, parser

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def line_of(capsys, tmp_path, monkeypatch):
    """Parses words that are wrong; returns the one line. Nothing is written."""
    monkeypatch.chdir(tmp_path)

    def fail(*words: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(words)
        out, line = capsys.readouterr()
        assert (stop.value.code, out, os.listdir(tmp_path)) == (2, "", [])
        assert line.startswith("emu3-jax: error: ") and line.count("\n") == 1 and len(line) <= 301
        return line.removeprefix("emu3-jax: error: ").rstrip("\n")

    return fail


def walk(command: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield command
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from walk(inner)


ALL = list(walk(parser()))


def module(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "emu3_jax", *words], capture_output=True, text=True, check=False)


def test_python_m_is_the_whole_command(tmp_path):
    done = module("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"emu3-jax {emu3_jax.__version__}\n", "")
    done = module("generat")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("emu3-jax: error: unknown command 'generat': did you mean generate? (see emu3-jax --help)\n")


def test_help_and_version_do_not_wait_for_jax():
    script = (
        "import sys; from emu3_jax.cli.main import main\n"
        "for word in ('--help', '--version'):\n"
        "    try: main([word])\n"
        "    except SystemExit: print('jax' in sys.modules or 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.endswith(f"False\nemu3-jax {emu3_jax.__version__}\nFalse\n")
    assert all(f"\n    {command} " in done.stdout for command in COMMANDS)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        # The option that is required is missing too: the unknown one is named, for it is nearer to the mistake.
        ("generate --gudance 3 x", "unknown option --gudance: did you mean --guidance? (see emu3-jax generate --help)"),
        ("generate x -o y --gudance=3", "unknown option --gudance: did you mean --guidance? (see emu3-jax generate "),
        ("generate x -o y --zzz", "unknown option --zzz (see emu3-jax generate --help)"),
        ("generate x -o y -q", "unknown option -q (see emu3-jax generate --help)"),
        ("generate --version", "unknown option --version: write it before the command, emu3-jax --version (see"),
        ("bench decode --presets 8b", "unknown option --presets: did you mean --preset? (see emu3-jax bench decode"),
        ("--verison", "unknown option --verison: did you mean --version? (see emu3-jax --help)"),
        ("nonsense", "unknown command 'nonsense' (see emu3-jax --help)"),
        ("generat x -o y", "unknown command 'generat': did you mean generate? (see emu3-jax --help)"),
        ("bench decod --preset 8b", "unknown command 'decod': did you mean decode? (see emu3-jax bench --help)"),
        ("doctor a b", "unexpected argument 'b' (see emu3-jax doctor --help)"),
        ("generate x", "the following arguments are required: -o/--output; usage: emu3-jax generate (PROMPT ... | "),
        ("tokenize x", "the following arguments are required: -o/--output (see emu3-jax tokenize --help)"),
        ("tokenize x -o y --dtype float32", "unknown option --dtype"),
        ("detokenize x -o y --mesh tensor=2", "unknown option --mesh"),
        ("", "the following arguments are required: COMMAND (see emu3-jax --help)"),
        ("generate x -o y --top-k x", "argument --top-k: 'x' is not a whole number (see emu3-jax generate --help)"),
        ("generate x -o y --guidance 3 x", "argument --guidance: 'x' is not a number (see emu3-jax generate --help)"),
        ("generate x -o y -n 1.5", "argument -n: '1.5' is not a whole number from 1 to 100000 (see emu3-jax generate"),
        ("plan c.py --topology v5e:2x2 --rows-per-chip x", "argument --rows-per-chip: 'x' is not a whole number (see"),
        ("video x -o y --format gig", "argument --format: 'gig' is not one of webp, png, gif, mp4, webm: did you mean"),
    ],
)  # fmt: skip
def test_a_wrong_word_is_named_with_the_help_of_its_command(words, line, line_of):
    assert line_of(*words.split()).startswith(line)


@pytest.mark.parametrize("word", ["", "x", "1.5.2", "--", "\x1b[31m", "9" * 5000])
def test_no_value_gets_the_words_of_argparse(word):
    """They name a type of Python, such as int, and nothing that is legal."""
    for command in ALL:
        for action in command._actions:
            try:
                command._get_value(action, word)
            except argparse.ArgumentError as error:
                assert not str(error).startswith("invalid") and "invalid int value" not in str(error), action
                assert " value: " not in str(error) and "\x1b" not in str(error), action


def test_options_cannot_be_shortened(line_of):
    for word in ("--neg", "--negativ", "--negative-prompt"):
        assert f"unknown option {word}: did you mean --negative?" in line_of("generate", "x", "-o", "y", word, "blurry")
    assert "did you mean --top-k or --top-p?" in line_of("generate", "x", "-o", "y", "--top", "3")


def test_values_that_look_like_options(line_of):
    """argparse takes negative numbers, and words with a space, for values."""
    for word in ("-1", "-.5", "- a", "--no such option"):
        assert "required: -o/--output" in line_of("generate", word)
    assert "'--seed' is not" not in line_of("generate", "x", "--top-k", "--sed", "1")
    assert "required: -o/--output" in line_of("generate", "--", "--sed")


# ------------------------------------------------------------------------------------------------ help


EXAMPLES = [
    line.strip() for command in ALL for line in command.description.splitlines() if line.startswith("  emu3-jax ")
]


@pytest.mark.parametrize("command", ALL, ids=lambda command: command.prog)
def test_help_is_for_a_newcomer(command, monkeypatch):
    """A short usage, examples, and for every option a text, a default and a name of its value."""
    monkeypatch.setenv("COLUMNS", "80")
    text = command.format_help()
    usage, described, *_ = text.split("\n\n")
    assert usage.startswith(f"usage: {command.prog} ") and usage.count("\n") == 0 and "[options]" in usage
    assert described.rstrip(".") and "\nexamples:\n  emu3-jax " in text
    assert max(map(len, text.splitlines())) <= 110  # examples are not wrapped
    for action in command._actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
            continue
        assert action.help and action.help == action.help.strip().rstrip("."), action
        takes_a_value = action.nargs != 0
        assert not takes_a_value or action.metavar or action.choices, action
        if takes_a_value and action.default not in (None, argparse.SUPPRESS, []):
            assert "(default: " in action.help, action


def test_the_commands_of_the_program_are_listed():
    assert [command.prog for command in ALL if command.prog.count(" ") == 1] == [
        f"emu3-jax {name}" for name in COMMANDS
    ]
    assert ALL[0].format_help().splitlines()[0] == "usage: emu3-jax [options] COMMAND ..."
    (generate,) = (command for command in ALL if command.prog == "emu3-jax generate")
    usage = "usage: emu3-jax generate (PROMPT ... | --prompts-file FILE) -o DIR [options]"
    assert generate.format_help().splitlines()[0] == usage
    (export,) = (command for command in ALL if command.prog == "emu3-jax export")
    usage = "usage: emu3-jax export BUNDLE -o DIR --layout {upstream,transformers} [options]"
    assert export.format_help().splitlines()[0] == usage


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_of_the_help_are_legal(example):
    words = shlex.split(example)[1:]
    if "--help" not in words:
        parser().parse_args(words)
    assert all((ROOT / word).is_file() for word in words if word.startswith("configs/"))


# ------------------------------------------------------------------------------------------------ completion


@pytest.fixture(scope="module")
def bash_completion(tmp_path_factory):
    """What bash offers for the last of some words, in a folder with `photo.png`, `notes.txt` and `folder`."""
    here = tmp_path_factory.mktemp("completion")
    done = module("--print-completion", "bash")
    assert (done.returncode, done.stderr) == (0, "")
    (here / "script.bash").write_text(done.stdout)
    (here / "work" / "folder").mkdir(parents=True)
    for name in ("photo.png", "notes.txt"):
        (here / "work" / name).touch()
    # What bash does on Tab: it sets these variables and calls the function that `complete` named.
    script = """
        source ../script.bash
        registered=$(complete -p emu3-jax)
        [[ $registered =~ -F\\ ([^ ]+) ]] && function=${BASH_REMATCH[1]}
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*" COMP_POINT=${#COMP_LINE}
        "$function" emu3-jax "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
        printf '%s\\n' "${COMPREPLY[@]}"
    """

    def complete(*words: str) -> set[str]:
        command = ["bash", "-c", script, "bash", "emu3-jax", *words]
        done = subprocess.run(command, cwd=here / "work", capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return set(done.stdout.split())

    return complete


def test_bash_completes_commands_options_choices_and_files(bash_completion):
    assert bash_completion("gen") == {"generate"}
    assert {*COMMANDS} <= bash_completion("")
    assert bash_completion("--ver") == {"--version"}
    assert bash_completion("generate", "a red apple", "--gui") == {"--guidance"}
    assert bash_completion("generate", "x", "--dtype", "") == {"bfloat16", "float16", "float32"}
    assert bash_completion("generate", "x", "--dtype", "b") == {"bfloat16"}
    assert bash_completion("tokenize", "") == {"photo.png", "notes.txt", "folder"}
    assert bash_completion("tokenize", "ph") == {"photo.png"}
    assert bash_completion("generate", "x", "-o", "") == {"folder"}
    assert bash_completion("bench", "de") == {"decode"}
    assert bash_completion("bench", "decode", "--pre") == {"--preset"}


@pytest.mark.parametrize(("shell", "begins"), [("zsh", "#compdef emu3-jax\n"), ("fish", "# ")])
def test_other_shells_get_a_script_too(shell, begins, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--print-completion", shell])
    script = capsys.readouterr().out
    assert stop.value.code == 0 and script.startswith(begins) and "generate" in script and "guidance" in script


def test_an_unknown_shell_and_an_absent_library(line_of, monkeypatch, capsys):
    assert "argument --print-completion: 'bas' is not one of bash, zsh, fish: did you mean bash?" in line_of(
        "--print-completion", "bas"
    )
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "bash"]) == 2
    assert capsys.readouterr().err == (
        "emu3-jax: error: completion needs shtab, which is not installed: pip install shtab\n"
    )

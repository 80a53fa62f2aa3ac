"""No path with `://` becomes a local folder: every command, every argument and field that is a path."""

import argparse
import os
import re
import sys

import numpy as np
import pytest

from emu3_jax import Emu3Error, storage
from emu3_jax.cli import common
from emu3_jax.cli.main import main, parser
from emu3_jax.files import files_into, new_directory, new_file, shared_directory
from emu3_jax.foreign import local_path
from emu3_jax.media.clips import save_clip
from emu3_jax.media.live import live_frames
from emu3_jax.training.config import ModelConfig, TrainConfig

LOCAL, BOTH = (common.path, common.path_text), (common.place, common.place_text)
# What stands for a path in `--help`.
METAVARS = {
    "BUNDLE", "BUNDLE_OR_DIR", "CLIP", "CODES.npz", "CONFIG.py", "DIR", "FILE", "FRAMES", "LIST.json", "NEW", "SOURCE",
    "SRC",
}  # fmt: skip


def path_arguments() -> list[tuple[str, argparse.Action, argparse.ArgumentParser]]:
    """(command, argument, its parser) of all that are paths."""
    found = []

    def walk(name: str, command: argparse.ArgumentParser) -> None:
        for action in command._actions:
            if isinstance(action, argparse._SubParsersAction):
                for inner, sub in action.choices.items():
                    walk(f"{name} {inner}".strip(), sub)
            elif action.metavar in METAVARS or action.type in LOCAL + BOTH:
                found.append((name, action, command))

    walk("", parser())
    return found


ARGUMENTS = path_arguments()
NAMES = [
    f"{command} {action.option_strings[-1] if action.option_strings else action.dest}"
    for command, action, _ in ARGUMENTS
]


def legal(action: argparse.Action) -> str:
    """The name of a file, or a number if the argument must be one."""
    try:
        (action.type or str)("x.npz")
    except (ValueError, argparse.ArgumentTypeError):
        return "1"
    return "x.npz"


def with_value(command: str, wanted: argparse.Action, options: argparse.ArgumentParser, value: str) -> list[str]:
    """The words of a command in which `wanted` has a value, and everything that is required some."""
    words = command.split()
    for action in options._actions:
        given = value if action is wanted else (action.choices and next(iter(action.choices))) or legal(action)
        if not action.option_strings and (action is wanted or action.nargs != "*"):
            words.append(given)
        elif action.option_strings and (action is wanted or action.required):
            words += [action.option_strings[-1], given]
    return words


def fails(words: list[str], capsys) -> str:
    """The line that a command says of its arguments."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and len(line) <= 301, line
    return line


def test_all_commands_have_path_arguments():
    assert {command.split()[0] for command, _, _ in ARGUMENTS} == {*parser()._actions[-1].choices}


@pytest.mark.parametrize(("command", "action", "options"), ARGUMENTS, ids=NAMES)
def test_an_argument_with_a_scheme_is_refused(command, action, options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert action.type in LOCAL + BOTH
    for value in ("xyz://bucket/data", "s3://bucket/data", "XYZ://b", "x://b", "a/xyz://b", "gs:/bucket/data", "://b"):
        line = fails(with_value(command, action, options, value), capsys)
        assert "addresses are not supported here: " in line and value in line
    if action.type in LOCAL:
        assert "gcsfuse" in fails(with_value(command, action, options, "gs://bucket/data"), capsys)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "call",
    [
        lambda path: local_path(path),
        lambda path: storage.place(path),
        lambda path: new_file(path).__enter__(),
        lambda path: files_into(path).__enter__(),
        lambda path: new_directory(path, 0).__enter__(),
        lambda path: shared_directory(path).__enter__(),
        lambda path: live_frames(path).__enter__(),
        lambda path: save_clip(np.zeros((2, 8, 8, 3), np.uint8), f"{path}.webp", 8),
        lambda path: TrainConfig(path, ModelConfig("b"), None, 1, 1),
        lambda path: ModelConfig(path),
    ],
)
def test_a_function_with_a_scheme_is_refused(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("xyz://b/x", "s3://b/x", "./xyz://b/x", "gs:/b/x"):
        with pytest.raises(Emu3Error, match=r"addresses are not supported here"):
            call(path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("gs://bucket/x", "gcloud storage cp -r"),
        ("s3://bucket/x", "mount-s3"),
        ("hdfs://host/x", "hdfs dfs -get"),
        ("abfss://a@b/x", "blobfuse2"),
        ("https://host/x.png", "download it"),
        ("hf://datasets/a", "hf:NAME"),
        ("file:///x", "without file://"),
        ("other://x", "copy or mount it"),
    ],
)
def test_the_remedy_is_that_of_the_scheme(path, remedy):
    with pytest.raises(Emu3Error) as error:
        local_path(path)
    assert remedy in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("gs://", "'' is not a legal bucket name"),
        ("gs:///x", "'' is not a legal bucket name"),
        ("gs://B/x", "'B' is not a legal bucket name"),
        ("gs://bucket", "the path inside the bucket is missing"),
        ("gs://bucket/", "the path inside the bucket is missing"),
        ("gs://bucket/a/../b", "an empty part, . or .."),
        ("gs://bucket/a//b", "an empty part, . or .."),
        ("gs://bucket/a*", "one of * ? [ ] #"),
        ("gs://bucket/a#1", "one of * ? [ ] #"),
        ("gs://bucket/a\n", "a control character"),
        ("gs://bucket/\udc80", "a control character"),
        ("gs://bucket/" + "x" * 1025, "longer than 1024 bytes"),
    ],
)
def test_paths_in_buckets_that_are_none(path, reason):
    with pytest.raises(Emu3Error, match=re.escape(reason)):
        storage.check_place(path)


def test_without_gcsfs_the_extra_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    storage.requests.client.cache_clear()
    remedy = "paths with gs:// need gcsfs, which is not installed: pip install 'emu3-jax[gcs]', or give a local path"
    for command, action, options in ARGUMENTS:
        if action.type in BOTH:
            assert remedy in fails(with_value(command, action, options, "gs://bucket/data"), capsys)
    assert os.listdir(tmp_path) == []
    storage.requests.client.cache_clear()

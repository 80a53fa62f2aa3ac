"""Reads the small YAML file that describes Emu3.5's vision tokenizer (`config.yaml`)."""

from pathlib import Path
from typing import Any

import yaml

from emu3_jax.errors import Emu3Error
from emu3_jax.foreign import AGAIN, limit, read_bytes, reading

MAX_BYTES = 64 << 10  # a config of this kind has about 500
_MAX_BRACKETS = 200


def read_yaml_object(path: Path) -> dict[str, Any]:
    """Reads a YAML file that holds an object of names and plain values.

    Raises:
        Emu3Error: the file is absent, too large, not YAML, holds something else, or asks for more than plain values.
    """
    text = read_bytes(path, MAX_BYTES)
    # The time of PyYAML grows with the square of the depth of brackets.
    limit(path, "brackets", text.count(b"[") + text.count(b"{"), _MAX_BRACKETS)
    with reading(path):
        try:
            # A file of a few lines whose aliases refer to each other stands for any number of values.
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
                raise Emu3Error(f"{path}: holds an alias (*name), which no config needs: write the value out")
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
            where = f", line {mark.line + 1}" if mark else ""
            raise Emu3Error(
                f"{path}: not readable as YAML ({problem or type(error).__name__}{where}); {AGAIN}"
            ) from error
    if not isinstance(data, dict) or not all(isinstance(name, str) for name in data):
        raise Emu3Error(f"{path}: holds no object of named fields; {AGAIN}")
    return data

"""Peers of benchmarks, each in a process of its own: from its first device on, JAX holds the memory that they need."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

from emu3_jax.config import DecoderConfig
from emu3_jax.errors import Emu3Error


def require(*packages: str) -> None:
    """Raises `Emu3Error` if a package that the peer needs is missing."""
    for package in ("torch", "transformers", *packages):
        if importlib.util.find_spec(package) is None:
            hint = package if package in packages else "'emu3-jax[test]'"
            raise Emu3Error(f"--compare transformers needs {package}: pip install {hint}")


def in_a_process(module: str, config: DecoderConfig, **arguments: Any) -> Iterator[dict[str, Any]]:
    """Figures as a peer's `main` prints them, in a process that gives all its memory back.

    Args:
        module: under `benchmarks`, which calls `main` where it is run.
        config: of the decoder.
        arguments: the others, of JSON's types.

    Raises:
        Emu3Error: the process failed, after the figures that it printed.
    """
    command = [sys.executable, "-m", f"emu3_jax.benchmarks.{module}", json.dumps([config.to_dict(), arguments])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield from (json.loads(line) for line in process.stdout if line.startswith("{"))
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise Emu3Error(f"the peer's process ended with status {process.returncode}: what it printed is above")


def main(run: Callable[..., Iterator[dict[str, Any]]]) -> None:
    """Prints the figures of a peer's `run(config, ...)`, called with what `in_a_process` was."""
    config, arguments = json.loads(sys.argv[1])
    for figures in run(DecoderConfig.from_dict(config), **arguments):
        print(json.dumps(figures), flush=True)

"""Runs a benchmark's peer (a PyTorch program) in its own process, which frees all GPU memory when it ends."""

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
    """Runs a peer in a new process and yields its figures.

    Args:
        module: name of a module in `benchmarks` that calls `main` when it is run as a program.
        config: config of the decoder.
        arguments: further arguments of the peer's `run`. They must fit into JSON.

    Raises:
        Emu3Error: the process failed. This is raised after all figures that it printed.
    """
    command = [sys.executable, "-m", f"emu3_jax.benchmarks.{module}", json.dumps([config.to_dict(), arguments])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield from (json.loads(line) for line in process.stdout if line.startswith("{"))
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise Emu3Error(f"the peer's process failed with status {process.returncode}: see its output above")


def main(run: Callable[..., Iterator[dict[str, Any]]]) -> None:
    """Calls a peer's `run` with the arguments of `in_a_process`, and prints each dict of figures as a JSON line."""
    config, arguments = json.loads(sys.argv[1])
    for figures in run(DecoderConfig.from_dict(config), **arguments):
        print(json.dumps(figures), flush=True)

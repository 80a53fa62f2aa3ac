"""`emu3-jax` in two processes, as on two hosts."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

from emu3_jax import distributed
from emu3_jax.training.metrics import read_metrics


class Pair:
    """`emu3-jax` in two processes of two devices each."""

    def __init__(self, *arguments, **environment: str):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "emu3_jax.cli.main", *map(str, arguments)]
        common = {
            **os.environ,
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2",
            distributed.COORDINATOR: f"localhost:{port}",
            distributed.COUNT: "2",
            **environment,
        }
        self.processes = [
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**common, distributed.INDEX: str(index)},
            )
            for index in range(2)
        ]

    def end(self) -> list[tuple[int, str, str]]:
        """(exit code, stdout, stderr) of each, without what the collectives' library prints.

        No process is left, even if one does not end in time.
        """
        ends = []
        try:
            for process in self.processes:
                out, errors = process.communicate(timeout=240)
                # Its threads write into each other's lines.
                lines = [x for x in out.splitlines() if not re.search("Gloo|peer ranks", x) and x.strip("0123456789 ")]
                ends.append((process.returncode, "\n".join(lines), errors))
        finally:
            for process in self.processes:
                if process.poll() is None:
                    process.kill()
                    process.communicate()  # also closes its pipes
        return ends

    def succeed(self) -> str:
        """What the first process says; the second says nothing."""
        (code, out, errors), (other_code, other_out, other_errors) = self.end()
        assert (code, other_code, other_out) == (0, 0, ""), errors + other_errors
        self.log, other_log = (
            re.findall(r"^\d{4}-\d\d-\d\d [\d:]{8} (.+)", said, re.MULTILINE) for said in (errors, other_errors)
        )
        assert other_log == []
        return out

    def kill(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
        self.end()

    def wait_for_step(self, directory: pathlib.Path, step: int) -> None:
        """Until the run has written about `step`, or a process has ended."""
        while all(p.poll() is None for p in self.processes) and max([0, *(s for s, *_ in losses(directory))]) < step:
            time.sleep(0.02)


def losses(directory) -> list[tuple[int, float, float]]:
    lines = [line for line in read_metrics(pathlib.Path(directory)) if line["group"] == "train"]
    return [(line["step"], line["loss"], line["gradient_norm"]) for line in lines]

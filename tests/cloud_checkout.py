"""A checkout whose scripts run against stand-ins for the vendor's commands."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

from cloud_stand_in import install
from tiny_bundle import DECODER

ROOT = pathlib.Path(__file__).parents[1]

# What the tiny model is fine-tuned by in place of the configs of the 8 B model: NAME is the config's, ADAPTED whether
# it is one of adapters, which evaluates what `prepare` held back.
CONFIG = f"""
from emu3_jax.config import DecoderConfig, SpecialTokens
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import TextToImage
from emu3_jax.models.adapters import Adapter
from emu3_jax.training.config import ModelConfig, OptimizerConfig, TrainConfig


def config():
    return TrainConfig(
        directory="out/NAME",
        model=ModelConfig("out/emu3-gen", {DECODER!r}, dtype="float32"),
        data=DataConfig((Source("out/data", TextToImage()),), sequence_length=64),
        batch_size=4,
        steps=16,
        optimizer=OptimizerConfig(warmup_steps=2),
        adapter=Adapter(rank=4) if ADAPTED else None,
        evaluation=(("validation", Source("out/data/validation", TextToImage())),) if ADAPTED else (),
    )
"""
# Stands in for emu3-jax where only its arguments matter: it parses them as emu3-jax does, and makes the output.
PARSE = """
import json, os, pathlib, sys
from emu3_jax.cli.main import parser
options = parser().parse_args(sys.argv[1:])
if getattr(options, "output", None) is not None:
    options.output.mkdir(parents=True, exist_ok=True)
names = ("JAX_NUM_PROCESSES", "JAX_PLATFORMS", "TPU_VISIBLE_DEVICES", "TPU_PROCESS_BOUNDS", "EMU3_START_TIMEOUT")
told = {"arguments": sys.argv[1:], "host": os.environ.get("CLOUD_HOST"), "out": os.path.realpath("out")}
told |= {name: os.environ.get(name) for name in names}
with open(pathlib.Path(os.environ["CLOUD"], "told"), "a") as file:
    file.write(json.dumps(told) + "\\n")
print("done")
"""

SLICE = {"TPU": "emu3", "ZONE": "us-west4-a", "NFS": "10.0.0.2:/vol1"}


class Cloud:
    """A checkout, stand-ins for the vendor's commands, and a directory that the hosts share."""

    def __init__(self, root: pathlib.Path, emu3: str):
        self.root, self.shared, self.checkout = root / "cloud", root / "shared", root / "checkout"
        install(self.root)
        self.checkout.mkdir()
        for name in ("scripts", "pyproject.toml"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, self.checkout / name)
        (self.checkout / "configs").mkdir()
        for config in (ROOT / "configs").glob("*_8b.py"):
            (self.checkout / "configs" / config.name).write_text(
                CONFIG.replace("NAME", config.stem.removesuffix("_8b")).replace("ADAPTED", str("lora" in config.stem))
            )
        self.program(self.root / "bin" / "emu3-jax", emu3)
        self.program(
            self.root / "bin" / "python",
            sys.executable,
            f'if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin" && exec cp {self.root}/bin/pip "$3/bin"; fi',
        )
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("TPU", "ZONE", "WORKER"))},
            "PATH": f"{self.root / 'bin'}:/usr/bin:/bin",
            "PYTHONPATH": "",
            "CLOUD": str(self.root),
            "CLOUD_EMU3": str(self.root / "bin" / "emu3-jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "SHARED": str(self.shared),
            "POLL": "0.3",
            "USER": "somebody",
        }
        self.commit()

    @staticmethod
    def program(file: pathlib.Path, command: str, first: str = ":") -> None:
        file.write_text(f'#!/bin/sh\n{first}\nexec env PYTHONPATH={ROOT} {command} "$@"\n')
        file.chmod(0o755)

    def commit(self) -> None:
        """Makes the checkout a repository with one commit: `git archive` takes that to the hosts."""
        who = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.com"]
        for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "-m", "the checkout"]):
            subprocess.run(["git", *words], cwd=self.checkout, check=True)

    def run(self, script: str, code: int = 0, **variables: str) -> str:
        """What a shell script prints, which must end with `code`."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.checkout,
            env={**self.environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        refused = self.root / "refused"
        assert not refused.exists(), refused.read_text()
        assert done.returncode == code, f"{done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout + done.stderr

    def error(self, script: str, **variables: str) -> str:
        """The one line of an error, after which nothing was called."""
        before = len(self.calls())
        (line,) = self.run(script, 2, **variables).splitlines()
        assert len(self.calls()) == before
        return line

    def calls(self) -> list[tuple[str, dict[str, str], list[str]]]:
        file = self.root / "calls"
        return [tuple(json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []

    def told(self) -> list[dict]:
        file = self.root / "told"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def parsing_cloud(root: pathlib.Path) -> Cloud:
    """Hosts whose emu3-jax only reads its arguments."""
    (root / "parse.py").write_text(PARSE)
    return Cloud(root, f"{sys.executable} {root / 'parse.py'}")

"""What the tests of buckets share: the command, small inputs, and the comparison of a bucket with a directory."""

import hashlib
import pathlib

import numpy as np
from gcs_stand_in import Store
from PIL import Image

from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.cli.main import main
from emu3_jax.training.config import SampleConfig

STEPS = 6


def photos(directory: pathlib.Path, count: int = 5) -> pathlib.Path:
    directory.mkdir()
    draw = np.random.default_rng(0)
    for index in range(count):
        Image.fromarray(draw.integers(0, 256, (24, 24, 3), np.uint8)).save(directory / f"{index}.png")
        (directory / f"{index}.txt").write_text(f"photo {index}")
    return directory


def digests(directory: pathlib.Path) -> dict[str, str]:
    found = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def stored(store: Store, prefix: str) -> dict[str, str]:
    names = store.names("bucket", f"{prefix}/")
    return {name: hashlib.sha256(store.read("bucket", f"{prefix}/{name}")).hexdigest() for name in names}


def run(*words) -> None:
    assert main([str(word) for word in words]) == 0


def assert_same_arrays(first, second) -> None:
    """Two bundles have the same weights."""
    for part in ("decoder", "vision"):
        ours, theirs = ({param.path: a for param, a in Bundle.open(p).arrays(part)} for p in (first, second))
        assert ours.keys() == theirs.keys()
        for path, array in ours.items():
            np.testing.assert_array_equal(array, theirs[path])


def line_of(capsys, *words) -> str:
    """The one line of a command that must fail."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and len(line) <= 320, line
    return line


def write_config(bundle, data, directory, **changes) -> pathlib.Path:
    """A config file of a short run."""
    fields = {
        "steps": STEPS, "checkpoint_every": 2, "batch_size": 2, "mesh": "fsdp=1", "profile": (1, 1),
        "samples": SampleConfig(("a",), every=STEPS), **changes,
    }  # fmt: skip
    pathlib.Path("config.py").write_text(
        f"""
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import TextToImage
from emu3_jax.training.config import ModelConfig, OptimizerConfig, SampleConfig, TrainConfig

def config():
    return TrainConfig(
        directory={str(directory)!r},
        model=ModelConfig({str(bundle)!r}, dtype="float32"),
        data=DataConfig((Source({str(data)!r}, TextToImage()),), sequence_length=64, packing=2),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        keep=2,
        **{fields!r},
    )
"""
    )
    return pathlib.Path("config.py")

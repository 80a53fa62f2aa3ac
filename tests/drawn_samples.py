"""Directories of samples as `emu3-jax sample` writes them, with random codes: nothing is drawn."""

import pathlib
from collections.abc import Sequence

import numpy as np

from emu3_jax.data.records import SAMPLES
from emu3_jax.data.shards import Codebook, Index, Shard, write_json, write_shard
from emu3_jax.preference.samples import DrawnSample


def write_samples(
    root: pathlib.Path, prompts: Sequence[str], scales: Sequence[float], codebook: Codebook
) -> list[Shard]:
    """Makes the directory: a sample of every prompt at each of the scales, in two shards; returns the shards."""
    root.mkdir(parents=True)
    draw, each = np.random.default_rng(0), len(scales)
    drawn = [
        DrawnSample(
            number, number // each, prompts[number // each], "", scales[number % each], 1.0, 8, 1.0, number, "tiny",
            draw.integers(0, 64, (3, 3), np.int32), *np.zeros((2, 3, 3), np.float32),
        )
        for number in range(len(prompts) * each)
    ]  # fmt: skip
    shards, half = [], len(prompts) // 2 * each
    for number, part in enumerate((drawn[:half], drawn[half:])):
        file = root / f"shard-{number:05d}-of-00002.arrayrecord"
        shards.append(Shard(file.name, *write_shard(file, part)))
    write_json(root / "index.json", Index("job", codebook, tuple(shards), SAMPLES).to_json())
    return shards

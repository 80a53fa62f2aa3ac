"""Measures `emu3-jax convert`: bytes read, peak host memory and seconds, for a random sharded bfloat16 decoder.

    python scripts/bench_convert.py [--layers 4] [--quantize int8] [--directory DIR]

The decoder has the widths and the vocabulary of the published 8 B model, so its largest arrays are of real size. With
`--layers 32` it has the full 17 GB. The script prints one JSON line. It needs twice the checkpoint's size on the disk,
and removes all files at the end.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np

from emu3_jax.checkpoints.layouts import decoder_params
from emu3_jax.checkpoints.published_config import decoder_to_published
from emu3_jax.checkpoints.tensors import write_safetensors
from emu3_jax.config import DecoderConfig

SHARD_BYTES = 2 * 10**9
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

CONVERT = """
import json, resource, sys, time
from emu3_jax.checkpoints.convert import convert

def bytes_read():
    return int(open("/proc/self/io").readline().split()[1])

before, start = bytes_read(), time.perf_counter()
convert([sys.argv[1]], sys.argv[2], progress=False, quantize=sys.argv[3] or None)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"bytes_read": bytes_read() - before, "peak_rss_bytes": peak, "seconds": round(seconds, 1)}))
"""


def write_checkpoint(directory: Path, config: DecoderConfig) -> int:
    """Writes a sharded checkpoint of random finite weights in upstream's layout. Returns the bytes of its weights."""
    (directory / "config.json").write_text(json.dumps(decoder_to_published(config, "upstream")))
    shards, size = [[]], 0
    for weight in (w for param in decoder_params(config) for w in param.weights):
        nbytes = int(np.prod(weight.shape, dtype=np.int64)) * BFLOAT16.itemsize
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((weight.name, weight.shape, BFLOAT16))
        size += nbytes
    weight_map, total = {}, 0
    for i, shard in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / name, shard, map(random_array, shard))
        weight_map |= {entry[0]: name for entry in shard}
        total += (directory / name).stat().st_size
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def random_array(entry: tuple[str, tuple[int, ...], np.dtype]) -> np.ndarray:
    """Repeats a tile of random numbers, because generating gigabytes of them takes longer than converting them."""
    tile = np.random.default_rng(0).standard_normal(1 << 20, np.float32).astype(BFLOAT16)
    return np.resize(tile.view(np.uint16), entry[1]).view(BFLOAT16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="layers of the decoder (default: %(default)s)")
    parser.add_argument("--quantize", default="", help="quantise as `emu3-jax convert --quantize` (default: do not)")
    parser.add_argument("--directory", type=Path, help="directory for the files (default: the system's temporary one)")
    arguments = parser.parse_args()
    config = dataclasses.replace(DecoderConfig(), num_layers=arguments.layers)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        source, bundle = Path(name) / "source", Path(name) / "bundle"
        source.mkdir()
        on_disk = write_checkpoint(source, config)
        command = [sys.executable, "-c", CONVERT, str(source), str(bundle), arguments.quantize]
        result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        written = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
    print(json.dumps({"layers": arguments.layers, "bytes_on_disk": on_disk, "bytes_written": written, **result}))


if __name__ == "__main__":
    main()

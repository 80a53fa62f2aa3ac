"""Writes a small Emu3 checkpoint in upstream's PyTorch layout: real vocabulary and structure, random weights.

python scripts/small_checkpoint.py DIR      writes DIR/decoder and DIR/vision, in the layout that upstream publishes
"""

import argparse
import hashlib
import importlib.util
import json
import pathlib
import zlib
from collections.abc import Iterable

import ml_dtypes
import numpy as np

from emu3_jax.checkpoints.layouts import Weight, decoder_params, vision_counters, vision_params
from emu3_jax.checkpoints.published_config import decoder_to_published, image_to_published, vision_to_published
from emu3_jax.checkpoints.tensors import write_safetensors
from emu3_jax.config import DecoderConfig, ImageConfig, VisionConfig
from emu3_jax.errors import Emu3Error

VOCABULARY_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
DECODER = DecoderConfig(
    hidden_size=64, intermediate_size=176, num_layers=4, num_heads=4, num_kv_heads=2, max_positions=4096
)
VISION = VisionConfig(base_channels=32, num_res_blocks=1)


def write_checkpoint(directory: pathlib.Path, area: int = 256 * 256) -> list[pathlib.Path]:
    """Writes the directories `decoder` and `vision` in `directory`, and returns their paths.

    Args:
        directory: parent directory, made if it does not exist.
        area: area in pixels of the pictures that the model generates. It reads pictures of up to 1.5 times this area.

    Raises:
        Emu3Error: the vocabulary is not installed, or is not the one that Emu3 was trained with.
    """
    parts = [directory / "decoder", directory / "vision"]
    decoder, vision = parts
    for part in parts:
        part.mkdir(parents=True, exist_ok=True)
    vocabulary = public_vocabulary()

    config = decoder_to_published(DECODER, "upstream") | {"image_area": area}
    (decoder / "config.json").write_text(json.dumps(config, indent=2))
    (decoder / "emu3.tiktoken").write_bytes(vocabulary)
    weights = [w for param in decoder_params(DECODER) for w in param.weights]
    _write_weights(decoder / "model.safetensors", weights, np.dtype(ml_dtypes.bfloat16))

    (vision / "config.json").write_text(json.dumps(vision_to_published(VISION, "upstream"), indent=2))
    image = image_to_published(ImageConfig(min_pixels=area // 4, max_pixels=area * 3 // 2), "upstream")
    (vision / "preprocessor_config.json").write_text(json.dumps(image, indent=2))
    weights = [w for param in vision_params(VISION) for w in param.weights] + vision_counters(VISION)
    _write_weights(vision / "model.safetensors", weights, np.dtype(np.float32))
    return parts


def public_vocabulary() -> bytes:
    """Emu3's vocabulary, which is Qwen's, from the installed package `dashscope`. No code of that package runs."""
    package = importlib.util.find_spec("dashscope")
    if package is None:
        raise Emu3Error("the vocabulary is not installed: pip install --no-deps dashscope")
    file = pathlib.Path(package.submodule_search_locations[0]) / "resources" / "qwen.tiktoken"
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != VOCABULARY_SHA256:
        raise Emu3Error(f"{file} is not Emu3's vocabulary (its SHA-256 differs): install another version of dashscope")
    return data


def _write_weights(file: pathlib.Path, weights: Iterable[Weight], dtype: np.dtype) -> None:
    arrays = {weight.name: _random(weight, dtype) for weight in weights}
    write_safetensors(file, [(name, a.shape, a.dtype) for name, a in arrays.items()], arrays.values())


def _random(weight: Weight, dtype: np.dtype) -> np.ndarray:
    """The values of a new PyTorch model: random kernels that preserve variance, norms with scale 1 and bias 0."""
    leaf = weight.name.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return np.zeros(weight.shape, np.int64)
    if weight.name.endswith("conv_y.bias") or (len(weight.shape) == 1 and leaf in ("weight", "running_var")):
        return np.ones(weight.shape, dtype)
    if leaf in ("bias", "running_mean"):
        return np.zeros(weight.shape, dtype)
    # The name is the seed, so a weight does not depend on the weights before it.
    values = np.random.default_rng(zlib.crc32(weight.name.encode())).standard_normal(weight.shape, np.float32)
    scale = {"model.embed_tokens.weight": 1.0, "quantize.embedding.weight": 0.05}  # 0.05 matches the latents' size
    return (values * scale.get(weight.name, np.prod(weight.shape[1:]) ** -0.5)).astype(dtype)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=pathlib.Path, metavar="DIR", help="directory for decoder/ and vision/")
    for part in write_checkpoint(parser.parse_args().directory):
        print(part)

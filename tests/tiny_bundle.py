"""A whole bundle with random weights, 512 ranks and 64 codes: what takes long over the golden model's vocabulary."""

import functools
import pathlib
from collections.abc import Mapping

import numpy as np

from emu3_jax.benchmarks.vision import random_weights
from emu3_jax.checkpoints.bundle import VOCABULARY
from emu3_jax.checkpoints.layouts import decoder_params
from emu3_jax.checkpoints.parts import LazyArray, write_config, write_part
from emu3_jax.config import DecoderConfig, ImageConfig, VisionConfig
from emu3_jax.text.tokenizer import Tokenizer, special_tokens

RANKS, CODES = 512, 64
SIDE = 24  # pixels of a picture's height and width
TOKENS = special_tokens(RANKS, CODES)
DECODER = DecoderConfig(
    vocab_size=TOKENS.visual_end, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2,
    max_positions=256, image_area=SIDE * SIDE, dtype="float32", tokens=TOKENS,
)  # fmt: skip
VISION = VisionConfig(codebook_size=CODES, base_channels=32, num_res_blocks=1, channel_multipliers=(1, 1, 1, 1))
IMAGE = ImageConfig(min_pixels=16 * 16, max_pixels=64 * 64)


def write_bundle(root: pathlib.Path, vocabulary: pathlib.Path) -> pathlib.Path:
    """Makes the directory `root` the bundle; `vocabulary` is the public file of ranks."""
    root.mkdir()
    draw = np.random.default_rng(0)
    weights = {param.path: 0.3 * draw.standard_normal(param.shape, np.float32) for param in decoder_params(DECODER)}
    write_part(root / "decoder", DECODER.to_dict(), _lazy(weights))
    config = {"vision": VISION.to_dict(), "image": IMAGE.to_dict(), "num_batches_tracked": {}}
    write_part(root / "vision", config, _lazy(random_weights(VISION)))
    write_config(root / "tokenizer", {"template": "chat"})
    lines = vocabulary.read_bytes().splitlines()[:RANKS]
    (root / "ranks").write_bytes(b"\n".join(lines) + b"\n")
    Tokenizer.from_files(root / "ranks", TOKENS).to_file(root / "tokenizer" / VOCABULARY)
    return root


def _lazy(weights: Mapping[tuple[str, ...], np.ndarray]) -> list[LazyArray]:
    return [LazyArray(path, a.shape, a.dtype, functools.partial(np.asarray, a)) for path, a in weights.items()]

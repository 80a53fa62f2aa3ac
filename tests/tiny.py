"""A decoder small enough to enumerate: 24 text and control ids, 8 visual ids."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from emu3_jax.config import DecoderConfig, SpecialTokens
from emu3_jax.generation.sampling import RowSettings
from emu3_jax.generation.session_rows import Row
from emu3_jax.models import stacking
from emu3_jax.models.decoder import Decoder

TOKENS = SpecialTokens(
    pad=16, bos=17, eos=18, img=19, boi=20, eoi=21, eol=22, eof=23, visual_start=24, visual_count=8
)  # fmt: skip
CONFIG = DecoderConfig(
    vocab_size=32, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, max_positions=256,
    dtype="float32", tokens=TOKENS,
)  # fmt: skip


@functools.cache
def params(config: DecoderConfig = CONFIG, seed: int = 0):
    """Random parameters, large enough that distributions are far from flat."""
    init = nn.unbox(jax.jit(Decoder(config).init)(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32)))["params"]
    return jax.tree.map(lambda leaf: 3 * leaf if leaf.ndim > 1 else leaf, init)


def vision_params(model: nn.Module, pixels):
    """Random weights of a vision tokenizer, biases and norms included. Variances are positive."""
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), pixels))
    leaves, tree = jax.tree.flatten_with_path(shapes)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    found = [0.2 * jax.random.normal(key, leaf.shape) for key, (_, leaf) in zip(keys, leaves, strict=True)]
    positive = [path[-1].key == "var" for path, _ in leaves]
    return tree.unflatten([1 + leaf**2 if var else leaf for leaf, var in zip(found, positive, strict=True)])


def mean_loss(sums):
    """Of `LossSums`."""
    return (sums.text + sums.vision) / sums.count


def stack_layers(params, config: DecoderConfig):
    """Parameters of the stacked form; both nested dicts."""
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict(stacking.stack_layers(flat, config, lambda _, layers: jnp.stack(layers)))


@functools.partial(jax.jit, static_argnames=("config", "last_only", "visual_head"))
def forward(params, tokens, cache=None, config: DecoderConfig = CONFIG, last_only=False, visual_head=False):
    """`Decoder.__call__`, compiled."""
    return Decoder(config, visual_head).apply({"params": params}, tokens, cache, last_only=last_only)


def settings(count: int, **columns) -> RowSettings:
    """Plain sampling, or what `columns` say; each column is one value or one per row."""
    defaults = {"temperature": 1.0, "top_k": 10**6, "top_p": 1.0, "guidance": 1.0, "seed": np.arange(count)}
    return RowSettings.of(count, **{**defaults, **columns})


def rows(prompts, schedules, negatives=None) -> list[Row]:
    """Rows of a session, from one list for each of their parts."""
    return [Row(*row) for row in zip(prompts, schedules, negatives or [None] * len(prompts), strict=True)]

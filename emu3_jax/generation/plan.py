"""The programs that draw pictures and clips, to be compiled for a TPU slice by `sharding.plan`."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emu3_jax.config import DecoderConfig
from emu3_jax.generation import engine
from emu3_jax.generation.config import GenerateConfig
from emu3_jax.generation.sampling import RowSettings
from emu3_jax.models.cache import KVCache
from emu3_jax.models.decoder import Decoder
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.plan import Program, Slice
from emu3_jax.sharding.rules import batch_shards, cache_shardings, decoder_shardings, use_mesh


def programs(config: GenerateConfig, slice_: Slice) -> tuple[Mesh, list[Program]]:
    """Prefill, decoding at the full length of the cache, and the last growth of the cache, as `engine.run` does them.

    Raises:
        Emu3Error: the mesh does not fit the chips or the decoder.
    """
    decoder = config.decoder
    mesh = make_mesh(config.mesh, slice_.devices)
    whole = NamedSharding(mesh, P())
    guided = config.guidance != 1
    multiple = batch_shards(mesh)
    if guided:
        multiple //= math.gcd(2, multiple)
    pictures = -(-config.pictures // multiple) * multiple
    rows = pictures * (2 if guided else 1)
    width = engine.bucket(config.prompt_tokens)
    steps = engine.bucket(config.steps)
    final = width + steps
    variant = engine.Variant(visual_only=True, guided=guided, use_top_k=True, use_top_p=False)

    def array(shape, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    params = _params(decoder, mesh)
    column = {"top_k": jnp.int32, "seed": jnp.uint32}
    names = [field.name for field in dataclasses.fields(RowSettings)]
    settings = RowSettings(**{name: array((pictures,), column.get(name, jnp.float32)) for name in names})
    plan = engine.Plan(forced=array((pictures, steps)), settings=settings)
    prompts, start = array((rows, width)), array((rows,))
    places = cache_shardings(decoder, mesh)

    def cache(slots: int) -> KVCache:
        empty = jax.eval_shape(lambda: KVCache.create(decoder, jnp.zeros((rows,), jnp.int32), slots))
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), empty, places
        )

    def state(slots: int) -> engine.DecodeState:
        return engine.DecodeState(
            cache=cache(slots), tokens=array((pictures, steps)), step=array(()), ended=array((pictures,), jnp.bool_)
        )

    def within(lower):
        def lowered():
            with use_mesh(mesh):
                return lower()

        return lowered

    first = engine.cache_slots(width + 1, final, "xla")
    full = state(final)
    inputs = (plan, full.tokens, full.step, full.ended)
    # A picture's count leaves out EOF, EOI and EOS. A clip's is all its tokens: frames end with EOF throughout.
    clips = "clip" if pictures == 1 else "clips"
    last, what = (config.steps - 3, "pictures") if config.frames is None else (config.steps, clips)
    result = [
        Program(
            f"prefill of {rows} rows of {width} tokens",
            within(lambda: engine.prefill.lower(params, prompts, start, plan, decoder, variant, first)),
            {"weights": params, "inputs": (prompts, start, plan)},
            flops=_flops(decoder, rows * width, rows * width * (width + 1) / 2, rows),
        ),
        Program(
            f"decoding step {last} of {pictures} {what} of {'x'.join(map(str, config.grid))} tokens",
            within(lambda: engine.decode.lower(params, full, plan, array(()), decoder, variant)),
            {"weights": params, "cache": full.cache, "inputs": inputs},
            flops=_flops(decoder, rows, rows * final, rows),
        ),
    ]
    previous = first
    while (larger := engine.cache_slots(previous + 1, final, "xla")) < final:
        previous = larger
    if previous < final:
        old = cache(previous)
        grow = jax.jit(lambda cache: cache.grow(final))
        result.append(
            Program(f"growth of the cache to {final} slots", within(lambda: grow.lower(old)), {"cache": old},
                    beside={"weights": params, "inputs": inputs})
        )  # fmt: skip
    return mesh, result


def _params(config: DecoderConfig, mesh: Mesh) -> Any:
    """The decoder's weights in its dtype, as bundles restore them."""
    shapes = nn.unbox(jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(config.dtype), sharding=place),
        shapes,
        decoder_shardings(config, mesh),
    )


def _flops(config: DecoderConfig, tokens: int, attended: float, heads: int) -> float:
    """Of the layers for `tokens` that see `attended` keys in all, and of the visual head for `heads` tokens."""
    d, f, h = config.hidden_size, config.intermediate_size, config.head_dim
    layer = d * (2 * config.num_heads + 2 * config.num_kv_heads) * h + 3 * d * f
    pairs = 4 * config.num_layers * config.num_heads * h * attended
    return 2 * config.num_layers * layer * tokens + pairs + 2 * config.tokens.visual_count * d * heads

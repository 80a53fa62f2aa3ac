"""The programs of rows that write texts and pictures in turn. `sharding.plan` compiles them for a TPU slice."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from emu3_jax.generation import interleaving
from emu3_jax.generation.config import GenerateConfig
from emu3_jax.generation.defaults import MOST_PARALLEL
from emu3_jax.generation.grammar import Grammar, GrammarState
from emu3_jax.generation.parallel import choose_window
from emu3_jax.generation.sampling import RowSettings
from emu3_jax.generation.shapes import (
    bucket,
    cache_slots,
    fill_rows,
    passes_by_size,
    sizes_read,
    sizes_while_growing,
    spare_slots,
)
from emu3_jax.models.attention import choose_kernels
from emu3_jax.models.cache import KVCache
from emu3_jax.models.quantization import narrows_cache
from emu3_jax.printable import counted
from emu3_jax.sharding.bounds import Decoding
from emu3_jax.sharding.plan import Program
from emu3_jax.sharding.rules import batch_shards, cache_shardings, use_mesh


def interleaved_programs(config: GenerateConfig, mesh: Mesh, params: Any, beside: Mapping[str, Any]) -> list[Program]:
    """Prefill, a pass with the largest cache, and the last growth of the cache, of `config.pictures` rows.

    With several tokens a pass, the program has a pass of one token for text beside that of several for pictures. Its
    costs are then those of both, and the plan does not say how fast the rows are.

    Args:
        config: what is generated. `interleave` is not None.
        mesh: the mesh.
        params: the decoder's weights, as abstract arrays with shardings.
        beside: other arrays in memory during the session, as in `Program`.
    """
    assert config.interleave is not None
    decoder, contexts = config.decoder, 1 if config.guidance == 1 else 2
    rows = fill_rows(config.pictures, mesh, contexts > 1)
    width, steps = bucket(config.prompt_tokens), bucket(config.interleave)
    with use_mesh(mesh):
        several = choose_kernels(config.kernels, decoder.head_dim, decoder.dtype, window=MOST_PARALLEL)
        window = choose_window(
            config.parallel, contexts * rows // batch_shards(mesh), several, hidden_size=decoder.hidden_size
        )
        kernels = choose_kernels(config.kernels, decoder.head_dim, decoder.dtype, window=window)
    # Which ids the digits have makes no difference to the cost.
    grammar, narrow = Grammar.of(decoder, range(1, 11), 11), narrows_cache(config.quantize)
    options = interleaving.Options(grammar, contexts, True, False, kernels, narrow, window)
    final = width + steps + spare_slots(window)
    sizes = sizes_while_growing(
        cache_slots(width + window, final, kernels), lambda needed: cache_slots(needed, final, kernels)
    )

    whole = NamedSharding(mesh, PartitionSpec())

    def replicated(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), tree)

    settings = RowSettings.of(rows, temperature=1.0, top_k=2048, top_p=1.0, guidance=config.guidance, seed=0)
    goal = np.full(rows, config.interleave, np.int32)
    plan = replicated(interleaving.Plan(goal, settings, settings, np.ones(rows, np.float32), np.int32(width)))
    written = replicated(GrammarState.of([None] * rows, [config.interleave] * rows))
    start = np.zeros(contexts * rows, np.int32)
    prompts = replicated(np.zeros((contexts * rows, width), np.int32))

    def cache(slots: int) -> KVCache:
        shapes = jax.eval_shape(lambda: KVCache.create(decoder, jnp.asarray(start), slots, narrow))
        placed = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            shapes, cache_shardings(decoder, mesh, narrow),
        )  # fmt: skip
        return placed.replace(lockstep=False)

    def state(slots: int) -> interleaving.State:
        tokens, count, flags = replicated(
            (np.zeros((rows, steps + 2 * window - 2), np.int32), np.zeros(rows, np.int32), np.zeros(rows, bool))
        )
        return interleaving.State(cache(slots), tokens, count, count, flags, flags, written)

    def lower_prefill() -> jax.stages.Lowered:
        with use_mesh(mesh):
            return interleaving.prefill.lower(
                params, prompts, replicated(start), plan, written,
                config=decoder, options=options, slots=sizes[0], steps=steps,
            )  # fmt: skip

    def lower_decode() -> jax.stages.Lowered:
        with use_mesh(mesh):
            return interleaving.decode.lower(
                params, state(sizes[-1]), plan, replicated(np.int32(0)), config=decoder, options=options
            )

    def lower_growth() -> jax.stages.Lowered:
        with use_mesh(mesh):
            return jax.jit(lambda cache: cache.grow(sizes[-1])).lower(cache(sizes[-2]))

    last = state(sizes[-1])
    carried = (last.tokens, last.step, last.passes, last.ended, last.inside, last.grammar)
    at_once = f", {window} tokens at once in pictures," if window > 1 else ""
    made = f"{counted(rows, 'row')} of texts and pictures"
    passes = passes_by_size(sizes_read(sizes, width, kernels), width, config.interleave)
    rates = Decoding("row", rows, passes) if window == 1 else None
    result = [
        Program(
            f"prefill of {contexts * rows} rows of {width} tokens", lower_prefill,
            {"weights": params, "inputs": (prompts, replicated(start), plan, written)}, beside=dict(beside),
        ),
        Program(
            f"decoding step {config.interleave}{at_once} of {made}", lower_decode,
            {"weights": params, "cache": cache(sizes[-1]), "inputs": (plan, carried)},
            beside=dict(beside), rates=rates,
        ),
    ]  # fmt: skip
    if len(sizes) > 1:
        result.append(
            Program(
                f"growth of the cache to {sizes[-1]} slots", lower_growth, {"cache": cache(sizes[-2])},
                beside={**beside, "weights": params, "inputs": (plan, carried)},
            )
        )  # fmt: skip
    return result

"""`bench decode`: the decode loop at full shapes with random weights, or of a bundle; guidance, sampler and schedule as
in use."""

import dataclasses
import functools
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from emu3_jax.benchmarks import peer
from emu3_jax.benchmarks.draw import normal
from emu3_jax.benchmarks.kernels import gpu_kernels
from emu3_jax.benchmarks.machine import describe_machine
from emu3_jax.benchmarks.vision import PRESETS as VISION_PRESETS
from emu3_jax.benchmarks.vision import random_weights
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.checkpoints.embedded import embedded_bundle
from emu3_jax.checkpoints.layouts import decoder_params
from emu3_jax.compilation import enable_persistent_cache
from emu3_jax.config import DecoderConfig, VisionConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.generation import engine
from emu3_jax.generation.sampling import RowSettings
from emu3_jax.generation.schedule import TokenClass, forced_ids, image_schedule, stack_schedules
from emu3_jax.loading import load
from emu3_jax.models.adapters import MATRICES
from emu3_jax.models.attention import choose_kernels
from emu3_jax.models.cache import KVCache
from emu3_jax.models.decoder import Decoder, visual_head_params
from emu3_jax.models.quantization import KINDS, is_quantised, quantise
from emu3_jax.models.vision import make_decoder
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.rules import decoder_shardings, use_mesh

PRESETS = {
    "8b": DecoderConfig(),
    "small": DecoderConfig(hidden_size=256, intermediate_size=512, num_layers=2, num_heads=4, num_kv_heads=2),
}
PROMPT_TOKENS = 64
GUIDANCE, TOP_K = 3.0, 2048
PROFILED = 16  # steps


def run(
    preset: str = "8b",
    rows: tuple[int, ...] = (1,),
    area: int | None = None,
    steps: int = 256,
    whole: bool = False,
    compare: str | None = None,
    model: str | None = None,
    quantize: str | None = None,
    kernels: str = "auto",
    mesh: str | None = None,
    profile: bool = False,
    logits: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yields figures as dicts: with `compare` the peer's, then the machine and its bandwidths, then one per batch size
    and cache length.

    Times are the shortest of three runs of `steps` steps; `bytes_per_step` is what a step must move: the layers, the
    visual rows of the head and the live part of the cache. On a mesh all devices' bytes count, of which each moves its
    part; bandwidths are of one device.

    Args:
        preset: decoder shapes; the weights are random.
        rows: pictures at once, one benchmark for each.
        area: pixels of a picture; by default what the model draws.
        steps: timed for each cache length, at most the picture's.
        whole: also times whole pictures from prompt to last token, and to their pixels.
        compare: "transformers" runs that peer on the same shapes before.
        model: a bundle in place of the preset; "embedded" is the embedded model.
        quantize: narrow weights and cache, see `load`.
        kernels: what computes attention of the steps, of `attention.KERNELS`.
        mesh: spreads the preset's weights over devices, see `load`.
        profile: also lists a GPU's kernels at each cache length.
        logits: also compares the logits of narrow weights and cache with those of wide ones, see `logit_errors`; last,
            since both need memory.

    Raises:
        Emu3Error: the bundle is absent, damaged, or lacks a part; the peer's packages are missing, or at the end, it
            failed; `logits` has nothing to compare; or the mesh does not fit the devices or the preset.
    """
    if mesh is not None and (logits or model is not None or compare is not None):
        raise Emu3Error("--mesh spreads a preset's weights: leave out --logits, --model and --compare")
    if logits and (quantize is None or model is not None):
        raise Emu3Error(
            "--logits compares a preset's narrow weights with its wide ones: add --quantize, leave out --model"
        )
    failure = None
    if compare:
        peer.require()
        # First: from its first device on, JAX holds the memory that the peer needs.
        config = PRESETS[preset]
        if model is not None:
            config = Bundle.open(embedded_bundle() if model == "embedded" else model).decoder_config
        try:
            yield from peer.in_a_process("decode_transformers", config, config.image_area if area is None else area)
        except Emu3Error as error:
            failure = error
    enable_persistent_cache()
    measured = bandwidths(model is None and preset == "8b")  # before anything else needs the memory
    devices = None if mesh is None else make_mesh(mesh)
    with use_mesh(devices):
        yield from _run(preset, rows, area, steps, whole, model, quantize, kernels, devices, profile, logits, measured)
    if failure:
        raise failure


def _run(
    preset, rows, area, steps, whole, model, quantize, kernels, mesh: Mesh | None, profile, logits, measured
) -> Iterator[dict[str, Any]]:
    """Our side of `run`."""
    devices = 1 if mesh is None else mesh.size
    narrow_cache = quantize is not None and KINDS[quantize][1]
    loaded = None
    if model is None:
        config, about = PRESETS[preset], {"preset": preset}
        params = random_params(config, quantize, mesh)
        vision_config = VISION_PRESETS[{"8b": "270m"}.get(preset, preset)]
        about |= {} if mesh is None else {"mesh": dict(mesh.shape)}
    else:
        loaded = load(None if model == "embedded" else model, quantize=quantize)
        about = {"model": model}
        config, params, vision_config = loaded.language.config, loaded.language.params, loaded.vision.config
    factor = vision_config.spatial_factor
    if quantize is not None:
        about["quantize"] = quantize
    about["kernels"] = kernels = choose_kernels(kernels, config.head_dim)
    yield {"bench": "decode", **about, **describe_machine(), **measured}
    weight_bytes = step_weight_bytes(params, config)
    area = config.image_area if area is None else area
    side = round(math.sqrt(area) / factor)
    for count in rows:
        schedule = image_schedule(side, side)
        total = len(schedule) - 3
        stacked = stack_schedules([schedule] * count, engine.bucket(len(schedule)))
        timed = min(steps, total - 1)
        variant = engine.Variant(
            visual_only=True,
            guided=True,
            use_top_k=True,
            use_top_p=False,
            narrow_cache=narrow_cache,
            kernels=kernels,
        )
        plan = engine.Plan(jnp.asarray(forced_ids(stacked, config.tokens)), _settings(count))
        prompts = np.full((2 * count, PROMPT_TOKENS), 1, np.int32)
        start = np.zeros(2 * count, np.int32)
        final = PROMPT_TOKENS + stacked.shape[1]
        slots = engine.cache_slots(PROMPT_TOKENS + 1, final, kernels)
        began = time.perf_counter()
        state = engine.prefill(params, prompts, start, plan, config, variant, slots)
        jax.block_until_ready(state)
        compile_s = time.perf_counter() - began
        slot_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache) if leaf.ndim > 1) // slots
        seconds = 0.0
        position = 1
        while position < total:  # one stop in the middle of each size that a growing cache would have
            needed = PROMPT_TOKENS + position + 1
            slots = engine.cache_slots(needed, final, kernels)
            last = min(engine.cache_slots(needed, final, "xla") - PROMPT_TOKENS, total)
            middle = max((position + last - timed) // 2, 1)
            if slots > state.cache.slots:
                state = state.replace(cache=state.cache.grow(slots))
            best = math.inf
            for attempt in range(3):
                state = _place(state, middle, PROMPT_TOKENS)
                jax.block_until_ready(state)
                began = time.perf_counter()
                state = engine.decode(params, state, plan, np.int32(middle + timed), config, variant)
                jax.block_until_ready(state)
                took = time.perf_counter() - began
                compile_s += took if attempt == 0 else 0
                best = min(best, took / timed)
            seconds += best * (last - position)
            moved = weight_bytes + slot_bytes * (PROMPT_TOKENS + middle + timed // 2)
            yield {
                "pictures": count,
                "cache_length": PROMPT_TOKENS + middle + timed // 2,
                "cache_slots": slots,
                "ms_per_step": round(best * 1e3, 3),
                "bytes_per_step": moved,
                "gb_per_s": round(moved / best / 1e9, 1),
                "share_of_copy": round(moved / best / 1e9 / measured["copy_gb_per_s"] / devices, 3),
            }
            if profile:
                state = _place(state, middle, PROMPT_TOKENS)
                with gpu_kernels(PROFILED) as found:
                    state = engine.decode(params, state, plan, np.int32(middle + PROFILED), config, variant)
                    jax.block_until_ready(state)
                if found:
                    yield {"pictures": count, "cache_slots": slots, **found}
            position = last
        average = seconds / total
        sampler = _sampler_seconds(config, variant, plan, count)
        summary = {
            "pictures": count,
            "picture": f"{side * factor}x{side * factor}",
            "tokens": total,
            "ms_per_token_average": round(average * 1e3, 3),
            "seconds_per_picture": round(average * total / count, 2),
            "pictures_per_minute": round(60 * count / (average * total), 2),
            "sampler_ms": round(sampler * 1e3, 4),
            "sampler_share": round(sampler / average, 4),
            "first_calls_s": round(compile_s, 1),
            **_memory(),
        }
        del state
        if whole:
            row = [1] * PROMPT_TOKENS
            settings = jax.tree.map(np.asarray, _settings(count))
            began = time.perf_counter()
            tokens = engine.run(  # what it runs has been compiled above
                params,
                config,
                [row] * count,
                [schedule] * count,
                settings,
                [row] * count,
                narrow_cache=narrow_cache,
                kernels=kernels,
            )
            summary["whole_run_s"] = round(time.perf_counter() - began, 2)
            if loaded is None:
                summary["pixels_s"] = _draw(tokens, schedule, side, config, vision_config)
            if loaded is not None:
                for _ in range(2):
                    began = time.perf_counter()
                    loaded.generate(["a picture"] * count, area=area, guidance=GUIDANCE, top_k=TOP_K, batch_size=count)
                summary["prompt_to_pixels_s"] = round(time.perf_counter() - began, 2)
            summary |= _memory()
        yield summary
    if logits:
        yield logit_errors(config, params, quantize)


def bandwidths(large: bool) -> dict[str, float]:
    """Copy (bytes read plus written) and read-only bandwidth of the device in GB/s."""
    x = jnp.ones((2**30 if large else 2**23,), jnp.float32)
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)
    read = jax.jit(lambda x: jnp.max(x.reshape(-1, 2**14), axis=1))
    figures, calls = {}, 10
    for name, function, factor in (("read_gb_per_s", read, 1), ("copy_gb_per_s", copy, 2)):
        best = math.inf
        for _ in range(4):
            began = time.perf_counter()
            for _ in range(calls):
                y = function(x)
                x = y if factor == 2 else x
            jax.block_until_ready(y)
            best = min(best, (time.perf_counter() - began) / calls)
        figures[name] = round(factor * x.nbytes / best / 1e9, 1)
    return figures


def _sampler_seconds(config: DecoderConfig, variant: engine.Variant, plan: engine.Plan, count: int) -> float:
    """Of one step's guidance and sampling alone, in a loop of `PROFILED` of them."""
    candidates = config.tokens.visual_count if variant.visual_only else config.vocab_size
    logits = jax.random.normal(jax.random.key(0), (2 * count, candidates), jnp.float32)

    @jax.jit
    def loop(logits, plan):
        ended = jnp.zeros((count,), bool)
        state = engine.DecodeState(None, jnp.zeros_like(plan.forced), jnp.zeros((), jnp.int32), ended)

        def step(_, carry):
            logits, state = carry
            state = engine.emit(logits, state, plan, config, variant)
            return logits + state.step, state  # other logits at each step: nothing can leave the loop

        return jax.lax.fori_loop(0, PROFILED, step, (logits, state))

    best = math.inf
    for _ in range(4):  # the first compiles
        began = time.perf_counter()
        jax.block_until_ready(loop(logits, plan))
        best = min(best, time.perf_counter() - began)
    return best / PROFILED


def _draw(tokens: np.ndarray, schedule: np.ndarray, side: int, config: DecoderConfig, vision: VisionConfig) -> float:
    """Seconds from the tokens of pictures to their pixels by a tokenizer of random weights, once it is compiled."""
    params = traverse_util.unflatten_dict(jax.tree.map(jnp.asarray, random_weights(vision)))
    codes = tokens[:, schedule == TokenClass.VISUAL].reshape(-1, 1, side, side) - config.tokens.visual_start
    for _ in range(2):
        began = time.perf_counter()
        for picture in codes:
            jax.block_until_ready(make_decoder(vision)(params, picture))
    return round(time.perf_counter() - began, 3)


def logit_errors(config: DecoderConfig, narrow: Any, quantize: str) -> dict[str, float]:
    """What narrowing does to the logits of `PROMPT_TOKENS` visual tokens under random weights.

    Args:
        config: of the decoder.
        narrow: what `random_params` gave for `quantize`.
        quantize: of `KINDS`; says whether the cache is narrow too.

    Returns:
        `logit_error`, the root mean square of the differences over that of the logits, and `same_likeliest`, the share
        of positions whose likeliest visual token stays.
    """
    special = config.tokens
    tokens = jax.random.randint(jax.random.key(1), (1, PROMPT_TOKENS), special.visual_start, special.visual_end)

    @functools.partial(jax.jit, static_argnames="narrow_cache")
    def logits(params, tokens, narrow_cache):
        cache = KVCache.create(config, jnp.zeros(1, jnp.int32), PROMPT_TOKENS, narrow_cache)
        params = visual_head_params(params, config)
        return Decoder(config, visual_head=True).apply({"params": params}, tokens, cache)[0]

    found = np.asarray(logits(narrow, tokens, KINDS[quantize][1]))
    expected = np.asarray(logits(random_params(config), tokens, False))
    return {
        "logit_error": round(float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))), 4),
        "same_likeliest": round(float(np.mean(found.argmax(-1) == expected.argmax(-1))), 4),
    }


def step_weight_bytes(params: Any, config: DecoderConfig) -> int:
    """Bytes of weights that one step reads: every layer, the last norm and the visual rows of the head."""
    counted = {k: v for k, v in params.items() if k not in ("embed", "head")}
    rows = config.tokens.visual_count / config.vocab_size
    return sum(leaf.nbytes for leaf in jax.tree.leaves(counted)) + round(
        sum(leaf.nbytes for leaf in jax.tree.leaves(params["head"])) * rows
    )


def random_params(config: DecoderConfig, quantize: str | None = None, mesh: Mesh | None = None) -> Any:
    """Parameters as `Decoder.init` draws them, in the compute dtype, quantised or spread over a mesh if asked for.

    One leaf at a time: there is no float32 copy of all, and no wide one of what is quantised.
    """
    places = {} if mesh is None else traverse_util.flatten_dict(decoder_shardings(config, mesh))
    declared = decoder_params(config)
    keys = jax.random.split(jax.random.key(0), len(declared))

    @functools.partial(jax.jit, static_argnames=("shape", "fan_in"))
    def draw(key, shape, fan_in):
        if len(shape) == 1:
            return jnp.ones(shape, config.dtype)
        return normal(key, shape, fan_in**-0.5, config.dtype)

    params: dict[tuple[str, ...], jax.Array] = {}
    for key, (path, shape) in zip(keys, ((param.path, param.shape) for param in declared), strict=True):
        matrix = MATRICES.get(path[-1])
        array = draw(key, shape, math.prod(shape[: matrix.inputs]) if matrix else config.hidden_size)
        if mesh is not None:
            array = jax.device_put(array, places[path])
        if quantize is not None and is_quantised(path):
            params |= {(*path[:-1], name): part for name, part in quantise(path[-1], array, quantize).items()}
        else:
            params[path] = array
    return traverse_util.unflatten_dict(params)


def _settings(count: int) -> RowSettings:
    return RowSettings(
        temperature=jnp.ones(count, jnp.float32),
        top_k=jnp.full(count, TOP_K, jnp.int32),
        top_p=jnp.ones(count, jnp.float32),
        guidance=jnp.full(count, GUIDANCE, jnp.float32),
        seed=jnp.arange(count, dtype=jnp.uint32),
    )


def _place(state: engine.DecodeState, step: int, prompt: int) -> engine.DecodeState:
    """The state as if `step` steps had been taken: same shapes, so the same program."""
    cache = dataclasses.replace(state.cache, length=jnp.asarray(prompt + step - 1, jnp.int32))
    return dataclasses.replace(state, cache=cache, step=jnp.asarray(step, jnp.int32))


def _memory() -> dict[str, float]:
    stats = jax.devices()[0].memory_stats() or {}
    return {"peak_gb": round(stats["peak_bytes_in_use"] / 1e9, 2)} if "peak_bytes_in_use" in stats else {}

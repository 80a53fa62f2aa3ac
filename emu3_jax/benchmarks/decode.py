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
from emu3_jax.benchmarks.kernels import gpu_kernels
from emu3_jax.benchmarks.machine import describe_machine
from emu3_jax.benchmarks.random_weights import normal
from emu3_jax.benchmarks.vision import PRESETS as VISION_PRESETS
from emu3_jax.benchmarks.vision import random_weights
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.checkpoints.embedded import embedded_bundle
from emu3_jax.checkpoints.layouts import decoder_params
from emu3_jax.compilation import enable_persistent_cache
from emu3_jax.config import DecoderConfig, VisionConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.generation import engine, session
from emu3_jax.generation.defaults import GUIDANCE, TOP_K
from emu3_jax.generation.pipeline import Emu3
from emu3_jax.generation.rows import Sampling
from emu3_jax.generation.schedule import TokenClass, image_schedule
from emu3_jax.generation.session import DecodeSession, Row
from emu3_jax.loading import decoder_dtype, load
from emu3_jax.models.adapters import MATRICES
from emu3_jax.models.attention import choose_kernels
from emu3_jax.models.cache import KVCache
from emu3_jax.models.decoder import Decoder, visual_head_params
from emu3_jax.models.quantization import codes_and_scales, narrows_cache
from emu3_jax.models.vision import make_decoder
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.rules import decoder_shardings, use_mesh

PRESETS = {
    "8b": DecoderConfig(),
    "small": DecoderConfig(hidden_size=256, intermediate_size=512, num_layers=2, num_heads=4, num_kv_heads=2),
}
PROMPT_TOKENS = 64
PROFILED = 16  # steps


def run(
    *,
    preset: str = "8b",
    rows: tuple[int, ...] = (1,),
    area: int | None = None,
    steps: int = 256,
    whole: bool = False,
    compare: str | None = None,
    model: str | None = None,
    quantize: str | None = None,
    dtype: str | None = None,
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
        area: pixels of a picture; by default the model's default.
        steps: timed for each cache length, at most the picture's.
        whole: also times whole pictures from prompt to last token, and to their pixels.
        compare: "transformers" runs that peer on the same shapes before.
        model: a bundle in place of the preset; "embedded" is the embedded model.
        quantize: narrow weights and cache, see `load`.
        dtype: of the decoder, see `load`; of a preset's by default bfloat16.
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
        config = PRESETS[preset] if dtype is None else dataclasses.replace(PRESETS[preset], dtype=dtype)
        if model is not None:
            config = Bundle.open(embedded_bundle() if model == "embedded" else model).decoder_config
        try:
            yield from peer.in_a_process(
                "decode_transformers", config, area=config.image_area if area is None else area
            )
        except Emu3Error as error:
            failure = error
    enable_persistent_cache()
    measured = bandwidths(model is None and preset == "8b")  # before anything else needs the memory
    devices = None if mesh is None else make_mesh(mesh)
    with use_mesh(devices):
        subject = _subject(preset, model, quantize, dtype, kernels, devices)
        yield {"bench": "decode", **subject.about, **describe_machine(), **measured}
        config = subject.config
        side = round(math.sqrt(config.image_area if area is None else area) / subject.vision_config.spatial_factor)
        for count in rows:
            copy = measured["copy_gb_per_s"]
            yield from _measure(subject, count, side, steps=steps, whole=whole, profile=profile, copy=copy)
        if logits:
            yield logit_errors(config, subject.params, quantize)
    if failure:
        raise failure


@dataclasses.dataclass(frozen=True)
class _Subject:
    """What is measured: a decoder of random weights, or a bundle, which is then `loaded`."""

    about: dict[str, Any]
    config: DecoderConfig
    params: Any
    vision_config: VisionConfig
    loaded: Emu3 | None
    mesh: Mesh | None
    narrow_cache: bool
    kernels: str


def _subject(
    preset: str, model: str | None, quantize: str | None, dtype: str | None, kernels: str, mesh: Mesh | None
) -> _Subject:
    about: dict[str, Any]
    if model is None:
        config, loaded, about = PRESETS[preset], None, {"preset": preset}
        config = dataclasses.replace(config, dtype=decoder_dtype(dtype, config.dtype, quantize) or config.dtype)
        params = random_params(config, quantize, mesh)
        vision_config = VISION_PRESETS[{"8b": "270m"}.get(preset, preset)]
        about |= {} if mesh is None else {"mesh": dict(mesh.shape)}
    else:
        loaded = load(None if model == "embedded" else model, quantize=quantize, dtype=dtype)
        about = {"model": model}
        config, params, vision_config = loaded.language.config, loaded.language.params, loaded.vision.config
        quantize = loaded.language.quantize
    about["dtype"] = config.dtype
    if quantize is not None:
        about["quantize"] = quantize
    about["kernels"] = kernels = choose_kernels(kernels, config.head_dim)
    narrow_cache = narrows_cache(quantize)
    return _Subject(about, config, params, vision_config, loaded, mesh, narrow_cache, kernels)


def _measure(
    subject: _Subject, count: int, side: int, *, steps: int, whole: bool, profile: bool, copy: float
) -> Iterator[dict[str, Any]]:
    """Figures of `count` pictures of `side` x `side` tokens at once; `copy` is a device's copy bandwidth in GB/s."""
    config, params = subject.config, subject.params
    schedule = image_schedule(side, side)
    total = len(schedule) - 3
    timed = min(steps, total - 1)
    prompt = [1] * PROMPT_TOKENS
    pictures = [Row(prompt, schedule, prompt)] * count
    settings = Sampling(top_k=TOP_K, guidance=GUIDANCE).settings(count)
    options: dict[str, Any] = {
        "mesh": subject.mesh, "narrow_cache": subject.narrow_cache, "kernels": subject.kernels,
    }  # fmt: skip
    decoding = DecodeSession(params, config, pictures, settings, **options)
    began = time.perf_counter()
    decoding.start()
    jax.block_until_ready(decoding.state)
    compile_s = time.perf_counter() - began
    weight_bytes, slot_bytes = step_weight_bytes(params, config), _slot_bytes(decoding)
    devices = 1 if subject.mesh is None else subject.mesh.size
    seconds = 0.0
    position = 1
    while position < total:  # one stop in the middle of each size that a growing cache would have
        needed, final = PROMPT_TOKENS + position + 1, decoding.shapes.width + decoding.shapes.steps
        last = min(session.cache_slots(needed, final, "xla") - PROMPT_TOKENS, total)
        middle = max((position + last - timed) // 2, 1)
        attempts = [_timed(decoding, middle, timed) for _ in range(3)]  # the first one may compile
        compile_s += attempts[0]
        best = min(attempts) / timed
        seconds += best * (last - position)
        moved = weight_bytes + slot_bytes * (PROMPT_TOKENS + middle + timed // 2)
        slots = decoding.state.cache.slots
        yield {
            "pictures": count,
            "cache_length": PROMPT_TOKENS + middle + timed // 2,
            "cache_slots": slots,
            "ms_per_step": round(best * 1e3, 3),
            "bytes_per_step": moved,
            "gb_per_s": round(moved / best / 1e9, 1),
            "share_of_copy": round(moved / best / 1e9 / copy / devices, 3),
        }
        if profile:
            with gpu_kernels(PROFILED) as found:
                _timed(decoding, middle, PROFILED)
            if found:
                yield {"pictures": count, "cache_slots": slots, **found}
        position = last
    average = seconds / total
    sampler = _sampler_seconds(config, decoding, count)
    summary = {
        "pictures": count,
        "picture": "{0}x{0}".format(side * subject.vision_config.spatial_factor),
        "tokens": total,
        "ms_per_token_average": round(average * 1e3, 3),
        "seconds_per_picture": round(average * total / count, 2),
        "pictures_per_minute": round(60 * count / (average * total), 2),
        "sampler_ms": round(sampler * 1e3, 4),
        "sampler_share": round(sampler / average, 4),
        "first_calls_s": round(compile_s, 1),
        **_memory(),
    }
    del decoding
    if whole:
        began = time.perf_counter()
        tokens = session.run(params, config, pictures, settings, **options)  # its programs have been compiled above
        summary["whole_run_s"] = round(time.perf_counter() - began, 2)
        if subject.loaded is None:
            summary["pixels_s"] = _pixel_seconds(tokens, schedule, side, config, subject.vision_config)
        else:
            area = (side * subject.vision_config.spatial_factor) ** 2
            for _ in range(2):
                began = time.perf_counter()
                subject.loaded.generate(
                    ["a picture"] * count, area=area, guidance=GUIDANCE, top_k=TOP_K, batch_size=count
                )
            summary["prompt_to_pixels_s"] = round(time.perf_counter() - began, 2)
        summary |= _memory()
    yield summary


def _slot_bytes(decoding: DecodeSession) -> int:
    """Bytes of one slot of the cache, over all rows and layers."""
    cache = decoding.state.cache
    return sum(leaf.nbytes for leaf in jax.tree.leaves(cache) if leaf.ndim > 1) // cache.slots


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


def _sampler_seconds(config: DecoderConfig, decoding: DecodeSession, count: int) -> float:
    """Of one step's guidance and sampling alone, in a loop of `PROFILED` of them."""
    plan, variant = jax.tree.map(jnp.asarray, decoding.plan), decoding.shapes.variant
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


def _pixel_seconds(
    tokens: np.ndarray, schedule: np.ndarray, side: int, config: DecoderConfig, vision: VisionConfig
) -> float:
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
        quantize: of `quantization.KINDS`; says whether the cache is narrow too.

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

    found = np.asarray(logits(narrow, tokens, narrows_cache(quantize)))
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
    """Parameters as `Decoder.init` makes them, in the compute dtype, quantised or spread over a mesh if asked for.

    One leaf at a time: there is no float32 copy of all, and no wide one of what is quantised.
    """
    places = {} if mesh is None else traverse_util.flatten_dict(decoder_shardings(config, mesh))
    declared = decoder_params(config)
    keys = jax.random.split(jax.random.key(0), len(declared))

    @functools.partial(jax.jit, static_argnames=("shape", "fan_in"))
    def random(key, shape, fan_in):
        if len(shape) == 1:
            return jnp.ones(shape, config.dtype)
        return normal(key, shape, fan_in**-0.5, config.dtype)

    params: dict[tuple[str, ...], jax.Array] = {}
    for key, (path, shape) in zip(keys, ((param.path, param.shape) for param in declared), strict=True):
        matrix = MATRICES.get(path[-1])
        array = random(key, shape, math.prod(shape[: matrix.inputs]) if matrix else config.hidden_size)
        if mesh is not None:
            array = jax.device_put(array, places[path])
        params |= codes_and_scales(path, array, quantize)
    return traverse_util.unflatten_dict(params)


def _timed(decoding: DecodeSession, first: int, steps: int) -> float:
    """Seconds that `steps` steps take from step `first` on. Every call has the same shapes, so the same program."""
    decoding.place(first)
    jax.block_until_ready(decoding.state)
    began = time.perf_counter()
    decoding.advance(first + steps)
    jax.block_until_ready(decoding.state)
    return time.perf_counter() - began


def _memory() -> dict[str, float]:
    stats = jax.devices()[0].memory_stats() or {}
    return {"peak_gb": round(stats["peak_bytes_in_use"] / 1e9, 2)} if "peak_bytes_in_use" in stats else {}

"""`bench decode`: times the decode loop with guidance, sampler and schedule, on random weights or on a bundle."""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from emu3_jax.benchmarks import TOKENS_PER_PASS, peer
from emu3_jax.benchmarks.automaton import Interleaved
from emu3_jax.benchmarks.kernels import gpu_kernels
from emu3_jax.benchmarks.machine import describe_machine
from emu3_jax.benchmarks.random_weights import normal
from emu3_jax.benchmarks.vision import PRESETS as VISION_PRESETS
from emu3_jax.benchmarks.vision import random_weights
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.checkpoints.embedded import embedded_bundle
from emu3_jax.checkpoints.layouts import decoder_params
from emu3_jax.compilation import enable_persistent_cache
from emu3_jax.config import EMU35_34B, DecoderConfig, VisionTokenizerConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.generation import engine, session
from emu3_jax.generation.defaults import GUIDANCE, TOP_K
from emu3_jax.generation.pipeline import Emu3
from emu3_jax.generation.rows import Sampling
from emu3_jax.generation.schedule import TokenClass, image_schedule
from emu3_jax.generation.session import DecodeSession
from emu3_jax.generation.session_rows import Row
from emu3_jax.generation.shapes import cache_slots
from emu3_jax.loading import decoder_dtype, load
from emu3_jax.media.sizes import generate_size
from emu3_jax.models.adapters import MATRICES
from emu3_jax.models.attention import choose_kernels
from emu3_jax.models.cache import KVCache
from emu3_jax.models.decoder import Decoder, visual_head_params
from emu3_jax.models.products import choose_products
from emu3_jax.models.quantization import codes_and_scales, narrows_cache
from emu3_jax.models.vision import make_decoder
from emu3_jax.sharding.mesh import make_mesh
from emu3_jax.sharding.rules import decoder_shardings, use_mesh

PRESETS = {
    "8b": DecoderConfig(),
    "emu35-34b": EMU35_34B,
    "small": DecoderConfig(hidden_size=256, intermediate_size=512, num_layers=2, num_heads=4, num_kv_heads=2),
}
PROMPT_TOKENS = 64
PROFILED = 16  # number of steps to profile


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
    parallel: tuple[int | str, ...] = ("off",),
    tokens_per_pass: tuple[float, ...] = TOKENS_PER_PASS,
    automaton: bool = False,
) -> Iterator[dict[str, Any]]:
    """Times the decode loop.

    A time is the shortest of three runs of `steps` steps. In parallel decoding a step is a pass of several tokens, of
    which one is settled. `bytes_per_step` counts what a step must read: weights of the layers, the visual rows
    of the head, and the used part of the KV cache (`cache_bytes`). On a mesh, it is the sum over all devices, but the
    bandwidths are those of one device.

    Args:
        preset: name of the decoder shapes in `PRESETS`. The weights are random.
        rows: batch sizes, in pictures. Each is benchmarked on its own.
        area: area of a picture in pixels, or None for the model's default.
        steps: number of steps to time at each cache length, at most the picture's number of tokens.
        whole: whether to also time whole pictures, from prompt to last token and to pixels.
        compare: "transformers" to first run this peer on the same shapes, or None.
        model: bundle to benchmark instead of the preset; "embedded" is the embedded model.
        quantize: quantisation of weights and KV cache, see `load`.
        dtype: dtype of the decoder, see `load`; for a preset bfloat16 by default.
        kernels: implementation of attention in the decode steps, from `attention.KERNELS`.
        mesh: mesh over which the preset's weights are spread, see `load`.
        profile: whether to also list the GPU's kernels at each cache length.
        logits: whether to also compare the logits of quantised and unquantised weights, see `logit_errors`. This runs
            last, because both sets of weights need memory.
        parallel: each "off", "auto" or a number of tokens W of a pass per row; see `generation.parallel`.
        tokens_per_pass: numbers of tokens that passes of W tokens settle on average, for the seconds of a picture. With
            `whole` and a preset, passes settle the first of them, whatever was guessed.
        automaton: whether to also time the loop of `interleave` within pictures, at the last cache length, and its
            automaton alone. That loop computes the logits of all ids, not of visual ids alone.

    Yields:
        The peer's figures if `compare` is given; then the machine and its bandwidths; then figures for each batch size
        and cache length.

    Raises:
        Emu3Error: the bundle is missing, damaged, or lacks a part; the peer's packages are missing; options do not fit
            together; or the mesh does not fit the devices or the preset. If the peer fails, this is raised at the end.
    """
    if mesh is not None and (logits or model is not None or compare is not None):
        raise Emu3Error("--mesh works only with a preset: leave out --logits, --model and --compare")
    if logits and (quantize is None or model is not None):
        raise Emu3Error(
            "--logits compares a preset's logits with and without --quantize: add --quantize, leave out --model"
        )
    if compare and model is None and PRESETS[preset].family != "emu3":
        raise Emu3Error(f"--compare {compare}: transformers has no class for Emu3.5; leave it out")
    failure = None
    if compare:
        peer.require()
        # The peer runs first, because JAX reserves most of the GPU's memory once it has used the device.
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
    devices = None if mesh is None else make_mesh(mesh)
    measured = bandwidths(model is None and preset == "8b")  # before the weights, because it needs much memory
    with use_mesh(devices):
        subject = _subject(preset, model, quantize, dtype, kernels, devices)
        yield {"bench": "decode", **subject.about, **describe_machine(), **measured}
        config = subject.config
        area = config.image_area if area is None else area
        side, _ = generate_size("1:1", area, subject.vision_config.spatial_factor)
        options: dict[str, Any] = {
            "steps": steps, "whole": whole, "profile": profile, "rates": tokens_per_pass, "automaton": automaton,
        }  # fmt: skip
        for count, window in itertools.product(rows, parallel):
            yield from _measure(subject, count, side, copy=measured["copy_gb_per_s"], parallel=window, **options)
        if logits:
            yield logit_errors(config, subject.params, quantize)
    if failure:
        raise failure


@dataclasses.dataclass(frozen=True)
class _Subject:
    """The decoder to measure: one with random weights, or a bundle's (then `loaded` is the whole model)."""

    about: dict[str, Any]
    config: DecoderConfig
    params: Any
    vision_config: VisionTokenizerConfig
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
        vision_config = VISION_PRESETS[{"8b": "270m", "emu35-34b": "455m"}.get(preset, preset)]
        about |= {} if mesh is None else {"mesh": dict(mesh.shape)}
    else:
        loaded = load(None if model == "embedded" else model, quantize=quantize, dtype=dtype)
        about = {"model": model}
        config, params, vision_config = loaded.language.config, loaded.language.params, loaded.vision.config
        quantize = loaded.language.quantize
    about["dtype"] = config.dtype
    if quantize is not None:
        about["quantize"] = quantize
    about["kernels"] = kernels = choose_kernels(kernels, config.head_dim, config.dtype)
    narrow_cache = narrows_cache(quantize)
    return _Subject(about, config, params, vision_config, loaded, mesh, narrow_cache, kernels)


def _measure(
    subject: _Subject,
    count: int,
    side: int,
    *,
    steps: int,
    whole: bool,
    profile: bool,
    copy: float,
    parallel: int | str,
    rates: tuple[float, ...],
    automaton: bool,
) -> Iterator[dict[str, Any]]:
    """Yields figures for a batch of `count` pictures of `side` x `side` tokens.

    `copy` is the copy bandwidth of one device in GB/s. See `run` for `parallel` and `rates` (its `tokens_per_pass`).
    """
    config, params = subject.config, subject.params
    schedule = image_schedule(side, side)
    total = len(schedule) - 3
    prompt = [1] * PROMPT_TOKENS
    pictures = [Row(prompt, schedule, prompt)] * count
    settings = Sampling(top_k=TOP_K, guidance=GUIDANCE).settings(count)
    options: dict[str, Any] = {
        "mesh": subject.mesh, "narrow_cache": subject.narrow_cache, "kernels": subject.kernels, "parallel": parallel,
    }  # fmt: skip
    decoding = DecodeSession(params, config, pictures, settings, **options)
    window = decoding.shapes.variant.window
    rate = rates[0] if window > 1 else None
    decoding = DecodeSession(params, config, pictures, settings, settled_per_pass=rate, **options)
    goal = int(decoding.plan.goal.max())  # the step at which the device stops
    passes = max(int(min(steps, goal - 1) / (rate or 1)), 1)  # that are timed
    timed = max(int(passes * (rate or 1)), 1)  # the steps that they take
    about: dict[str, Any] = {"pictures": count}
    if window > 1:
        about |= {"parallel": window, "kernels": decoding.shapes.variant.kernels}
    step = "step" if window == 1 else "pass"
    began = time.perf_counter()
    decoding.start()
    jax.block_until_ready(decoding.state)
    compile_s = time.perf_counter() - began
    if window > 1 and (codes := params["layers_0"]["mlp"].get("down_codes")) is not None:
        decoded_rows = decoding.state.cache.length.shape[0]
        product = (decoded_rows, window, config.intermediate_size, config.hidden_size, config.dtype, codes.dtype)
        about["products"] = choose_products(decoding.shapes.variant.kernels, *product)
    weight_bytes, slot_bytes = step_weight_bytes(params, config), _slot_bytes(decoding)
    devices = 1 if subject.mesh is None else subject.mesh.size
    seconds = 0.0
    position = 1
    while position < total:  # times the middle of each stage of a growing cache
        needed, final = PROMPT_TOKENS + position + 1, decoding.shapes.slots(2**30)
        last = min(cache_slots(needed, final, "xla") - PROMPT_TOKENS, total)
        middle = max(min((position + last - timed) // 2, goal - timed), 1)
        attempts = [_timed(decoding, middle, passes) for _ in range(3)]  # the first one may compile
        compile_s += attempts[0]
        best = min(attempts) / passes
        seconds += best * (last - position)
        cache_bytes = slot_bytes * (PROMPT_TOKENS + middle + timed // 2)
        moved = weight_bytes + cache_bytes
        slots = decoding.state.cache.slots
        yield {
            **about,
            "cache_length": PROMPT_TOKENS + middle + timed // 2,
            "cache_slots": slots,
            f"ms_per_{step}": round(best * 1e3, 3),
            f"bytes_per_{step}": moved,
            "cache_bytes": cache_bytes,
            "gb_per_s": round(moved / best / 1e9, 1),
            "share_of_copy": round(moved / best / 1e9 / copy / devices, 3),
        }
        if profile:
            with gpu_kernels(PROFILED) as found:
                _timed(decoding, middle, PROFILED)
            if found:
                yield {**about, "cache_slots": slots, **found}
        position = last
    average = seconds / total
    sampler = _sampler_seconds(config, decoding, count)
    counts = {"": total} if window == 1 else {f"_at_{rate:g}_tokens_per_pass": total / rate for rate in rates}
    summary = {
        **about,
        "picture": "{0}x{0}".format(side * subject.vision_config.spatial_factor),
        "tokens": total,
        "ms_per_token_average" if window == 1 else "ms_per_pass_average": round(average * 1e3, 3),
        **{f"seconds_per_picture{name}": round(average * number / count, 2) for name, number in counts.items()},
        **{f"pictures_per_minute{name}": round(60 * count / (average * number), 2) for name, number in counts.items()},
        "sampler_ms": round(sampler * 1e3, 4),
        "sampler_share": round(sampler / average, 4),
        "first_calls_s": round(compile_s, 1),
        **_memory(),
    }
    variant = decoding.shapes.variant
    del decoding
    if whole:
        options["settled_per_pass"] = rate if subject.loaded is None else None
        if options["settled_per_pass"] != rate:  # else it is already compiled by the runs above
            session.run(params, config, pictures, settings, **options)
        began = time.perf_counter()
        made = session.run(params, config, pictures, settings, **options)
        summary["whole_run_s"] = round(time.perf_counter() - began, 2)
        if window > 1:
            summary["tokens_per_pass"] = round(float(total / made.passes.mean()), 3)
        tokens = made.ids
        if subject.loaded is None:
            summary["pixels_s"] = _pixel_seconds(tokens, schedule, side, config, subject.vision_config)
        else:
            area = (side * subject.vision_config.spatial_factor) ** 2
            for _ in range(2):
                began = time.perf_counter()
                subject.loaded.generate(
                    ["a picture"] * count,
                    area=area,
                    guidance=GUIDANCE,
                    top_k=TOP_K,
                    batch_size=count,
                    parallel=parallel,
                )
            summary["prompt_to_pixels_s"] = round(time.perf_counter() - began, 2)
        summary |= _memory()
    yield summary
    if automaton:  # at the end, because the peak memory above is without it
        interleaved = Interleaved(
            params, config, count, side, prompt=PROMPT_TOKENS, slots=slots, window=window, mesh=subject.mesh,
            narrow_cache=subject.narrow_cache, kernels=variant.kernels,
        )  # fmt: skip
        looped, alone = min(interleaved.timed(middle, passes) for _ in range(4)), interleaved.automaton()
        yield {
            **about,
            "cache_slots": slots,
            f"static_ms_per_{step}": round(best * 1e3, 3),
            f"interleaved_ms_per_{step}": round(looped * 1e3, 3),
            "automaton_ms": round(alone * 1e3, 4),
            "automaton_share": round(alone / looped, 6),
        }


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
    """Seconds that guidance and sampling of one step take, measured in a loop of `PROFILED` steps without a model."""
    plan, variant = jax.tree.map(jnp.asarray, decoding.plan), decoding.shapes.variant
    candidates = config.tokens.visual_count if variant.visual_only else config.vocab_size
    logits = jax.random.normal(jax.random.key(0), (2 * count, variant.window, candidates), jnp.float32)

    @jax.jit
    def loop(logits, plan):
        def take(step, carry):
            logits, total = carry
            tokens = engine.choose(logits, jnp.full(count, step, jnp.int32), plan, config, variant)
            return logits + step, total + tokens  # the logits change, or XLA would move the work out of the loop

        return jax.lax.fori_loop(0, PROFILED, take, (logits, jnp.zeros((count, variant.window), jnp.int32)))

    best = math.inf
    for _ in range(4):  # the first compiles
        began = time.perf_counter()
        jax.block_until_ready(loop(logits, plan))
        best = min(best, time.perf_counter() - began)
    return best / PROFILED


def _pixel_seconds(
    tokens: np.ndarray, schedule: np.ndarray, side: int, config: DecoderConfig, vision: VisionTokenizerConfig
) -> float:
    """Seconds to decode the tokens of all pictures to pixels, by a compiled vision tokenizer with random weights."""
    params = traverse_util.unflatten_dict(jax.tree.map(jnp.asarray, random_weights(vision)))
    codes = tokens[:, schedule == TokenClass.VISUAL].reshape(-1, 1, side, side) - config.tokens.visual_start
    for _ in range(2):
        began = time.perf_counter()
        for picture in codes:
            jax.block_until_ready(make_decoder(vision)(params, picture))
    return round(time.perf_counter() - began, 3)


def logit_errors(config: DecoderConfig, narrow: Any, quantize: str) -> dict[str, float]:
    """Measures how much quantisation changes the logits of `PROMPT_TOKENS` visual tokens, with random weights.

    Args:
        config: config of the decoder.
        narrow: the quantised parameters, from `random_params(config, quantize)`.
        quantize: name of the quantisation, from `quantization.KINDS`. It also decides whether the KV cache is int8.

    Returns:
        `logit_error`: root mean square of the differences, divided by the root mean square of the unquantised logits.
        `same_likeliest`: share of positions whose likeliest visual token does not change.
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
    """Bytes of weights that one step reads: all layers, the last norm and the visual rows of the head."""
    counted = {k: v for k, v in params.items() if k not in ("embed", "head")}
    rows = config.tokens.visual_count / config.vocab_size
    return sum(leaf.nbytes for leaf in jax.tree.leaves(counted)) + round(
        sum(leaf.nbytes for leaf in jax.tree.leaves(params["head"])) * rows
    )


def random_params(config: DecoderConfig, quantize: str | None = None, mesh: Mesh | None = None) -> Any:
    """Random parameters in the compute dtype, with the tree structure of `Decoder.init`.

    With `quantize`, the layers' matrices are quantised; with `mesh`, arrays are sharded. Leaves are made one at a time,
    so memory never holds a second, wider copy of all weights.
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
    """Seconds that `steps` steps take from step `first` on. The shapes do not depend on `first`."""
    decoding.place(first)
    jax.block_until_ready(decoding.state)
    began = time.perf_counter()
    decoding.advance(steps)
    jax.block_until_ready(decoding.state)
    return time.perf_counter() - began


def _memory() -> dict[str, float]:
    stats = jax.devices()[0].memory_stats() or {}
    return {"peak_gb": round(stats["peak_bytes_in_use"] / 1e9, 2)} if "peak_bytes_in_use" in stats else {}

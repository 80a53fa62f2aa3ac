"""`bench vision`: times encoding and decoding of one picture, optionally beside transformers on the same CPU."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from emu3_jax.benchmarks.machine import describe_machine
from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.checkpoints.embedded import embedded_bundle
from emu3_jax.checkpoints.layouts import TRANSFORMERS_VISION, vision_counters, vision_params
from emu3_jax.checkpoints.published_config import vision_to_published
from emu3_jax.compilation import enable_persistent_cache
from emu3_jax.config import IbqConfig, VisionConfig, VisionTokenizerConfig
from emu3_jax.errors import Emu3Error
from emu3_jax.models.vision import make_decoder, make_encoder

PRESETS = {
    "270m": VisionConfig(),
    "455m": IbqConfig(),
    "small": VisionConfig(base_channels=32, num_res_blocks=1, codebook_size=1024),
}
Operations = dict[str, Callable[[np.ndarray], np.ndarray]]  # "encode": pixels to codes, "decode": codes to pixels


def run(
    *,
    size: int = 256,
    preset: str = "270m",
    repeat: int = 5,
    compare: str | None = None,
    model: str | None = None,
    fast: bool = False,
) -> Iterator[dict[str, Any]]:
    """Times encoding and decoding of one picture.

    A time is the shortest of `repeat` rounds after one warm-up round, because other work on the machine can only add
    time. Each round times all sides, so that they run under the same conditions. Both sides use the same weights,
    pixels and codes. `temporary_mb` is the memory that XLA allocates beyond weights, input and output. `compile_s` is
    short if the persistent cache already holds the program.

    Args:
        size: height and width of the picture in pixels.
        preset: name of the shapes in `PRESETS`. The weights are random.
        repeat: number of rounds.
        compare: "transformers" to also time transformers, or None.
        model: bundle to benchmark instead of the preset; "embedded" is the embedded model. The pixels are still random.
        fast: whether to also decode at the device's default precision, and report the mean difference from the exact
            pixels, in 255ths of the range.

    Yields:
        The machine; then the figures of each side; then, with `compare`, ratios and differences of the results; then,
        with `fast`, the figures of fast decoding.

    Raises:
        Emu3Error: the bundle is missing, damaged or has no vision tokenizer; `size` is no multiple of the spatial
            factor; `repeat` is below 1; or `compare` is given on an accelerator, or for Emu3.5's tokenizer.
    """
    bundle = None if model is None else Bundle.open(embedded_bundle() if model == "embedded" else model)
    if bundle is not None:
        bundle.require("vision")
    config = PRESETS[preset] if bundle is None else bundle.vision_config
    if size <= 0 or size % config.spatial_factor:
        raise Emu3Error(f"--size is {size}: it must be a positive multiple of {config.spatial_factor}")
    if repeat < 1:
        raise Emu3Error(f"--repeat is {repeat}: it must be at least 1")
    if compare and isinstance(config, IbqConfig):
        raise Emu3Error(f"--compare {compare}: transformers has no class for Emu3.5's vision tokenizer; leave it out")
    if compare and jax.default_backend() != "cpu":
        raise Emu3Error(
            f"--compare {compare} runs on the CPU, but JAX runs on {jax.default_backend()}: set JAX_PLATFORMS=cpu"
        )
    enable_persistent_cache()
    if bundle is None:
        weights, about = random_weights(config), {"preset": preset}
    else:
        weights, about = {param.path: array for param, array in bundle.arrays("vision")}, {"model": model}
    yield {
        "bench": "vision",
        **about,
        "picture": f"{size}x{size}",
        "parameters": sum(array.size for array in weights.values()),
        **describe_machine(),
    }
    pixels = np.random.default_rng(1).uniform(-1, 1, (1, size, size, config.in_channels)).astype(np.float32)
    params = traverse_util.unflatten_dict(jax.tree.map(jax.device_put, weights))
    ours, compiled = compile_operations(params, pixels, config)
    sides = {"emu3_jax": (ours, compiled)}
    if compare:
        sides["transformers"] = transformers_operations(weights, config)
    codes = ours["encode"](pixels)
    inputs = {"encode": pixels, "decode": codes}
    results = {side: {name: call(inputs[name]) for name, call in calls.items()} for side, (calls, _) in sides.items()}
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(repeat):
        for name, value in inputs.items():
            for side, (calls, _) in sides.items():
                began = time.perf_counter()
                calls[name](value)
                times.setdefault((side, name), []).append(time.perf_counter() - began)
    seconds = {key: min(values) for key, values in times.items()}
    for side, (_, figures) in sides.items():
        yield {"side": side, **{f"{name}_s": round(seconds[side, name], 3) for name in inputs}, **figures}
    if compare:
        own, peer = results["emu3_jax"], results["transformers"]
        yield {
            **{f"{name}_ratio": round(seconds["transformers", name] / seconds["emu3_jax", name], 2) for name in inputs},
            "codes_equal": f"{int((peer['encode'] == own['encode']).sum())}/{codes.size}",
            "pixels_relative_difference": float(
                np.abs(peer["decode"] - own["decode"]).max() / np.abs(peer["decode"]).max()
            ),
        }
    if fast:
        decode, figures = _compiled(make_decoder(config, fast=True), params, codes)
        exact, found = (np.clip(x, -1, 1) for x in (results["emu3_jax"]["decode"], decode(codes)))
        times_fast = []
        for _ in range(repeat):
            began = time.perf_counter()
            decode(codes)
            times_fast.append(time.perf_counter() - began)
        yield {
            "side": "emu3_jax, fast",
            "decode_s": round(min(times_fast), 3),
            **{f"decode_{name}": value for name, value in figures.items()},
            "mean_difference_255ths": round(float(np.abs(found - exact).mean()) * 127.5, 4),
        }


def random_weights(config: VisionTokenizerConfig) -> dict[tuple[str, ...], np.ndarray]:
    """Random float32 parameters by path.

    Kernels have variance 1 / fan-in, the codebook is standard normal, norms have scale 1 and bias 0.
    """
    rng = np.random.default_rng(0)
    weights = {}
    for param in vision_params(config):
        if len(param.shape) == 1:
            value = np.full(param.shape, 1 if param.path[-1] in ("scale", "var") else 0, np.float32)
        else:
            fan_in = 1 if param.path[-1] == "embedding" else math.prod(param.shape[:-1])
            value = rng.standard_normal(param.shape, np.float32) / np.float32(math.sqrt(fan_in))
        weights[param.path] = value
    return weights


def compile_operations(
    params: Any, pixels: np.ndarray, config: VisionTokenizerConfig
) -> tuple[Operations, dict[str, Any]]:
    """Compiles our encode and decode for the shape of `pixels`. Returns both, and their compile time and memory."""
    codes = jax.eval_shape(make_encoder(config), params, pixels)
    operations, figures = {}, {}
    for name, function, example in (("encode", make_encoder(config), pixels), ("decode", make_decoder(config), codes)):
        operations[name], said = _compiled(function, params, example)
        figures |= {f"{name}_{what}": value for what, value in said.items()}
    return operations, figures


def _compiled(function: Any, params: Any, example: Any) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]:
    """Compiles `function` for the example's shape and binds `params`. Returns it, and its compile time and memory."""
    began = time.perf_counter()
    compiled = function.lower(params, example).compile()
    seconds = time.perf_counter() - began
    figures = {
        "compile_s": round(seconds, 2),
        "temporary_mb": round(compiled.memory_analysis().temp_size_in_bytes / 2**20),
    }
    return lambda value: np.asarray(compiled(params, value)), figures


def transformers_operations(
    weights: dict[tuple[str, ...], np.ndarray], config: VisionConfig
) -> tuple[Operations, dict[str, Any]]:
    """Encode and decode of transformers' `Emu3VQVAE` with the same weights, and the versions of its packages."""
    try:
        import torch
        import transformers
        from transformers import Emu3VQVAE, Emu3VQVAEConfig
    except ImportError as error:
        raise Emu3Error(f"--compare transformers needs {error.name}: pip install 'emu3-jax[test]'") from error
    with torch.device("meta"):  # skips the random initialisation, which the loaded weights replace
        model = Emu3VQVAE(Emu3VQVAEConfig(**vision_to_published(config, "transformers")))
    state = {}
    for param in vision_params(config):
        for weight, array in zip(param.weights, param.unpack(weights[param.path]), strict=True):
            renamed = TRANSFORMERS_VISION.rename(weight, "vision")
            state[renamed.name] = torch.from_numpy(array.reshape(renamed.shape))
    for counter in vision_counters(config):
        state[TRANSFORMERS_VISION.rename(counter, "vision").name] = torch.tensor(0)
    model.load_state_dict(state, assign=True)
    model.eval()

    @torch.inference_mode()
    def encode(pixels: np.ndarray) -> np.ndarray:
        sizes = torch.tensor([pixels.shape[1:3]] * len(pixels))
        output = model.encode(torch.from_numpy(np.moveaxis(pixels, -1, 1).copy()), sizes)
        return torch.stack(list(output.image_tokens)).numpy()

    @torch.inference_mode()
    def decode(codes: np.ndarray) -> np.ndarray:
        return np.moveaxis(model.decode(torch.from_numpy(codes.astype(np.int64))).numpy(), 1, -1)

    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
    return {"encode": encode, "decode": decode}, versions

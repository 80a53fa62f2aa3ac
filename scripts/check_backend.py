"""Checks this machine's accelerator against golden cases. Run `python scripts/check_backend.py` in a checkout.

The tests run on CPUs. This script repeats the checks that depend on a backend's arithmetic: codes, latents and pixels
of the vision tokenizer, and logits and greedy sequences of the decoder, all in float32. It uses JAX's default device,
and prints one JSON line per check. The exit code is 1 if a check fails.
"""

import dataclasses
import importlib.util
import itertools
import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

import emu3_jax
from emu3_jax.benchmarks.decode import random_params
from emu3_jax.checkpoints.layouts import decoder_params, vision_params
from emu3_jax.checkpoints.published_config import decoder_from_published, vision_from_published
from emu3_jax.config import DecoderConfig, VisionConfig
from emu3_jax.generation import session
from emu3_jax.generation.rows import Sampling
from emu3_jax.generation.schedule import image_schedule, text_schedule
from emu3_jax.generation.session import DecodeSession
from emu3_jax.generation.session_rows import Row
from emu3_jax.models.cache import KVCache
from emu3_jax.models.capability import AMPERE, cuda_at_least
from emu3_jax.models.decoder import Decoder
from emu3_jax.models.quantization import quantise_params
from emu3_jax.models.vision import VisionTokenizer

GOLDEN = pathlib.Path(__file__).parents[1] / "tests" / "golden"
TOLERANCE = 1e-4


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name) as data:
        return dict(data)


def reference_params(part: str, params) -> dict:
    """The golden weights of `part` ("lm" or "vq") packed as a bundle's nested dict."""
    spec = importlib.util.spec_from_file_location("reference_weights", GOLDEN / "reference_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    seed = json.loads((GOLDEN / "prompts.json").read_text())["seed"]
    tree: dict = {}
    for param in params:
        node = tree
        for key in param.path[:-1]:
            node = node.setdefault(key, {})
        weights = [module.reference_weight(weight.name, weight.shape, seed) for weight in param.weights]
        node[param.path[-1]] = jnp.asarray(param.pack(weights))
    return tree


def check_vision(config: VisionConfig, params: dict):
    """Yields (name of the check, largest difference or number of differing codes, limit)."""

    def apply(x, method):
        return np.asarray(
            jax.jit(lambda p, x: VisionTokenizer(config).apply({"params": p}, x, method=method))(params, x)
        )

    arrays = golden("vision.npz")
    for case in ("image", "image_batch", "video", "image_codes", "video_codes"):
        codes = arrays[f"{case}/codes"]
        if f"{case}/pixels" in arrays:
            pixels = np.moveaxis(arrays[f"{case}/pixels"], -3, -1)
            yield f"{case} codes", int((apply(pixels, "encode") != codes).sum()), 0
            latents = np.moveaxis(arrays[f"{case}/latents"], -3, -1)
            yield f"{case} latents", float(np.abs(apply(pixels, "latents") - latents).max()), TOLERANCE
        expected = np.moveaxis(arrays[f"{case}/reconstruction"], -3, -1)
        yield f"{case} pixels", float(np.abs(apply(codes, "decode") - expected).max()), TOLERANCE
    for name, array in golden("images.npz").items():
        if name.endswith("/pixels"):
            codes = golden("images.npz")[name.replace("pixels", "codes")]
            yield f"{name[:-7]} codes", int((apply(np.moveaxis(array, 1, -1), "encode") != codes).sum()), 0


def check_decoder(config: DecoderConfig, params: dict):
    """Yields (name of the check, largest difference or number of differing tokens, limit)."""
    arrays = golden("decoder.npz")
    start = jnp.asarray((1 - arrays["attention_mask"]).sum(axis=1), jnp.int32)
    tokens = jnp.asarray(arrays["input_ids"], jnp.int32)
    cache = KVCache.create(config, start, tokens.shape[1])
    logits, _ = jax.jit(lambda p, t, c: Decoder(config).apply({"params": p}, t, c))(params, tokens, cache)
    yield "logits", float(np.abs(np.asarray(logits[:, -1]) - arrays["last_logits"]).max()), TOLERANCE

    sequences = golden("generate.npz")

    ids, length = sequences["wide/sequences"][0], int(sequences["wide/prompt_length"])
    prompt = ids[:length].tolist()
    negative = [config.tokens.bos, *prompt[prompt.index(config.tokens.boi) :]]  # the case's negative prompt is empty
    height, width = sequences["wide/image_size"][0]
    picture = [Row(prompt, image_schedule(height, width), negative)], Sampling(0.0, guidance=5.0).settings(1)
    for kernels in kernels_here():
        got = session.run(params, config, *picture, kernels=kernels).ids
        yield f"guided picture tokens, {kernels}", int((got[0] != ids[length:]).sum()), 0
        for name, case in (("describe", 0), ("batch", 1)):
            texts = json.loads((GOLDEN / "text.json").read_text())["understanding_prompt"][case]
            pairs = zip(texts["input_ids"], texts["attention_mask"], strict=True)
            rows = [[token for token, real in zip(*pair, strict=True) if real] for pair in pairs]
            answers = [Row(row, text_schedule(24)) for row in rows], Sampling(0.0, guidance=1.0).settings(len(rows))
            got = session.run(params, config, *answers, kernels=kernels).ids
            expected = sequences[f"{name}/sequences"][:, int(sequences[f"{name}/prompt_length"]) :]
            yield f"answer tokens ({name}), {kernels}", int((got != expected).sum()), 0
    for kernels in kernels_here():
        yield f"copies of the cache, {kernels}", cache_copies(config, params, kernels), 0
    if "pallas" in kernels_here():
        narrow = quantise_params(params, "int8")
        first, second = (
            session.run(narrow, config, *picture, narrow_cache=True, kernels=kernels).ids
            for kernels in ("xla", "pallas")
        )
        yield "guided picture tokens, int8, of xla and pallas", int((first != second).sum()), 0


def cache_copies(config: DecoderConfig, params: dict, kernels: str) -> int:
    """The number of operations in the compiled decode loop that copy a layer's keys or values."""
    slots, rows = 4096, 4
    row = Row([config.tokens.pad] * 64, image_schedule(38, 100))
    decoding = DecodeSession(params, config, [row] * rows, Sampling(guidance=1.0).settings(rows), kernels=kernels)
    text = decoding.lower_decode(slots).compile().as_text()
    shape = ",".join(map(str, decoding.abstract_state(slots).cache.keys[0].shape))
    assert f"[{shape}]" in text
    return len(re.findall(rf"= \(?\w+\[{shape}\]\S* copy(?:-start)?\(", text))


def check_narrow(config: DecoderConfig):
    """Compares logits in narrow dtypes with float32 logits of the same weights, at the 8 B model's widths.

    Weights are stored in bfloat16, or as codes and scales. float16 casts bfloat16 weights, as loading does. Yields
    (name of the check, relative error of the logits, limit).
    """
    config = dataclasses.replace(
        config, hidden_size=4096, intermediate_size=14336, num_layers=2, num_heads=32, num_kv_heads=8, dtype="bfloat16"
    )
    half, exact = (dataclasses.replace(config, dtype=dtype) for dtype in ("float16", "float32"))
    tokens = jax.random.randint(jax.random.key(1), (2, 65), 0, config.vocab_size)

    # A window of 16 tokens has a kernel of its own for RoPE and writes; one of 5 tokens has none. Rows are ragged.
    ragged = jnp.asarray([50, 60], jnp.int32)

    def logits(config, params, narrow_cache, kernels):
        """The logits of a prompt of 64 tokens, of the next token, and of windows of 16 and 5 tokens."""
        cache = KVCache.create(config, jnp.asarray([0, 3], jnp.int32), 128, narrow_cache)
        step = jax.jit(
            lambda p, t, c, kernels: Decoder(config, kernels=kernels).apply({"params": p}, t, c), static_argnums=3
        )
        first, cache = step(params, tokens[:, :64], cache, "xla")
        found = [first[:, 3:], step(params, tokens[:, 64:], cache, kernels)[0]]
        cache = cache.replace(lockstep=False, length=ragged)
        return [np.asarray(x) for x in (*found, *(step(params, tokens[:, :n], cache, kernels)[0] for n in (16, 5)))]

    def cast(leaf):
        return leaf.astype(jnp.float16) if leaf.dtype == jnp.bfloat16 else leaf

    for kind in (None, "int8", "fp8"):
        params = random_params(config, kind)
        plain = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), widened(params))
        expected = logits(exact, plain, False, "xla")
        del plain
        for own, kernels in itertools.product((config, half), kernels_here()):
            found = logits(own, params if own is config else jax.tree.map(cast, params), kind is not None, kernels)
            parts = zip(("64 tokens", "1 token", "a window of 16", "a window of 5"), found, expected, strict=True)
            for what, one, other in parts:
                name = ", ".join(filter(None, (kind, own.dtype, kernels)))
                yield f"logits of {what}, {name}", relative_error(one, other), 0.03


def check_embedded():
    """The embedded model in other dtypes against float32, along a picture that it draws greedily.

    Yields (what, relative error of the logits, limit) and (what, share of tokens whose likeliest token changes, limit).
    """
    whole = emu3_jax.load(dtype="float32")
    (sequence,) = whole.generate_sequences(["3d emoji of rainbow"], greedy=True)
    tokens = jnp.asarray(sequence.ids)[None]

    def logits(model):
        language = model.language
        cache = KVCache.create(language.config, jnp.zeros(1, jnp.int32), tokens.shape[1], language.narrow_cache)
        decoder = Decoder(language.config)
        found, _ = jax.jit(lambda p, t, c: decoder.apply({"params": p}, t, c))(language.params, tokens, cache)
        return np.asarray(found)

    exact = logits(whole)
    for dtype, kind in (("bfloat16", None), ("float16", None), ("bfloat16", "int8"), ("float16", "int8")):
        found = logits(emu3_jax.load(dtype=dtype, quantize=kind))
        name = ", ".join(filter(None, (kind, dtype)))
        yield f"embedded model, logits, {name}", relative_error(found, exact), 0.1
        changed = float(np.mean(found.argmax(-1) != exact.argmax(-1)))
        yield f"embedded model, likeliest tokens that change, {name}", round(changed, 4), 0.1


def relative_error(found, expected):
    """Root mean square of the differences over that of what is expected."""
    return float(f"{np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)):.2g}")


def kernels_here():
    """What computes attention of single tokens on this device."""
    pallas = jax.default_backend() == "gpu" and cuda_at_least(AMPERE)
    return ("xla", "pallas") if pallas else ("xla",)


def widened(params):
    """Dequantises parameters."""
    plain = {}
    for name, leaf in params.items():
        stem = name.removesuffix("_codes")
        if isinstance(leaf, dict):
            plain[name] = widened(leaf)
        elif stem != name:
            scales = params[f"{stem}_scales"]
            wide = leaf.astype(jnp.float32) * scales.reshape(*scales.shape, *(1,) * (leaf.ndim - scales.ndim))
            plain[stem] = wide if stem == "kernel" else jnp.moveaxis(wide, range(scales.ndim), range(-scales.ndim, 0))
        elif not name.endswith("_scales"):
            plain[name] = leaf
    return plain


def main() -> int:
    configs = json.loads((GOLDEN / "hf_configs.json").read_text())
    vision = vision_from_published(configs["vq"])
    decoder = dataclasses.replace(decoder_from_published(configs["lm"]), dtype="float32")
    print(json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__}))
    failed = False
    for checks in (
        check_vision(vision, reference_params("vq", vision_params(vision))),
        check_decoder(decoder, reference_params("lm", decoder_params(decoder))),
        check_narrow(decoder),
        check_embedded(),
    ):
        for what, difference, limit in checks:
            failed |= not difference <= limit
            print(json.dumps({"check": what, "difference": difference, "limit": limit, "ok": difference <= limit}))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
